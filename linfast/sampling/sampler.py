"""sample and invert: noise to data and back, through f = g_y^{-1} A_t g_x.

Data lie on the x side and noise on the y side:

    sample  y = g_x^{-1}(B g_y(noise))        invert  noise = g_y^{-1}(B^{-1} g_x(y))

B is all the steps of the latent flow (``collapse``). The one-step generator is
itself a Linearizer, with core B: Linearizer(f.g_y, B, f.g_x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_dense, check_flag, check_kind, said_of
from ..dispatch import outside_autocast
from ..freeze import freeze
from ..linearizer import Linearizer
from ..ranges import range_
from .collapsed import check_initialised, check_time_dependent, collapse, collapse_inverse, in_eval_mode
from .integrate import Schedule, integrate, schedule


@contextmanager
def at_work(model: nn.Module) -> Iterator[None]:
    """What every sampler does its work in: no gradients, derived weights once."""
    with torch.no_grad(), freeze(model):
        yield


def generator(
    f: Linearizer, steps: int = 100, method: str = "rk4", stop: float | None = None, tol: float | None = None
) -> Linearizer:
    """The one-step generator, noise to data: a Linearizer whose core is ``collapse(f.A, ...)``.

    Its g_x and g_y are f's own. It is in train mode where f is, and there dropout drops and a new ActNorm starts
    with its first noise: call f.eval() first, or use ``sample``.

    Raises:
        ValueError: as for ``collapse``; g_x or g_y that is not initialised.
    """
    with range_("generator"):
        check_over_time(f)
        for g in (f.g_x, f.g_y):
            check_initialised(g)
        one = Linearizer(f.g_y, collapse(f.A, steps, method, stop, tol), f.g_x)
        one.A.train(f.training)
        one.training = f.training
        return one


def sample(
    f: Linearizer,
    noise: Tensor,
    steps: int = 100,
    method: str = "rk4",
    one_step: bool = True,
    return_path: bool = False,
    stop: float | None = None,
) -> Any:
    """Data from noise: one product with the collapsed operator, or the steps one by one; f as in eval mode.

    Args:
        f: a Linearizer with a time-dependent A, data on the x side, noise on the y side.
        noise: [B, ...], usually standard normal.
        steps, method, stop: as for ``collapse``.
        one_step: collapse the steps first. To sample often, keep ``generator(f)``.
        return_path: also return the path in data space, [1 + number of steps, B, ...], from
            the noise's latents to the sample, as (data, path); needs one_step=False.

    Raises:
        ValueError: as for ``collapse``; return_path with one_step.
    """
    with range_("sample"):
        check_over_time(f)
        plan = schedule(method, steps, stop)
        check_dense("noise", noise)
        check_flag("one_step", one_step)
        check_flag("return_path", return_path)
        if return_path and one_step:
            raise ValueError("return_path needs one_step=False: one step has no path")
        f = in_eval_mode(f)
        with at_work(f):
            if one_step:
                return said_of("noise", generator(f, steps, method, stop), noise)
            z = said_of("noise", f.gy, noise).to(noise.dtype)
            path = [z]
            z = _step_by_step(f, z, plan, path.append if return_path else None)
            y = f.gx_inverse(z)
            return (y, torch.stack([f.gx_inverse(z) for z in path])) if return_path else y


def invert(f: Linearizer, y: Tensor, steps: int = 100, method: str = "rk4", stop: float | None = None) -> Tensor:
    """The noise that ``sample`` turns into y: g_y^{-1}(B^{-1} g_x(y)), B^{-1} exact and in float64.

    f computes as in eval mode.

    Raises:
        ValueError: as for ``collapse``; B without an inverse.
    """
    with range_("invert"):
        check_over_time(f)
        plan = schedule(method, steps, stop)
        A, f = f.A, in_eval_mode(f)
        with at_work(f):
            z = said_of("y", f.gx, y)
            return f.gy_inverse(collapse_inverse(A, plan)(z.double()).to(z.dtype))


@outside_autocast
def _step_by_step(f: Linearizer, z: Tensor, plan: Schedule, on_step: Callable[[Tensor], None] | None) -> Tensor:
    """In z's dtype: a hundred small increments are lost in bf16."""
    at = f.A._at_each(plan.times)
    return integrate(lambda z, k: at(k)(z), z, plan, on_step)


def check_over_time(f: Linearizer) -> None:
    """Raise unless f is a Linearizer whose A depends on time."""
    check_kind("f", f, Linearizer)
    check_time_dependent(f.A, "f.A")
