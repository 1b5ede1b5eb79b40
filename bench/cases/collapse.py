"""All sampling steps collapsed into one operator: by low-rank factors, and by products of N x N matrices."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

import linfast as lf
from linfast.operators import LatentOperator

from ..harness import Case, Cost, Options, Problem, Provider, Size
from .common import grid, ints

_MOST_DENSE = 4096


def _build(size: Size, options: Options) -> Problem:
    """B z for standard normal z, where B is the operator of all Runge-Kutta steps.

    "dense" forms the exact matrix of each step and multiplies them: one N x N product per step. The reference
    repository needs as many, but forms its matrices without products, by a formula that is not exact. For large N
    "dense" is left out: docs/measurements.md says how long its products would take.
    """
    batch, n, rank, steps = ints(size, "batch", "N", "r", "steps")
    torch.manual_seed(0)
    A = lf.TimeLowRank(n, rank).to(options.device).requires_grad_(False)
    wide, width = deepcopy(A).double(), (2 * steps - 1) * rank
    dense = (lambda z: z @ _dense(A, steps)) if n <= _MOST_DENSE else None
    rivals = [] if dense is None else [Provider("dense", dense, baseline=True)]
    return Problem(
        inputs=[(torch.randn(batch, n).to(options.device),) for _ in range(3)],
        truth=lambda z: _step_by_step(wide, z, steps),
        reference=dense or (lambda z: _step_by_step(A, z, steps)),
        providers=[*rivals, Provider("factored", lambda z: lf.collapse(A, steps)(z), baseline=not rivals)],
        # Read the factors of all times and compute their Gram matrix; read and write z, and apply B's factors.
        cost=Cost(8 * (n * width + batch * n), 2 * n * width * width + 4 * batch * n * width),
    )


def _step_by_step(A: LatentOperator, z: Tensor, steps: int) -> Tensor:
    """z [B, N] after RK4 with the paper's stop rule, stage by stage."""
    for i in range(steps - 1):
        z = _rk4_step(A, z, i / steps, 1.0 / steps)
    return z


def _rk4_step(A: LatentOperator, z: Tensor, t: float, h: float) -> Tensor:
    """One step of size h from time t."""

    def v(z: Tensor, t: float) -> Tensor:
        return (A(z, t=t) - z) / (1 - t)

    k1 = v(z, t)
    k2 = v(z + h / 2 * k1, t + h / 2)
    k3 = v(z + h / 2 * k2, t + h / 2)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + v(z + h * k3, t + h))


def _dense(A: LatentOperator, steps: int) -> Tensor:
    """B^T [N, N]: applying a step to the unit vectors gives the transpose of its matrix."""
    eye = torch.eye(A.n_in, device=next(A.parameters()).device)
    B = eye
    for i in range(steps - 1):
        B = B @ _rk4_step(A, eye, i / steps, 1.0 / steps)
    return B


_BASE: Size = {"N": 1024, "batch": 16, "r": 8, "steps": 100}
CASES = [
    Case(
        "collapse",
        _build,
        sizes={
            "tiny": [{"N": 16, "batch": 2, "r": 2, "steps": 4}],
            "quick": [{**_BASE, "N": 128, "steps": 20}],
            "gpu": grid(_BASE, N=(1024, 4096)),
            "full": [*grid(_BASE, N=(256, 1024), steps=(10, 100)), {**_BASE, "N": 12288}],
        },
    )
]
