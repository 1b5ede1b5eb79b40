"""collapse: all sampling steps as one operator B, exactly.

Every Runge-Kutta step of the latent flow is linear in z, so their composition is a matrix B:
the same arithmetic as the multi-step sampler, stage by stage, so that one product with B gives
what the steps give. Two routes:

    A_t = alpha I + U_t V_t^T    by ``A_t.factors_at(times)``, see ``factored``
    any other A_t                the n unit vectors stepped at once, in float64

With R columns in all the factors together, R = r (2 steps - 1) for rk4, B = beta I + P Q^T has
rank R at most. A product with it reads and multiplies 2 N R numbers per sample, with a matrix N^2:
B is LowRank where 2 R < N and Dense elsewhere.
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

# Sides N and R are multiplied in float64 where that takes at most this many operations, some
# 30 ms on one CPU core, and in the parameters' dtype beyond. float64 leaves one rounding of the
# result; float32 adds the rounding of about R / 128 partial sums, as the steps themselves would.
_WIDE_FLOPS = 1e9


def collapse(
    A_t: LatentOperator,
    steps: int = 100,
    method: str = "rk4",
    stop: float | None = None,
    tol: float | None = None,
) -> LatentOperator:
    """B with B z = the sampler's z after all steps; differentiable in A_t's parameters.

    A_t is collapsed as it is in eval mode, on a copy: it is left as it was at any moment, whatever fails.

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
    with range_("collapse"):
        check_time_dependent(A_t)
        plan = schedule(method, steps, stop)
        like = first_floating(A_t)
        _check_tol(tol, like)
        return without_autocast(like.device.type, _collapse, A_t, plan, tol, like)


def collapse_inverse(A_t: LatentOperator, plan: Schedule) -> LatentOperator:
    """B^{-1} in float64, by Woodbury where B is low-rank.

    Rounded to float32 its entries, the size of steps and more, would cost as many digits of the noise.
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
    """Raise unless this is an operator that depends on time."""
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
    """All factors from one call of the generator, as rows [R, N]."""
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
    """B [N, N], float64."""
    eye = torch.eye(A_t.n_in, dtype=torch.float64, device=first_floating(A_t).device)
    wide = _copy_of(A_t, torch.float64)
    return integrate(lambda z, k: wide(z, plan.times[k]), eye, plan).mT


def _finish_factored(beta: float, U: Tensor, Q: Tensor, tol: float | None, like: Tensor) -> Leaf:
    """beta I + U^T Q, recompressed where asked."""
    if tol is not None:
        with torch.no_grad():
            Y = weighted_columns(U, Q)
            # |beta I + A|_F of an A of this trace and norm.
            size = (U.shape[1] * beta * beta + 2 * beta * float((U * Q).sum()) + float(Y.norm()) ** 2) ** 0.5
            found = range_within(Y, tol * size, widest=U.shape[0] - 1)
        if found is not None:
            L = found[0].to(U.dtype)
            return _truncated(beta, L, Q.mT @ (U @ L), found[1] / size, like)
    return LowRank(beta, _plain(U.mT, like), _plain(Q.mT, like))


def _finish(B: Tensor, beta: float, tol: float | None, like: Tensor) -> Leaf:
    """B [N, N] as it is, or recompressed where asked. beta: the identity's share, where known."""
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
    """In the dtype of ``like``, in memory of its own and row by row: as its saved copy lies, to the last bit of
    a product."""
    return value.to(like.dtype).clone(memory_format=torch.contiguous_format)


# What samplers work on. The caller's own modules are never switched to eval mode or given other tensors, not even
# for a moment: another thread may be training them, and whatever fails in between has nothing to put back.


def in_eval_mode(model: _Module) -> _Module:
    """The model itself where it is in eval mode with all its parts, else a copy that is, of the same tensors."""
    check_initialised(model)
    return _copy_of(model) if any(module.training for module in model.modules()) else model


def check_initialised(model: nn.Module) -> None:
    """ValueError where a part gets its tensors from its first call: a sampler's would change the caller's model."""
    for name, module in model.named_modules():
        if any(map(is_lazy, chain(module.parameters(recurse=False), module.buffers(recurse=False)))):
            raise ValueError(f"{name} ({type(module).__name__}) is not initialised: call the model once first")


def _copy_of(model: _Module, dtype: torch.dtype | None = None) -> _Module:
    """The model's structure copied and in eval mode, with the model's own tensors.

    Where a dtype is given, the copy's floating-point tensors are in it; gradients reach the model's.

    Raises:
        ValueError: a part that cannot be copied, such as a lock, or a function that refers to a module by itself.
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
            f"samplers work on a copy of the {kind}, in eval mode, and it has none ({error}): call f.eval() first"
        ) from error
    # Those in plain attributes are in the memo alone, what a TorchScript module consists of in modules() alone.
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
