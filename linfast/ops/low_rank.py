"""Low-rank product y = alpha x + U (V^T x): O(N r) operations per sample, without an N x N matrix.

| U, V                            | runs                                                                       |
|---------------------------------|----------------------------------------------------------------------------|
| both shared by the batch        | (x @ V) @ U^T, two products of cuBLAS or MKL: no kernel of ours is faster  |
| one or both per sample          | on a GPU linfast.kernels.low_rank, fused                                   |
| on a CPU, float64, mixed dtypes | plain torch, the same order of products                                    |

The kernel adds alpha x for a number alpha. For a tensor alpha plain torch adds it: to read its value the host would
have to wait for the GPU. That extra pass over x and y moves 3 / (2 r + 2) of the bytes that the kernel moves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_factor, check_tensor
from ..dispatch import uses_triton
from .register import define_op

_SHORTEST_PART = 256  # terms of a partial sum over N


def low_rank(x: Tensor, U: Tensor, V: Tensor, alpha: float | Tensor = 0.0) -> Tensor:
    """y_b = alpha x_b + U_b (V_b^T x_b).

    Args:
        x: [B, N].
        U: [M, r] or [B, M, r]; M = N unless alpha is the number 0.
        V: [N, r] or [B, N, r].
        alpha: a number or a 0-d tensor.

    Sums are in fp32 or wider; y [B, M] has x's dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit together.
    """
    _check(x, U, V, alpha)
    number = 0.0 if isinstance(alpha, Tensor) else float(alpha)
    shared = U.ndim == V.ndim == 2
    if not shared and x.dtype == U.dtype == V.dtype and uses_triton(x, U, V):
        y, _ = _low_rank(x, U, V, number)
    else:
        y = low_rank_reference(x, U, V, number)
    return alpha * x + y if isinstance(alpha, Tensor) else y


def low_rank_reference(x: Tensor, U: Tensor, V: Tensor, alpha: float = 0.0) -> Tensor:
    """``low_rank`` in plain torch."""
    if not x.dtype == U.dtype == V.dtype:
        wide = torch.promote_types(torch.promote_types(x.dtype, U.dtype), V.dtype)
        return low_rank_reference(x.to(wide), U.to(wide), V.to(wide), alpha).to(x.dtype)
    y = _expand(_project(x, V), U)
    return y if alpha == 0 else alpha * x + y


def _project(x: Tensor, V: Tensor) -> Tensor:
    """V^T x, [B, r]."""
    if V.ndim == 2:
        return x @ V
    parts = _parts(V)
    if parts == 1:
        return torch.einsum("bn,bnr->br", x, V)
    return torch.einsum("bkn,bknr->bkr", x.unflatten(1, (parts, -1)), V.unflatten(1, (parts, -1))).sum(1)


def _expand(t: Tensor, U: Tensor) -> Tensor:
    """U t, [B, M]."""
    if U.ndim == 2:
        return t @ U.mT
    parts = _parts(U)
    if parts == 1:
        return torch.einsum("br,bnr->bn", t, U)
    rows = t.unsqueeze(1).expand(-1, parts, -1)
    return torch.einsum("bkr,bknr->bkn", rows, U.unflatten(1, (parts, -1))).flatten(1)


def _parts(factor: Tensor) -> int:
    """The number of partial sums into which a sum over N is split, here and in autograd's backward.

    A batched product adds the terms one after another. At N = 12288 its error is 2e-6; in partial sums of 384 terms
    it is 3e-7, in the same time forward and 1.25 times the time with the backward. In half precision the sum is not
    split, because each partial sum would be rounded.
    """
    longest = factor.shape[1] // _SHORTEST_PART if factor.element_size() >= 4 else 0
    return math.gcd(factor.shape[1], 1 << (longest.bit_length() - 1)) if longest > 1 else 1


def _raw_reference(x: Tensor, U: Tensor, V: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    t = _project(x, V)
    y = _expand(t, U)
    return (y if alpha == 0 else alpha * x + y), t.to(torch.promote_types(t.dtype, torch.float32), copy=True)


def _fake(x: Tensor, U: Tensor, V: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], U.shape[-2]), x.new_empty(x.shape[0], V.shape[-1], dtype=compute)


_low_rank = define_op(
    "low_rank(Tensor x, Tensor U, Tensor V, float alpha) -> (Tensor y, Tensor t)",
    _fake,
    _raw_reference,
    saves="x U V t",
)


def _check(x: Tensor, U: Tensor, V: Tensor, alpha: float | Tensor) -> None:
    check_tensor("x", x)
    check_factor("alpha", alpha, x)
    if x.ndim != 2:
        raise ValueError(f"x must be [B, N]; got {tuple(x.shape)}")
    for name, factor in (("U", U), ("V", V)):
        check_tensor(name, factor, x)
        if factor.ndim not in (2, 3) or (factor.ndim == 3 and factor.shape[0] != x.shape[0]):
            raise ValueError(
                f"{name} must be [N, r] or [{x.shape[0]}, N, r] for x {tuple(x.shape)}; got {tuple(factor.shape)}"
            )
    if V.shape[-2] != x.shape[1]:
        raise ValueError(f"V must have N = {x.shape[1]} rows for x {tuple(x.shape)}; got {tuple(V.shape)}")
    if U.shape[-1] != V.shape[-1]:
        raise ValueError(f"U and V must have the same rank r; got U {tuple(U.shape)}, V {tuple(V.shape)}")
    plain = isinstance(alpha, (int, float)) and alpha == 0
    if not plain and U.shape[-2] != V.shape[-2]:
        raise ValueError(
            f"alpha must be 0 unless U and V have as many rows; got U {tuple(U.shape)}, V {tuple(V.shape)}"
        )
