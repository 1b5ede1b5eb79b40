"""sample and invert: noise to data and back, through f = g_y^{-1} A_t g_x.

Data lie on the x side and noise on the y side:

    sample  y = g_x^{-1}(B g_y(noise))        invert  noise = g_y^{-1}(B^{-1} g_x(y))

B is all the steps of the latent flow (``collapse``). The one-step generator is
itself a Linearizer, with core B: Linearizer(f.g_y, B, f.g_x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from ..autocast import outside_autocast
from ..linearizer import Linearizer
from ..profiling import annotate
from .integrate import integrate
from .propagator import check_time_dependent, collapse

__all__ = ["generator", "invert", "sample"]


@annotate
def generator(f: Linearizer, steps: int = 100, method: str = "rk4") -> Linearizer:
    """The one-step generator, noise to data: a Linearizer whose core is ``collapse(f.A)``."""
    _check(f)
    return Linearizer(f.g_y, collapse(f.A, steps, method), f.g_x)


@overload
def sample(
    f: Linearizer,
    noise: Tensor,
    steps: int = ...,
    method: str = ...,
    one_step: bool = ...,
    return_path: Literal[False] = ...,
) -> Tensor: ...
@overload
def sample(
    f: Linearizer, noise: Tensor, steps: int = ..., method: str = ..., *, one_step: bool, return_path: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@annotate
def sample(
    f: Linearizer,
    noise: Tensor,
    steps: int = 100,
    method: str = "rk4",
    one_step: bool = True,
    return_path: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Data from noise: one product with the collapsed operator, or the steps one by one.

    Args:
        f: a Linearizer with a time-dependent A, data on the x side, noise on the y side.
        noise: [B, ...], usually standard normal.
        steps: n; n - 1 steps of size 1 / n.
        method: "euler" or "rk4".
        one_step: collapse the steps first. To sample often, keep ``generator(f)``.
        return_path: also return the path in data space, [steps, B, ...]; needs one_step=False.

    Raises:
        ValueError: as for ``collapse``; return_path with one_step.
    """
    _check(f)
    if return_path and one_step:
        raise ValueError("return_path needs one_step=False: one step has no path")
    with torch.no_grad():
        if one_step:
            return generator(f, steps, method)(noise)
        z = f.gy(noise).to(noise.dtype)
        path = [z]
        z = _step_by_step(f, z, steps, method, path.append if return_path else None)
        y = f.gx_inverse(z)
        return (y, torch.stack([f.gx_inverse(z) for z in path])) if return_path else y


@annotate
def invert(f: Linearizer, y: Tensor, steps: int = 100, method: str = "rk4") -> Tensor:
    """The noise that ``sample`` turns into y: g_y^{-1}(B^{-1} g_x(y)).

    Raises:
        ValueError: as for ``collapse``; B without an inverse.
    """
    with torch.no_grad():
        return generator(f, steps, method).inverse(y)


@outside_autocast
def _step_by_step(
    f: Linearizer, z: Tensor, steps: int, method: str, on_step: Callable[[Tensor], None] | None
) -> Tensor:
    """In z's dtype: a hundred small increments are lost in bf16."""
    return integrate(lambda z, t: f.A(z, t=t), z, steps, method, on_step)


def _check(f: Linearizer) -> None:
    if not isinstance(f, Linearizer):
        raise TypeError(f"f must be a Linearizer; got {type(f).__name__}")
    check_time_dependent(f.A)
