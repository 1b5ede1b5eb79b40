"""collapse: all sampling steps as one operator B, exactly.

Every Runge-Kutta step of the latent flow is linear in z, so their composition is a matrix B:
the same arithmetic as the multi-step sampler, stage by stage, so that one product with B gives
what the steps give. Two routes:

    A_t = alpha I + U_t V_t^T         (TimeLowRank, TimeDiagonal) by its factors, see ``factored``
    any other time-dependent A_t      the n unit vectors stepped at once, in float64

With R columns in all the factors together, R = r (2 steps - 1) for rk4, B = beta I + P Q^T has
rank R at most. A product with it reads and multiplies 2 N R numbers a sample, with a matrix N^2:
B is LowRank where 2 R < N and Dense elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checks import check_number
from ..device import uploaded
from ..operators.base import LatentOperator, Leaf
from ..operators.dense import Dense
from ..operators.low_rank import LowRank
from ..operators.time_diagonal import TimeDiagonal
from ..operators.time_low_rank import TimeLowRank
from ..profiling import annotate
from .factored import Factors, fold_dense, fold_factored, multiply_pairs, step_pieces
from .integrate import Schedule, integrate, schedule
from .recompress import range_within, weighted_columns

__all__ = ["check_time_dependent", "collapse", "collapse_inverse"]

_Result = TypeVar("_Result")

# Sides N and R are multiplied in float64 where that takes at most this many operations, some
# 30 ms on one CPU core, and in the parameters' dtype beyond. float64 leaves one rounding of the
# result; float32 adds the rounding of about R / 128 partial sums, as the steps themselves would.
_WIDE_FLOPS = 1e9


@annotate
def collapse(
    A_t: LatentOperator,
    steps: int = 100,
    method: str = "rk4",
    stop: float | None = None,
    tol: float | None = None,
) -> LatentOperator:
    """B with B z = the sampler's z after all steps; differentiable in A_t's parameters.

    Args:
        A_t: a time-dependent operator.
        steps: n; see ``stop``.
        method: "euler", "midpoint", "heun" or "rk4".
        stop: None for n - 1 steps of size 1 / n (the paper's rule), or the time T in (0, 1]
            that n steps of size T / n reach. T = 1 with euler and midpoint only.
        tol: where given, B is replaced by beta I + P Q^T of the least rank found for which
            |B' - B|_F <= tol |B|_F, if that is cheaper; the error is ``B.truncation_error``.
            P is a constant to the gradient.

    Raises:
        ValueError: A_t does not depend on time or is not square, an unknown method, steps < 2,
            a stop or tol out of range.
    """
    check_time_dependent(A_t)
    plan = schedule(method, steps, stop)
    like = next(A_t.parameters())
    _check_tol(tol, like.dtype)
    return _collapse(A_t, plan, tol, like)


def collapse_inverse(A_t: LatentOperator, plan: Schedule) -> LatentOperator:
    """B^{-1} in float64, by Woodbury where B is low-rank.

    Rounded to float32 its entries, the size of steps and more, would cost as many digits of the noise.
    """
    check_time_dependent(A_t)
    like = next(A_t.parameters())
    return _collapse(A_t, plan, None, like.double())._inverse_of(A_t, plan)


def _collapse(A_t: LatentOperator, plan: Schedule, tol: float | None, like: Tensor) -> Leaf:
    """B on the device and in the dtype of ``like``."""
    with torch.autocast(like.device.type, enabled=False):
        if not isinstance(A_t, (TimeLowRank, TimeDiagonal)):
            return _finish(_step_unit_vectors(A_t, plan), 0.0, tol, like)
        factors = _factors(A_t, plan)
        pieces = multiply_pairs(factors, *step_pieces(factors, plan))
        if 2 * factors.U.shape[0] < A_t.n_in:
            beta, Q = fold_factored(factors, pieces)
            return _finish_factored(beta, factors.U, Q, tol, like)
        beta = math.prod(piece.scale for piece in pieces)
        return _finish(fold_dense(factors, pieces), beta, tol, like)


def check_time_dependent(A_t: object, name: str = "A_t") -> None:
    """Raise unless this is an operator that depends on time."""
    if not isinstance(A_t, LatentOperator) or not A_t.time_dependent:
        raise ValueError(f"{name} must be a time-dependent operator, such as TimeLowRank; got {type(A_t).__name__}")
    if A_t.n_out != A_t.n_in:
        raise ValueError(f"{name} must be square: it maps latents to latents; got {A_t.n_out} x {A_t.n_in}")


def _check_tol(tol: float | None, dtype: torch.dtype) -> None:
    if tol is not None and not torch.finfo(dtype).eps <= check_number("tol", tol) < 1:
        raise ValueError(f"tol must be below 1 and at least {torch.finfo(dtype).eps:.1e}, {dtype}'s eps; got {tol}")


def _factors(A: TimeLowRank | TimeDiagonal, plan: Schedule) -> Factors:
    """All factors from one call of the generator, as rows [R, N]."""
    scheme, n, like = plan.scheme, A.n_in, next(A.parameters())
    fixed = isinstance(A, TimeDiagonal)
    columns = A.rank_bound * (1 if fixed else len(plan.times))
    flops = 4.0 * n * columns * min(n, columns)
    dtype = torch.float64 if flops <= _WIDE_FLOPS else like.dtype
    times = uploaded(plan.times, like.device, torch.float64)
    stages = [[plan.index(i, s) for s in range(len(scheme.c))] for i in range(plan.count)]
    if isinstance(A, TimeDiagonal):
        U, V, w = _call_in(dtype, A, lambda t: (A.U, A.V, A.weights(t)), times)
        return Factors(A.alpha, U.mT, V.mT, w[uploaded(stages, w.device)], shift=0, width=A.rank_bound)
    rows = [factor.mT.reshape(-1, n) for factor in _call_in(dtype, A, A.factors, times)]
    picks = uploaded(torch.eye(len(scheme.nodes), dtype=torch.float64)[list(scheme.node_of)], like.device)
    weights = picks.repeat_interleave(A.rank_bound, dim=1).expand(plan.count, -1, -1)
    return Factors(A.alpha, rows[0], rows[1], weights, shift=scheme.stride * A.rank_bound, width=weights.shape[-1])


def _step_unit_vectors(A_t: LatentOperator, plan: Schedule) -> Tensor:
    """B [N, N], float64."""
    eye = torch.eye(A_t.n_in, dtype=torch.float64, device=next(A_t.parameters()).device)

    def apply(z: Tensor, k: int) -> Tensor:
        return _call_in(torch.float64, A_t, A_t, z, plan.times[k])

    return integrate(apply, eye, plan).mT


def _finish_factored(beta: float, U: Tensor, Q: Tensor, tol: float | None, like: Tensor) -> Leaf:
    """beta I + U^T Q, recompressed where asked."""
    if tol is not None:
        with torch.no_grad():
            Y = weighted_columns(U, Q)
            size = _frobenius(beta, U.shape[1], (U * Q).sum(), Y)
            found = range_within(Y, tol * size, widest=U.shape[0] - 1)
        if found is not None:
            L = found[0].to(U.dtype)
            return _truncated(LowRank(beta, L.to(like.dtype), (Q.mT @ (U @ L)).to(like.dtype)), found[1] / size)
    return LowRank(beta, U.mT.to(like.dtype), Q.mT.to(like.dtype))


def _finish(B: Tensor, beta: float, tol: float | None, like: Tensor) -> Leaf:
    """B [N, N] as it is, or recompressed where asked. beta: the identity's share, where known."""
    if tol is not None:
        A = B - beta * torch.eye(len(B), dtype=B.dtype, device=B.device)
        with torch.no_grad():
            size = float(B.double().norm())
            found = range_within(A.double(), tol * size, widest=(len(B) - 1) // 2)
        if found is not None:
            L = found[0].to(B.dtype)
            low_rank = LowRank(beta, L.to(like.dtype), (A.mT @ L).to(like.dtype))
            return _truncated(low_rank, found[1] / size)
    return Dense.of(B.to(like.dtype).contiguous())


def _frobenius(beta: float, n: int, trace: Tensor, A: Tensor) -> float:
    """|beta I + A|_F of an A of this trace and norm."""
    return (n * beta * beta + 2 * beta * float(trace) + float(A.norm()) ** 2) ** 0.5


def _truncated(operator: Leaf, error: float) -> Leaf:
    operator.truncation_error = error
    return operator


class _Bound(nn.Module):
    """A module whose forward is another module's method: functional_call calls forward only."""

    def __init__(self, module: nn.Module, method: Callable[..., object]) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args: object) -> object:
        return self.method(*args)


def _call_in(dtype: torch.dtype, module: nn.Module, method: Callable[..., _Result], *args: object) -> _Result:
    """method(*args) with the module's floating tensors in another dtype; gradients reach the module."""
    state = {f"module.{name}": value.to(dtype) for name, value in _floating_state(module).items()}
    return functional_call(_Bound(module, method), state, args, tie_weights=False)


def _floating_state(module: nn.Module) -> dict[str, Tensor]:
    """Each tensor under one name for each module that owns it: given a shared module's second name,
    functional_call would leave its copies behind."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, owner in module.named_modules()
        for name, value in chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
        if value.is_floating_point()
    }
