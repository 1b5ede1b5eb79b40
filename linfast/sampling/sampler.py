"""sample and invert: noise to data and back, through f = g_y^{-1} A_t g_x.

Data lie on the x side and noise on the y side:

    sample  y = g_x^{-1}(B g_y(noise))        invert  noise = g_y^{-1}(B^{-1} g_x(y))

B is the operator of all steps of the latent flow (``collapse``). The one-step generator
is itself a Linearizer: Linearizer(f.g_y, B, f.g_x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_dense, check_flag, check_kind, said_of
from ..density import Density
from ..dispatch import outside_autocast
from ..flows.bijection import Bijection, Conditioned, Inverse
from ..freeze import freeze
from ..linearizer import Linearizer
from ..ranges import range_
from .collapsed import check_initialised, check_time_dependent, collapse, collapse_inverse, in_eval_mode
from .integrate import Schedule, integrate, schedule


@contextmanager
def at_work(model: nn.Module) -> Iterator[None]:
    """The context in which samplers evaluate a model: without gradients, and frozen (``freeze``)."""
    with torch.no_grad(), freeze(model):
        yield


def generator(
    f: Linearizer, steps: int = 100, method: str = "rk4", stop: float | None = None, tol: float | None = None
) -> Linearizer:
    """The one-step generator from noise to data, a Linearizer whose A is ``collapse(f.A, ...)``.

    Args:
        f: a Linearizer with a time-dependent A, data on the x side, noise on the y side.
        steps, method, stop, tol: as for ``collapse``.

    It shares f's g_x and g_y. Where f is in train mode, so is the generator: dropout is active, and a new ActNorm
    is initialised by the first noise. Call f.eval() first, or use ``sample``.

    Raises:
        ValueError: as for ``collapse``; g_x or g_y is not initialised.

    Examples:
        >>> g = lf.coupling_flow(8, time_features=16)
        >>> f = lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(8, rank=2), g.at(t=0.0))
        >>> one = lf.generator(f)
        >>> one(torch.randn(5, 8)).shape
        torch.Size([5, 8])
    """
    with range_("generator"):
        check_over_time(f)
        for g in (f.g_x, f.g_y):
            check_initialised(g)
        one = Linearizer(f.g_y, collapse(f.A, steps, method, stop, tol), f.g_x)
        one.A.train(f.training)
        one.training = f.training
        return one


def to_data(p: Density) -> Bijection:
    """The map of p from standard normal noise to samples; TypeError where p is not such a map."""
    if p.base is not None:
        raise TypeError(
            "f must be sampled from standard normal noise; this Density p has another base: use p.sample"
        )
    if p.embedding is not None or context_of(p.flow):
        raise TypeError(
            "f must take no context, and this Density p takes one: pass lf.Inverse(p.flow.at(context=c)) with c "
            f"[1, C], and noise_shape={p.shape}"
        )
    return Inverse(p.flow)


def context_of(module: nn.Module) -> int:
    """C of the context [B, C] that must be passed to a module; 0 where it takes none, or one that is fixed."""
    if isinstance(module, Conditioned) and "context" in module.context:
        return 0
    return max((getattr(module, "context_features", 0), *map(context_of, module.children())))


def sample(
    f: Linearizer,
    noise: Tensor,
    steps: int = 100,
    method: str = "rk4",
    one_step: bool = True,
    return_path: bool = False,
    stop: float | None = None,
) -> Any:
    """Samples from noise: one product with the collapsed operator, or step by step. f is evaluated in eval mode.

    Args:
        f: a Linearizer with a time-dependent A, data on the x side, noise on the y side.
        noise: [B, ...], usually standard normal.
        steps, method, stop: as for ``collapse``.
        one_step: collapse the steps first. To sample often, keep ``generator(f)``.
        return_path: return (samples, path), where path [1 + number of steps, B, ...] is g_x^{-1} of
            the latents before the first step and after each step; needs one_step=False.

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
    """The noise [B, ...] from which ``sample`` makes y [B, ...]: g_y^{-1}(B^{-1} g_x(y)), with B^{-1} in float64.

    f is evaluated in eval mode. ``steps``, ``method`` and ``stop`` are as for ``collapse``.

    Raises:
        ValueError: as for ``collapse``; B is singular.
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
    """z after all steps, without autocast: in bf16 the small increments of many steps are lost."""
    at = f.A._at_each(plan.times)
    return integrate(lambda z, k: at(k)(z), z, plan, on_step)


def check_over_time(f: Linearizer) -> None:
    """TypeError unless f is a Linearizer, ValueError unless its A is square and depends on time."""
    if isinstance(f, (Bijection, Density)):
        how = "a flow is sampled by lf.Density(flow)." if isinstance(f, Bijection) else "call its own "
        raise TypeError(f"f must be a Linearizer; got {type(f).__name__}: {how}sample(n)")
    check_kind("f", f, Linearizer)
    check_time_dependent(f.A, "f.A")
