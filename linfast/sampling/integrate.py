"""Explicit Runge-Kutta on the latent flow dz/dt = (A_t z - z) / (1 - t).

A_t predicts the endpoint z_1, so v = (A_t z - z) / (1 - t). Where the steps end:

    stop=None   steps - 1 steps of size 1 / steps: the last reaches t = 1 - 1 / steps
                (the stop rule of arXiv 2510.08570 and of its repository)
    stop=T      ``steps`` steps of size T / steps, from 0 to T, 0 < T <= 1

At t = 1 the quotient is 0 / 0 where A_1 z = z and infinite elsewhere, so no stage may be
evaluated there. Hence T = 1 is only for methods without a stage at the end of a step:
euler, whose last step gives A_{1 - h} z, and midpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from torch import Tensor

from ..checks import check_choice, check_count, check_number

_Array = TypeVar("_Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: k_i = v(z + h sum_j a_ij k_j, t + c_i h), z' = z + h sum_i b_i k_i.

    All distinct times of the steps are numbered in order; a stage of step i is at number i stride +
    node. rk4's stages 2 and 3 share a time, and its last stage is at the next step's first time.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """The distinct c, ascending."""
        return tuple(sorted(set(self.c)))

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """The index in ``nodes`` of each stage's c."""
        return tuple(self.nodes.index(c) for c in self.c)

    @property
    def stride(self) -> int:
        """The number of distinct times from the start of a step to that of the next."""
        return len(self.nodes) - (1.0 in self.nodes)


METHODS: dict[str, Tableau] = {
    "euler": Tableau(a=((),), b=(1.0,), c=(0.0,)),
    "midpoint": Tableau(a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5)),
    "heun": Tableau(a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0)),
    "rk4": Tableau(
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0.0, 0.5, 0.5, 1.0),
    ),
}


@dataclass(frozen=True)
class Schedule:
    """``count`` steps of size h of a method from t = 0."""

    scheme: Tableau
    count: int
    h: float

    @cached_property
    def times(self) -> tuple[float, ...]:
        """The distinct times of all stages, ascending."""
        return tuple(sorted({(i + c) * self.h for i in range(self.count) for c in self.scheme.nodes}))

    def index(self, step: int, stage: int) -> int:
        """The index in ``times`` of a stage of a step."""
        return step * self.scheme.stride + self.scheme.node_of[stage]


def schedule(method: str, steps: int, stop: float | None = None) -> Schedule:
    """The schedule of a method; ValueError for an unknown method, steps < 2, or a stop that it does not allow."""
    check_choice("method", method, tuple(METHODS))
    steps = check_count("steps", steps, least=2)
    scheme = METHODS[method]
    if stop is None:
        return Schedule(scheme, steps - 1, 1.0 / steps)
    check_number("stop", stop, 0.0, 1.0, above=True)
    if stop == 1 and 1.0 in scheme.c:
        raise ValueError(
            f"{method} looks at t = 1, where (A_t z - z) / (1 - t) has no limit: "
            "use euler or midpoint for stop=1, or a stop below 1"
        )
    return Schedule(scheme, steps, stop / steps)


def integrate(
    apply: Callable[[Tensor, int], Tensor],
    z: Tensor,
    plan: Schedule,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """z [B, n] after the steps of the latent flow, where ``apply(z, k)`` is A_t z at t = plan.times[k].

    ``on_step`` is called with z after each step.
    """
    for i in range(plan.count):
        slopes: list[Tensor] = []
        for stage, row in enumerate(plan.scheme.a):
            k = plan.index(i, stage)
            inner = advance(z, slopes, row, plan.h)
            slopes.append((apply(inner, k) - inner) / (1.0 - plan.times[k]))
        z = advance(z, slopes, plan.scheme.b, plan.h)
        if on_step is not None:
            on_step(z)
    return z


def advance(z: _Array, slopes: list[_Array], weights: tuple[float, ...], h: float) -> _Array:
    """z + h sum_i weights_i slopes_i, of tensors or of numpy arrays."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            z = z + (h * weight) * slope
    return z
