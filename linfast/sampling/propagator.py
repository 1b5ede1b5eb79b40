"""collapse: all sampling steps as one operator B, exactly.

Every Runge-Kutta step of the latent flow is linear in z, so their composition is a
matrix B. It is computed here by stepping the n unit vectors at once, in float64: the
same arithmetic as the multi-step sampler, stage by stage, so that one product with B
gives what the steps give. Cost: (stages) (steps) products of A_t with an n x n matrix.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor
from torch.func import functional_call

from ..operators.base import LatentOperator
from ..operators.dense import Dense
from ..profiling import annotate
from .integrate import integrate, tableau

__all__ = ["collapse"]


@annotate
def collapse(A_t: LatentOperator, steps: int = 100, method: str = "rk4") -> LatentOperator:
    """B with B z = the sampler's z after ``steps`` - 1 steps; differentiable in A_t's parameters.

    Args:
        A_t: a time-dependent operator.
        steps: n; n - 1 steps of size 1 / n from t = 0.
        method: "euler" or "rk4".

    Raises:
        ValueError: A_t does not depend on time or is not square, an unknown method, or steps < 2.
    """
    check_time_dependent(A_t)
    tableau(method, steps)
    like = next(A_t.parameters())
    wide = {name: value.double() for name, value in _floating_state(A_t).items()}

    def apply(z: Tensor, t: float) -> Tensor:
        return functional_call(A_t, wide, (z, t), tie_weights=False)

    columns = integrate(apply, torch.eye(A_t.n_in, dtype=torch.float64, device=like.device), steps, method)
    return Dense.of(columns.mT.to(like.dtype).contiguous())


def check_time_dependent(A_t: object) -> None:
    """Raise unless this is an operator that depends on time."""
    if not isinstance(A_t, LatentOperator) or not A_t.time_dependent:
        raise ValueError(f"A_t must be a time-dependent operator, such as TimeLowRank; got {type(A_t).__name__}")
    if A_t.n_out != A_t.n_in:
        raise ValueError(f"A_t must be square: it maps latents to latents; got {A_t.n_out} x {A_t.n_in}")


def _floating_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Each tensor under one name for each module that owns it: given a shared module's second name,
    functional_call would leave its copies behind."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, owner in module.named_modules()
        for name, value in chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
        if value.is_floating_point()
    }
