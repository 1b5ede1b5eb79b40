"""Low-rank product y = alpha x + U (V^T x), one pair of factors per sample (or one of the two shared).

x [B, N], V [B, N, r], U [B, M, r], y [B, M]; M = N unless alpha is 0. With t = V^T x [B, r],
g = dL/dy, h = dL/dt (zero unless t itself is differentiated) and s = U^T g + h [B, r]:

    y = alpha x + U t       dx = alpha g + V s       dU = g t^T       dV = x s^T

so that only t is saved besides the inputs. Bytes in fp32 per sample, forward: 4 (N + N r + M r + M), and x again
where alpha is not 0; the backward reads U, g, V, x and g again, and writes dx, dU and dV.

A sum over N is split: a program sums the tiles of its split in fp32 and writes a partial sum [r], and the programs
that read t add these in a fixed order: no atomics, the same bits every time. The splits depend only on N and r, so
that the bits of a sample do not depend on the batch.

Two kernels make either direction: ``_project_kernel`` for V^T x and U^T g, then ``_expand_kernel`` for y or
``_low_rank_backward_kernel`` for all three gradients. A shared factor is read with batch stride 0, from L2; its
gradient is one torch.mm over the batch, g^T t or x^T s, without a tensor [B, N, r]. Where both factors are shared,
linfast.ops.low_rank runs no kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, Tile, ceil_div, needs_int64, power_of_two, tile_for

# (largest rank, tile of a factor). 2048 elements over 128 threads are 16 per thread: four 16-byte loads in flight,
# and no spill in the backward, which holds four tiles. Higher ranks are a loop over blocks of 64.
TILES: tuple[tuple[int, Tile], ...] = (
    (4, {"ROWS": 512, "RANKS": 4, "num_warps": 4}),
    (8, {"ROWS": 256, "RANKS": 8, "num_warps": 4}),
    (16, {"ROWS": 128, "RANKS": 16, "num_warps": 4}),
    (32, {"ROWS": 64, "RANKS": 32, "num_warps": 4}),
    (1 << 62, {"ROWS": 32, "RANKS": 64, "num_warps": 4}),
)
# Enough programs at batch 2 and N = 12288, and so few that adding the partial sums takes negligible time.
MAX_SPLITS = 32


@triton.jit
def _factor_at(n, r, stride_n, stride_r, RANK: tl.constexpr, DENSE: tl.constexpr):
    """Offsets [rows, ranks] within a factor; DENSE rows are RANK apart, known to the compiler (16-byte loads)."""
    if DENSE:
        at = n[:, None] * RANK + r[None, :]
    else:
        at = n[:, None] * stride_n + r[None, :] * stride_r
    return at


@triton.jit
def _tile_of_sample(n_tiles, ROWS: tl.constexpr, INT64: tl.constexpr):
    """(sample, rows [ROWS], tile) of a program; one axis, because a grid's others end at 65,535."""
    program = tl.program_id(0)
    b = program // n_tiles
    tile = program - b * n_tiles
    n = (tile.to(tl.int64) if INT64 else tile) * ROWS + tl.arange(0, ROWS)
    return b.to(tl.int64), n, tile


@triton.jit
def _add_partials(
    partial_ptr, b, r, n_splits, n_batch_splits, RANK: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr
):
    """[ranks]: the sum over splits of partial [B, splits, RANK]."""
    s = tl.arange(0, SPLITS)
    at = (b * n_batch_splits + s)[:, None] * RANK + r[None, :]
    return tl.sum(tl.load(partial_ptr + at, mask=(s < n_splits)[:, None] & (r < RANK)[None, :], other=0.0), 0)


@triton.jit
def _project_kernel(
    x_ptr,
    factor_ptr,
    partial_ptr,
    n_features,
    n_batch_splits,
    split_rows,
    stride_xb,
    stride_xn,
    stride_fb,
    stride_fn,
    stride_fr,
    RANK: tl.constexpr,
    DENSE: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """partial[b, split] = the sum over the split's n of factor[b, n] x[b, n]; grid (B, splits, rank blocks)."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * split_rows
    rows = tl.arange(0, ROWS)
    r = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    if INT64:
        rows = rows.to(tl.int64)
        r = r.to(tl.int64)
    x_ptr += b * stride_xb
    factor_ptr += b * stride_fb
    last = tl.minimum(first + split_rows, n_features)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(first, last, ROWS):
        n = start + rows
        inside = n < last
        at = _factor_at(n, r, stride_fn, stride_fr, RANK, DENSE)
        factor = tl.load(factor_ptr + at, mask=inside[:, None] & (r < RANK)[None, :], other=0.0)
        value = tl.load(x_ptr + n * stride_xn, mask=inside, other=0.0)
        total += factor.to(tl.float32) * value.to(tl.float32)[:, None]
    at = (b * n_batch_splits + tl.program_id(1)) * RANK + r
    tl.store(partial_ptr + at, tl.sum(total, 0), mask=r < RANK)


@triton.jit
def _expand_kernel(
    x_ptr,
    u_ptr,
    partial_ptr,
    y_ptr,
    t_ptr,
    n_tiles,
    n_features,
    n_splits,
    alpha,
    stride_xb,
    stride_xn,
    stride_ub,
    stride_un,
    stride_ur,
    stride_yb,
    stride_yn,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD_X: tl.constexpr,
    DENSE: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """y[b] = alpha x[b] + U[b] t[b], and t itself from the first tile; grid (B tiles)."""
    b, n, tile = _tile_of_sample(n_tiles, ROWS, INT64)
    inside = n < n_features
    y = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, RANK, RANKS):
        r = start + tl.arange(0, RANKS)
        t = _add_partials(partial_ptr, b, r, n_splits, n_splits, RANK, SPLITS, RANKS)
        tl.store(t_ptr + b * RANK + r, t, mask=(r < RANK) & (tile == 0))
        at = _factor_at(n, r, stride_un, stride_ur, RANK, DENSE)
        u = tl.load(u_ptr + b * stride_ub + at, mask=inside[:, None] & (r < RANK)[None, :], other=0.0)
        y += tl.sum(u.to(tl.float32) * t[None, :], 1)
    if ADD_X:
        y += alpha * tl.load(x_ptr + b * stride_xb + n * stride_xn, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + b * stride_yb + n * stride_yn, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _low_rank_backward_kernel(
    x_ptr,
    v_ptr,
    t_ptr,
    partial_ptr,
    grad_ptr,
    dx_ptr,
    du_ptr,
    dv_ptr,
    n_tiles,
    n_in,
    n_out,
    n_splits,
    alpha,
    stride_xb,
    stride_xn,
    stride_vb,
    stride_vn,
    stride_vr,
    stride_tb,
    stride_tr,
    stride_gb,
    stride_gn,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD_X: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_U: tl.constexpr,
    NEED_V: tl.constexpr,
    DENSE: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """dx, dU, dV, all contiguous, of which those needed; grid (B tiles of the longer of x and y)."""
    b, n, _ = _tile_of_sample(n_tiles, ROWS, INT64)
    of_x, of_y = n < n_in, n < n_out
    grad = tl.load(grad_ptr + b * stride_gb + n * stride_gn, mask=of_y, other=0.0).to(tl.float32)
    if NEED_V:
        x = tl.load(x_ptr + b * stride_xb + n * stride_xn, mask=of_x, other=0.0).to(tl.float32)
    if NEED_X:
        dx = tl.zeros((ROWS,), tl.float32)
        if ADD_X:
            dx = alpha * grad
    for start in tl.static_range(0, RANK, RANKS):
        r = start + tl.arange(0, RANKS)
        columns = (r < RANK)[None, :]
        out = n[:, None] * RANK + r[None, :]
        if NEED_X or NEED_V:
            s = _add_partials(partial_ptr, b, r, n_splits, n_splits, RANK, SPLITS, RANKS)
        if NEED_X:
            at = _factor_at(n, r, stride_vn, stride_vr, RANK, DENSE)
            v = tl.load(v_ptr + b * stride_vb + at, mask=of_x[:, None] & columns, other=0.0)
            dx += tl.sum(v.to(tl.float32) * s[None, :], 1)
        if NEED_U:
            t = tl.load(t_ptr + b * stride_tb + r * stride_tr, mask=r < RANK, other=0.0)
            du = (grad[:, None] * t[None, :]).to(du_ptr.dtype.element_ty)
            tl.store(du_ptr + b * n_out * RANK + out, du, mask=of_y[:, None] & columns)
        if NEED_V:
            dv = (x[:, None] * s[None, :]).to(dv_ptr.dtype.element_ty)
            tl.store(dv_ptr + b * n_in * RANK + out, dv, mask=of_x[:, None] & columns)
    if NEED_X:
        tl.store(dx_ptr + b * n_in + n, dx.to(dx_ptr.dtype.element_ty), mask=of_x)


def _per_sample(factor: Tensor, batch: int) -> tuple[Tensor, dict[str, int]]:
    """(the factor as [B, N, r], with batch stride 0 if shared; the constants of kernels that read it)."""
    factor = factor if factor.ndim == 3 else factor.expand(batch, *factor.shape)
    rank = factor.shape[2]
    dense = factor.stride(1) == rank and (factor.stride(2) == 1 or rank == 1)
    return factor, {"RANK": rank, "DENSE": dense, **tile_for(rank, TILES)}


def _project(x: Tensor, factor: Tensor, extra: Tensor | None = None) -> Tensor:
    """Partial sums [B, splits, r] fp32 of factor^T x; ``extra`` [B, r], if given, is one more of them."""
    (batch, n_features), rank = x.shape, factor.shape[-1]
    factor, options = _per_sample(factor, batch)
    split_rows = options["ROWS"] * max(1, ceil_div(ceil_div(n_features, options["ROWS"]), MAX_SPLITS))
    splits = ceil_div(n_features, split_rows)
    total = splits + (extra is not None)
    partial = x.new_empty((batch, total, rank), dtype=torch.float32)
    _project_kernel[(batch, splits, ceil_div(rank, options["RANKS"]))](
        x, factor, partial, n_features, total, split_rows, *x.stride(), *factor.stride(),
        INT64=needs_int64(x[0], factor[0]), **options,
    )  # fmt: skip
    if extra is not None:
        partial[:, splits] = extra
    return partial


def launch_low_rank(x: Tensor, U: Tensor, V: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(y [B, M], t = V^T x [B, r] in fp32)."""
    batch, n_out, rank = x.shape[0], U.shape[-2], V.shape[-1]
    y = x.new_empty((batch, n_out))
    t = x.new_empty((batch, rank), dtype=torch.float32)
    if y.numel() == 0 or x.shape[1] == 0 or rank == 0:
        return y.copy_(alpha * x) if alpha else y.zero_(), t.zero_()
    (factor, options), partial = _per_sample(U, batch), _project(x, V)
    n_tiles = ceil_div(n_out, options["ROWS"])
    _expand_kernel[(batch * n_tiles,)](
        x, factor, partial, y, t, n_tiles, n_out, partial.shape[1], alpha,
        *x.stride(), *factor.stride(), *y.stride(),
        SPLITS=power_of_two(partial.shape[1]), ADD_X=alpha != 0.0, INT64=needs_int64(x[0], factor[0]),
        **options, **UNFUSED,
    )  # fmt: skip
    return y, t


def launch_low_rank_backward(
    x: Tensor, U: Tensor, V: Tensor, t: Tensor, grad: Tensor | None, grad_t: Tensor | None, alpha: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dU, dV), contiguous; [0] where not needed. A gradient that is None is zero."""
    need_x, need_u, need_v = needs
    (batch, n_in), n_out, rank = x.shape, U.shape[-2], V.shape[-1]
    dx, dU, dV = (z.new_empty(z.shape if need else (0,)) for z, need in zip((x, U, V), needs, strict=True))
    grad = x.new_zeros(()).expand(batch, n_out) if grad is None else grad
    if x.numel() == 0 or grad.numel() == 0 or rank == 0:
        return dx.copy_(alpha * grad) if need_x and alpha else dx.zero_(), dU.zero_(), dV.zero_()
    if need_x or need_v:
        partial = _project(grad, U, grad_t)
    else:
        partial = t[:, None]
    if need_u and U.ndim == 2:
        torch.mm(grad.mT, t.to(grad.dtype), out=dU)
        need_u = False
    if need_v and V.ndim == 2:
        torch.mm(x.mT, partial.sum(1).to(x.dtype), out=dV)
        need_v = False
    if not (need_x or need_u or need_v):
        return dx, dU, dV
    factor, options = _per_sample(V, batch)
    n_tiles = ceil_div(max(n_in, n_out), options["ROWS"])
    _low_rank_backward_kernel[(batch * n_tiles,)](
        x, factor, t, partial, grad, dx, dU, dV, n_tiles, n_in, n_out, partial.shape[1], alpha,
        *x.stride(), *factor.stride(), *t.stride(), *grad.stride(),
        SPLITS=power_of_two(partial.shape[1]), ADD_X=alpha != 0.0, NEED_X=need_x, NEED_U=need_u, NEED_V=need_v,
        INT64=needs_int64(x[0], factor[0], grad[0]) or max(n_in, n_out) * rank >= 2**31, **options, **UNFUSED,
    )  # fmt: skip
    return dx, dU, dV
