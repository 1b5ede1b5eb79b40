"""All sampling steps in one operator: by the factors, and by products of N x N matrices."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

import linfast as lf
from linfast.operators import LatentOperator

from ..harness import Case, Cost, Options, Problem, Provider, Size
from .common import grid, ints

__all__ = ["CASES"]

_MOST_DENSE = 4096  # above this N all dense products would take minutes, and a part of one is timed
_SLICE = 1024  # rows of that part


def _build(size: Size, options: Options) -> Problem:
    """B z for standard normal z, where B is all Runge-Kutta steps.

    "dense" forms the matrix of each step, exactly, and makes one N x N product per step: as many as the reference
    repository, whose formula needs no product to form it and is not exact. For large N, "1/k of dense" is the k-th
    part of those products, so that k times its time is what they would take at the least.
    """
    batch, n, rank, steps = ints(size, "batch", "N", "r", "steps")
    torch.manual_seed(0)
    A = lf.TimeLowRank(n, rank).to(options.device).requires_grad_(False)
    wide, width = deepcopy(A).double(), (2 * steps - 1) * rank
    small = n <= _MOST_DENSE
    if small:
        dense = Provider("dense", lambda z: z @ _dense(A, steps), baseline=True)
    else:
        matrix, rows = torch.randn(n, n, device=options.device), torch.randn(_SLICE, n, device=options.device)
        name = f"1/{(steps - 1) * n // _SLICE} of dense"
        dense = Provider(name, lambda z: rows @ matrix, truth=lambda z: rows.double() @ matrix.double())
    return Problem(
        inputs=[(torch.randn(batch, n).to(options.device),) for _ in range(3)],
        truth=lambda z: _step_by_step(wide, z, steps),
        reference=lambda z: z @ _dense(A, steps) if small else _step_by_step(A, z, steps),
        providers=[dense, Provider("factored", lambda z: lf.collapse(A, steps)(z), baseline=not small)],
        # The factors of all times once and their Gram matrix; z in and out, by the factors of B.
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
    """B^T [N, N]: a step of the unit vectors is the matrix of that step."""
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
            # CelebA's size comes first: nothing smaller has been timed yet by which it would be left out.
            "full": [{**_BASE, "N": 12288}, *grid(_BASE, N=(256, 1024), steps=(10, 100))],
        },
    )
]
