"""collapse: all sampling steps as one operator B, exactly.

Every Runge-Kutta step of the latent flow is linear in z, so the composition of all steps is a matrix B.
It is composed stage by stage, without approximation: B z equals the multi-step sampler's result up to
rounding. There are two ways to compute B:

    A_t = alpha I + U_t V_t^T    from ``A_t.factors_at(times)``, see ``factored``
    any other A_t                by applying the steps to the N unit vectors, in float64

Let R be the number of columns of U_t over all distinct times: r (2 count + 1) for count steps of rk4.
Then B = beta I + P Q^T, where P and Q have R columns. A product with P and Q takes 2 N R multiply-adds per
sample, one with a matrix takes N^2, so B is LowRank where 2 R < N, and Dense otherwise.
"""

from __future__ import annotations

import copy
import math
import types
from inspect import getclosurevars
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import check_number
from ..dispatch import has_values, uploaded, without_autocast
from ..operators.base import LatentOperator
from ..operators.dense import Dense, Leaf
from ..operators.low_rank import LowRank
from ..ranges import range_
from .factored import (
    Factors,
    fold_dense,
    fold_factored,
    multiply_pairs,
    range_within,
    step_pieces,
    weighted_columns,
)
from .integrate import Schedule, integrate, schedule

_Module = TypeVar("_Module", bound=nn.Module)

# Products of factors [R, N] are computed in float64 where they take at most this many operations
# (about 30 ms on one CPU core), otherwise in the parameters' dtype. In float64 only the result is
# rounded; float32 adds the rounding of about R / 128 partial sums, as multi-step sampling does.
_WIDE_FLOPS = 1e9


def collapse(
    A_t: LatentOperator,
    steps: int = 100,
    method: str = "rk4",
    stop: float | None = None,
    tol: float | None = None,
) -> LatentOperator:
    """The operator B with B z = z after all steps of the sampler; differentiable in A_t's parameters.

    B is computed from a copy of A_t in eval mode, so that A_t itself is never changed, not even by an error.

    Args:
        A_t: a square, time-dependent operator.
        steps: n; see ``stop``.
        method: "euler", "midpoint", "heun" or "rk4".
        stop: None for n - 1 steps of size 1 / n (the paper's rule), or the time T in (0, 1]
            that n steps of size T / n reach. T = 1 with euler and midpoint only.
        tol: None, or the relative error allowed: the result is then B' = beta I + P Q^T of the least rank
            found with |B' - B|_F <= tol |B|_F, if B' is cheaper than B. Its ``truncation_error`` is
            |B' - B|_F / |B|_F, and no gradient flows through P.

    Raises:
        ValueError: A_t does not depend on time or is not square, an unknown method, steps < 2,
            a stop or tol out of range.
    """
    with range_("collapse"):
        check_time_dependent(A_t)
        plan = schedule(method, steps, stop)
        like = first_floating(A_t)
        _check_tol(tol, like)
        return without_autocast(like.device.type, _collapse, A_t, plan, tol, like)


def collapse_inverse(A_t: LatentOperator, plan: Schedule) -> LatentOperator:
    """B^{-1} in float64, by the Woodbury formula where B is LowRank.

    Its entries reach the number of steps and more: in float32 the relative error of the noise would grow as much.
    """
    like = first_floating(A_t).double()
    return without_autocast(like.device.type, _collapse, A_t, plan, None, like)._inverse_of(A_t, plan)


def _collapse(A_t: LatentOperator, plan: Schedule, tol: float | None, like: Tensor) -> Leaf:
    """B on the device and in the dtype of ``like``."""
    columns = A_t._factor_columns(len(plan.times))
    if columns is None:
        return _finish(_step_unit_vectors(A_t, plan), 0.0, tol, like)
    factors = _factors(A_t, columns, plan)
    pieces = multiply_pairs(factors, *step_pieces(factors, plan))
    if 2 * factors.U.shape[0] < A_t.n_in:
        beta, Q = fold_factored(factors, pieces)
        return _finish_factored(beta, factors.U, Q, tol, like)
    beta = math.prod(piece.scale for piece in pieces)
    return _finish(fold_dense(factors, pieces), beta, tol, like)


def check_time_dependent(A_t: object, name: str = "A_t") -> None:
    """ValueError unless A_t is a square operator that depends on time."""
    if not isinstance(A_t, LatentOperator) or not A_t.time_dependent:
        raise ValueError(f"{name} must be a time-dependent operator, such as TimeLowRank; got {type(A_t).__name__}")
    if A_t.n_out != A_t.n_in:
        raise ValueError(f"{name} must be square: it maps latents to latents; got {A_t.n_out} x {A_t.n_in}")


def first_floating(module: nn.Module) -> Tensor:
    """The module's first floating-point tensor, for its device and dtype; an empty one where it has none."""
    own = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in own if tensor.is_floating_point()), torch.empty(0))


def _check_tol(tol: float | None, like: Tensor) -> None:
    eps = torch.finfo(like.dtype).eps
    if tol is not None and not eps <= check_number("tol", tol) < 1:
        raise ValueError(f"tol must be below 1 and at least {eps:.1e}, {like.dtype}'s eps; got {tol}")
    if tol is not None and not has_values(like):
        raise ValueError("tol must be None for an operator without values, as on the meta device")


def _factors(A: Any, columns: int, plan: Schedule) -> Factors:
    """The factors at all times as rows [R, N], from one call of A's networks."""
    scheme, n, like = plan.scheme, A.n_in, first_floating(A)
    flops = 4.0 * n * columns * min(n, columns)
    dtype = torch.float64 if flops <= _WIDE_FLOPS else like.dtype
    alpha, U, V, weights = _copy_of(A, dtype).factors_at(uploaded(plan.times, like.device, torch.float64))
    rank = U.shape[-1]
    if weights is not None:  # all times share U and V
        stages = [[plan.index(i, s) for s in range(len(scheme.c))] for i in range(plan.count)]
        return Factors(alpha, U.mT, V.mT, weights[uploaded(stages, like.device)], shift=0, width=rank)
    picks = uploaded(torch.eye(len(scheme.nodes), dtype=torch.float64)[list(scheme.node_of)], like.device)
    weights = picks.repeat_interleave(rank, dim=1).expand(plan.count, -1, -1)
    rows = [factor.mT.reshape(-1, n) for factor in (U, V)]
    return Factors(alpha, rows[0], rows[1], weights, shift=scheme.stride * rank, width=weights.shape[-1])


def _step_unit_vectors(A_t: LatentOperator, plan: Schedule) -> Tensor:
    """B [N, N] in float64, from the steps of the unit vectors."""
    eye = torch.eye(A_t.n_in, dtype=torch.float64, device=first_floating(A_t).device)
    wide = _copy_of(A_t, torch.float64)
    return integrate(lambda z, k: wide(z, plan.times[k]), eye, plan).mT


def _finish_factored(beta: float, U: Tensor, Q: Tensor, tol: float | None, like: Tensor) -> Leaf:
    """beta I + U^T Q, truncated where ``tol`` is given."""
    if tol is not None:
        with torch.no_grad():
            Y = weighted_columns(U, Q)
            # |beta I + U^T Q|_F, from the trace and the norm of U^T Q.
            size = (U.shape[1] * beta * beta + 2 * beta * float((U * Q).sum()) + float(Y.norm()) ** 2) ** 0.5
            found = range_within(Y, tol * size, widest=U.shape[0] - 1)
        if found is not None:
            L = found[0].to(U.dtype)
            return _truncated(beta, L, Q.mT @ (U @ L), found[1] / size, like)
    return LowRank(beta, _plain(U.mT, like), _plain(Q.mT, like))


def _finish(B: Tensor, beta: float, tol: float | None, like: Tensor) -> Leaf:
    """B [N, N] as Dense, or truncated where ``tol`` is given: B - beta I is then replaced by one of lower rank."""
    if tol is not None:
        A = B - beta * torch.eye(len(B), dtype=B.dtype, device=B.device)
        with torch.no_grad():
            size = float(B.double().norm())
            found = range_within(A.double(), tol * size, widest=(len(B) - 1) // 2)
        if found is not None:
            L = found[0].to(B.dtype)
            return _truncated(beta, L, A.mT @ L, found[1] / size, like)
    return Dense.of(_plain(B, like))


def _truncated(beta: float, U: Tensor, V: Tensor, error: float, like: Tensor) -> Leaf:
    operator = LowRank(beta, _plain(U, like), _plain(V, like))
    operator.truncation_error = error
    return operator


def _plain(value: Tensor, like: Tensor) -> Tensor:
    """A contiguous copy in the dtype of ``like``. It has the layout of a loaded file, so that products with both
    give the same bits."""
    return value.to(like.dtype).clone(memory_format=torch.contiguous_format)


# Copies in eval mode, for samplers. The caller's modules are never switched to eval mode or given other tensors,
# not even for a moment: another thread may be training them, and after an error nothing has to be restored.


def in_eval_mode(model: _Module) -> _Module:
    """The model itself where all its modules are in eval mode, else a copy in eval mode that shares its tensors."""
    check_initialised(model)
    return _copy_of(model) if any(module.training for module in model.modules()) else model


def check_initialised(model: nn.Module) -> None:
    """ValueError where a module creates its tensors at its first call: a sampler must not change the model."""
    for name, module in model.named_modules():
        if any(map(is_lazy, chain(module.parameters(recurse=False), module.buffers(recurse=False)))):
            raise ValueError(f"{name} ({type(module).__name__}) is not initialised: call the model once first")


def _copy_of(model: _Module, dtype: torch.dtype | None = None) -> _Module:
    """A copy of the model's modules in eval mode, which shares the model's tensors.

    With a dtype, the copy has the floating-point tensors converted to it, differentiably.

    Raises:
        ValueError: an attribute that cannot be copied, such as a lock, or a function that refers to a module.
    """
    attributes = chain.from_iterable(list(vars(module).values()) for module in model.modules())
    memo: dict[int, Any] = {id(value): value for value in attributes if isinstance(value, Tensor)}
    for tensor in chain(model.parameters(), model.buffers()):
        memo[id(tensor)] = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        kind = type(model).__name__
        raise ValueError(
            f"samplers need a copy of the {kind} in eval mode, which cannot be made ({error}): call f.eval() first"
        ) from error
    # Only the memo has modules in plain attributes, and only modules() those inside a TorchScript module.
    for module in {*copied.modules(), *(part for part in memo.values() if isinstance(part, nn.Module))}:
        module.training = False
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType) and any(
                map(_is_of_module, getclosurevars(value).nonlocals.values())
            ):
                raise ValueError(
                    f"{name} of a {type(module).__name__} is a function that refers to a module, and a copy of the "
                    "model in eval mode would call the original: call f.eval() first"
                )
    return copied


def _is_of_module(value: object) -> bool:
    return isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module)
