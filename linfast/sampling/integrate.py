"""Explicit Runge-Kutta on the latent flow dz/dt = (A_t z - z) / (1 - t).

A_t predicts the endpoint z_1, so v = (A_t z - z) / (1 - t). ``steps`` n means n - 1
steps of size h = 1 / n from t = 0: the last reaches t = 1 - 1 / n, and nothing is
evaluated at t = 1 (the stop rule of arXiv 2510.08570 and of its repository).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["METHODS", "Tableau", "integrate", "tableau"]


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: k_i = v(z + h sum_j a_ij k_j, t + c_i h), z' = z + h sum_i b_i k_i."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


METHODS: dict[str, Tableau] = {
    "euler": Tableau(a=((),), b=(1.0,), c=(0.0,)),
    "rk4": Tableau(
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0.0, 0.5, 0.5, 1.0),
    ),
}


def tableau(method: str, steps: int) -> Tableau:
    """The tableau of this method; ValueError for an unknown one or fewer than two steps."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2; got {steps}")
    return METHODS[method]


def integrate(
    apply: Callable[[Tensor, float], Tensor],
    z: Tensor,
    steps: int,
    method: str,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """z [B, n] after steps - 1 steps of the latent flow.

    Args:
        apply: (z, t) -> A_t z.
        on_step: called with z after each step.
    """
    scheme, h = tableau(method, steps), 1.0 / steps
    for i in range(steps - 1):
        t = i * h
        slopes: list[Tensor] = []
        for row, c in zip(scheme.a, scheme.c, strict=True):
            stage = _advance(z, slopes, row, h)
            time = t + c * h
            slopes.append((apply(stage, time) - stage) / (1.0 - time))
        z = _advance(z, slopes, scheme.b, h)
        if on_step is not None:
            on_step(z)
    return z


def _advance(z: Tensor, slopes: list[Tensor], weights: tuple[float, ...], h: float) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            z = z + (h * weight) * slope
    return z
