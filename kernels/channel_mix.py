"""Channel mix on [batch, channel, position]: one matrix for every position, x read once, y written once.

    y[b, o, p] = sum_c W[o, c] x[b, c, p] + bias[o]
    dx[b, c, p] = sum_o W[o, c] dy[b, o, p]        the same kernel on W's transpose
    dW[o, c] = sum_{b, p} dy[b, o, p] x[b, c, p],  dbias[o] = sum_{b, p} dy[b, o, p]

The backward reads W and, for dW, x. Bytes, forward and dx: x and y once, W from the cache; dW: x and dy once, and
the partial sums, 4 O C bytes per split.

Batch and positions form one axis of columns n = b P + p; where every view can merge them (channels_last, one
sample, one position) no division by P is compiled. With few channels and positions innermost, the unrolled kernel
holds a vector per channel and multiplies it by elements of W as scalars. With more channels, or channels innermost,
tl.dot sums over chunks of channels, always as [O, C] @ [C, N]; the compiler orders each load along contiguous
elements. fp32 operands are not rounded ("ieee"); half-precision products run on the matrix units with fp32 sums.

For dW the columns are split into at most SPLITS parts, whose partial products torch sums: no atomics, the same bits
every time. The error of a chain of fp32 multiply-adds grows with its length: a split adds up chains of RUN chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, ceil_div, needs_int64, positions, tile_for, with_channels

# (widest C or O, tile). Four columns per thread are one 16-byte load per channel. All channels of x are held at
# once, so that there are more columns only where channels are few.
UNROLLED: tuple[tuple[int, Tile], ...] = (
    (4, {"COLUMNS": 1024, "num_warps": 4}),  # 32 values per thread
    (15, {"COLUMNS": 512, "num_warps": 4}),  # up to 60 values per thread
)

# (widest O, tile). One program computes all outputs, so that x is read once. DEPTH is 16 channels per chunk, the
# least that tl.dot takes, because an fp32 dot holds a chunk of both operands in registers.
DOTS: tuple[tuple[int, Tile], ...] = (
    (16, {"OUTPUTS": 16, "COLUMNS": 128, "DEPTH": 16, "num_warps": 4}),
    (32, {"OUTPUTS": 32, "COLUMNS": 64, "DEPTH": 16, "num_warps": 4}),  # 128 columns spill on sm_90
    (64, {"OUTPUTS": 64, "COLUMNS": 64, "DEPTH": 16, "num_warps": 4}),
    (1 << 62, {"OUTPUTS": 128, "COLUMNS": 64, "DEPTH": 16, "num_warps": 8}),  # past 128: more programs
)

# (widest of O and C, tile): a square of OUTPUTS by as many inputs, in chunks of COLUMNS.
WEIGHTS: tuple[tuple[int, Tile], ...] = (
    (16, {"OUTPUTS": 16, "COLUMNS": 64, "num_warps": 4}),
    (32, {"OUTPUTS": 32, "COLUMNS": 32, "num_warps": 4}),
    (1 << 62, {"OUTPUTS": 64, "COLUMNS": 32, "num_warps": 4}),
)
RUN = tl.constexpr(8)
SPLITS = 512  # about four programs per multiprocessor; the partials of C = 128 are then 32 MB
_CHUNKS_A_SPLIT = 8  # fewer chunks would write more partials than they read


@triton.jit
def count_columns(n_batch, n_positions, INT64: tl.constexpr):
    """B P, known to be a multiple of 16 where P is: so loads along positions stay wide, whatever B is."""
    if INT64:
        n_batch = n_batch.to(tl.int64)
    return n_batch * n_positions


@triton.jit
def column_numbers(COLUMNS: tl.constexpr, INT64: tl.constexpr):
    """The columns n = b P + p of a program."""
    if INT64:
        n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    else:
        n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    return n


@triton.jit
def column_offsets(n, n_positions, stride_b, stride_p, MERGED: tl.constexpr):
    """Offsets of columns n = b P + p."""
    if MERGED:
        at = n * stride_p
    else:
        b = n // n_positions
        at = b * stride_b + (n - b * n_positions) * stride_p
    return at


@triton.jit
def _operand(value, HALF: tl.constexpr):
    """What a dot takes: half-precision pairs as they are, anything else in fp32."""
    if HALF:
        result = value
    else:
        result = value.to(tl.float32)
    return result


@triton.jit
def dot_chunk(total, weight_ptr, o, c, n_out, n_in, stride_wo, stride_wc, x, HALF: tl.constexpr):
    """total [O, N] + W[o, c] x [c, N] for one chunk of input channels c."""
    mask = (o < n_out)[:, None] & (c < n_in)[None, :]
    w = tl.load(weight_ptr + (o[:, None] * stride_wo + c[None, :] * stride_wc), mask=mask, other=0.0)
    return tl.dot(_operand(w, HALF), _operand(x, HALF), total, input_precision="ieee")


@triton.jit
def store_products(
    y_at, stride_yc, x, weight_ptr, stride_wo, stride_wc, bias_ptr, stride_bo, inside,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y[o] = sum_c W[o, c] x[c] + bias[o], x a tuple of vectors."""
    for o in tl.static_range(N_OUT):
        y = weighted_sum(x, weight_ptr + o * stride_wo, stride_wc, N_IN)
        if BIAS:
            y += tl.load(bias_ptr + o * stride_bo).to(tl.float32)
        tl.store(y_at + o * stride_yc, y.to(y_at.dtype.element_ty), mask=inside)


@triton.jit
def weighted_sum(x, weight_ptr, stride, COUNT: tl.constexpr):
    """sum_c weight[c] x[c], x a tuple of vectors."""
    total = tl.zeros_like(x[0])
    for c in tl.static_range(COUNT):
        total += tl.load(weight_ptr + c * stride).to(tl.float32) * x[c]
    return total


@triton.jit
def load_channels(at, stride, inside, COUNT: tl.constexpr):
    """A tuple of COUNT fp32 vectors, ``stride`` apart.

    No pointer is moved on from the last one: for a chain of fifteen Triton 3.7.1 takes more than 8 GB on gfx942.
    """
    x = ()
    for c in tl.static_range(COUNT):
        value = tl.load(at + c * stride, mask=inside, other=0.0)
        x = x + (value.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return x


@triton.jit(do_not_specialize=["n_batch"])
def _channel_mix_unrolled_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, n_batch, n_positions, stride_xb, stride_xc, stride_xp, stride_wo,
    stride_wc, stride_bo, stride_yb, stride_yc, stride_yp,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, BIAS: tl.constexpr, MERGED: tl.constexpr, INT64: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    n_columns = count_columns(n_batch, n_positions, INT64)
    n = column_numbers(COLUMNS, INT64)
    inside = n < n_columns
    x_at = x_ptr + column_offsets(n, n_positions, stride_xb, stride_xp, MERGED)
    y_at = y_ptr + column_offsets(n, n_positions, stride_yb, stride_yp, MERGED)
    x = load_channels(x_at, stride_xc, inside, N_IN)
    store_products(
        y_at, stride_yc, x, weight_ptr, stride_wo, stride_wc, bias_ptr, stride_bo, inside, N_IN, N_OUT, BIAS
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_batch"])
def _channel_mix_dot_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, n_in, n_out, n_batch, n_positions, stride_xb, stride_xc, stride_xp,
    stride_wo, stride_wc, stride_bo, stride_yb, stride_yc, stride_yp,
    HALF: tl.constexpr, BIAS: tl.constexpr, MERGED: tl.constexpr, INT64: tl.constexpr, OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    n_columns = count_columns(n_batch, n_positions, INT64)
    n = column_numbers(COLUMNS, INT64)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, DEPTH)
    if INT64:
        o, k = o.to(tl.int64), k.to(tl.int64)
    inside = (n < n_columns)[None, :]
    x_at = column_offsets(n, n_positions, stride_xb, stride_xp, MERGED)[None, :]
    y_at = column_offsets(n, n_positions, stride_yb, stride_yp, MERGED)[None, :]
    total = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    for first in range(0, n_in, DEPTH):
        c = first + k
        x = tl.load(x_ptr + x_at + c[:, None] * stride_xc, mask=(c < n_in)[:, None] & inside, other=0.0)
        total = dot_chunk(total, weight_ptr, o, c, n_out, n_in, stride_wo, stride_wc, x, HALF)
    if BIAS:
        total += tl.load(bias_ptr + o * stride_bo, mask=o < n_out, other=0.0).to(tl.float32)[:, None]
    mask = (o < n_out)[:, None] & inside
    tl.store(y_ptr + y_at + o[:, None] * stride_yc, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_batch", "n_chunks"])
def _channel_mix_weight_kernel(
    x_ptr, grad_ptr, dweight_ptr, dbias_ptr, n_in, n_out, n_batch, n_positions, n_chunks, stride_xb,
    stride_xc, stride_xp, stride_gb, stride_gc, stride_gp,
    HALF: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MERGED: tl.constexpr, INT64: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n_columns = count_columns(n_batch, n_positions, INT64)
    split = tl.program_id(0)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    c = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    if INT64:
        split, o, c = split.to(tl.int64), o.to(tl.int64), c.to(tl.int64)
    dweight = tl.zeros((OUTPUTS, OUTPUTS), tl.float32)
    dbias = tl.zeros((OUTPUTS,), tl.float32)
    for start in range(0, n_chunks, RUN):
        run = tl.zeros((OUTPUTS, OUTPUTS), tl.float32)
        for chunk in range(start, tl.minimum(start + RUN, n_chunks)):
            n = (split * n_chunks + chunk) * COLUMNS + tl.arange(0, COLUMNS)
            inside = n < n_columns
            g_at = column_offsets(n, n_positions, stride_gb, stride_gp, MERGED)[None, :] + o[:, None] * stride_gc
            g = tl.load(grad_ptr + g_at, mask=(o < n_out)[:, None] & inside[None, :], other=0.0)
            if WEIGHT:
                x_at = column_offsets(n, n_positions, stride_xb, stride_xp, MERGED)[:, None]
                x = tl.load(
                    x_ptr + x_at + c[None, :] * stride_xc, mask=inside[:, None] & (c < n_in)[None, :], other=0.0
                )
                run = tl.dot(_operand(g, HALF), _operand(x, HALF), run, input_precision="ieee")
            if BIAS:
                dbias += tl.sum(g.to(tl.float32), 1)
        dweight += run
    if WEIGHT:
        at = (split * n_out + o[:, None]) * n_in + c[None, :]
        tl.store(dweight_ptr + at, dweight, mask=(o < n_out)[:, None] & (c < n_in)[None, :])
    if BIAS:
        mask = (o < n_out) & (tl.program_id(2) == 0)
        tl.store(dbias_ptr + split * n_out + o, dbias, mask=mask)


def tile_of(x: Tensor, n_out: int, size: int, dots: Sequence[tuple[int, Tile]]) -> tuple[bool, Tile]:
    """(whether the unrolled kernel runs, its tile) for x [B, C, P].

    It runs where channels are few and positions innermost; elsewhere the tile is that of ``dots`` for ``size``.
    """
    widest = max(x.shape[1], n_out)
    unrolled = widest < 16 and x.stride(1) >= column_strides(x)[2]
    return unrolled, tile_for(widest, UNROLLED) if unrolled else tile_for(size, dots)


def columns_of(
    tile: Tile, views: Sequence[Tensor], tensors: Sequence[Tensor]
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """(grid, (B, P), constants) of a launch over the columns of ``views`` [B, C, P] of ``tensors``."""
    batch, _, count = views[0].shape
    merged = batch == 1 or count == 1 or all(view.stride(0) == count * view.stride(2) for view in views)
    int64 = columns_need_int64(batch * count, *tensors)
    return (ceil_div(batch * count, tile["COLUMNS"]),), (batch, count), {"MERGED": merged, "INT64": int64, **tile}


def columns_need_int64(n_columns: int, *tensors: Tensor) -> bool:
    """Whether an offset, or the number of a column in the last program's tiles, exceeds int32."""
    return needs_int64(*tensors) or n_columns >= 2**31 - 2**20


def column_strides(view: Tensor) -> tuple[int, int, int]:
    """(batch, channel, position) strides; for vectors the position's is the batch stride."""
    return view.stride(0), view.stride(1), view.stride(0 if view.shape[2] == 1 else 2)


def launch_channel_mix(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, O, ...]."""
    y = with_channels(x, weight.shape[0])
    if y.numel() == 0:
        return y
    _mix(positions(x), weight, bias, positions(y))
    return y


def _mix(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = W x + bias on [B, C, P] views."""
    n_out, n_in = weight.shape
    bias_or_x, stride_bo = (x, 0) if bias is None else (bias, bias.stride(0))
    unrolled, tile = tile_of(x, n_out, n_out, DOTS)
    (programs,), sizes, options = columns_of(tile, (x, y), (x, y, weight))
    sizes += (*column_strides(x), *weight.stride(), stride_bo, *column_strides(y))
    if unrolled:
        _channel_mix_unrolled_kernel[(programs,)](
            x, weight, bias_or_x, y, *sizes, N_IN=n_in, N_OUT=n_out, BIAS=bias is not None, **options
        )
    else:
        _channel_mix_dot_kernel[(programs, ceil_div(n_out, tile["OUTPUTS"]))](
            x, weight, bias_or_x, y, n_in, n_out, *sizes, HALF=half_precision(x, weight), BIAS=bias is not None,
            **options,
        )  # fmt: skip


def half_precision(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.dtype != torch.float32


def launch_channel_mix_backward(
    x: Tensor, weight: Tensor, grad: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); None for those that are not needed."""
    dx, dweight, dbias = with_channels(x, x.shape[1]) if needs[0] else None, None, None
    if dx is not None and dx.numel():
        _mix(positions(grad), weight.t(), None, positions(dx))
    if needs[1] or needs[2]:
        partial, partial_bias = weight_partials(positions(x), positions(grad), needs[1], needs[2])
        if needs[1]:
            dweight = partial.sum(0).to(weight.dtype)
        if needs[2]:
            dbias = partial_bias.sum(0).to(weight.dtype)
    return dx, dweight, dbias


def weight_partials(x: Tensor, grad: Tensor, needs_weight: bool, needs_bias: bool) -> tuple[Tensor, Tensor]:
    """fp32 partials [splits, O, C] of dW and [splits, O] of dbias; zeros where there are no columns."""
    n_in, n_out, n_columns = x.shape[1], grad.shape[1], x.shape[0] * x.shape[2]
    tile = tile_for(max(n_in, n_out), WEIGHTS)
    chunks = ceil_div(n_columns, tile["COLUMNS"])
    n_chunks = max(_CHUNKS_A_SPLIT, ceil_div(chunks, SPLITS))
    splits = ceil_div(chunks, n_chunks)
    dweight = x.new_empty((splits, n_out, n_in) if needs_weight else (0,), dtype=torch.float32)
    dbias = x.new_empty((splits, n_out) if needs_bias else (0,), dtype=torch.float32)
    if splits == 0:
        return dweight, dbias
    _, sizes, options = columns_of(tile, (x, grad), (x, grad))
    of_inputs = ceil_div(n_in, tile["OUTPUTS"]) if needs_weight else 1
    grid = (splits, ceil_div(n_out, tile["OUTPUTS"]), of_inputs)
    _channel_mix_weight_kernel[grid](
        x, grad, dweight, dbias, n_in, n_out, *sizes, n_chunks, *column_strides(x), *column_strides(grad),
        HALF=half_precision(x, grad), WEIGHT=needs_weight, BIAS=needs_bias, **options,
    )  # fmt: skip
    return dweight, dbias
