"""Coupling and channel mix on [batch, channel, position] in one pass: x and params read once, y written once.

    u = (m + t) e^l or m e^l + t, or their inverses, on the moved half m; u = x on the kept half k
    y[b, o, p] = sum_c W[o, c] u[b, c, p] + bias[o],   log|det| = +-sum(l) of the coupling

Elements per position, with C channels in and out and C / 2 moved: 3 C for x, params and y; the two ops one after
the other move 5 C. The gradients are in coupling_mix_backward.

Columns n = b P + p, and the two kernels, are as in channel_mix; tl.dot sums over the moved half, then the kept
half, as two ranges of W's columns. To compute no coupling twice, every program has all outputs: C, O <= 128.

The kernel sums log|det| over channels and over groups of columns of one sample (the largest power of two that
divides P, up to a tile); torch sums over the groups of a sample: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine_coupling import load_coupled
from .channel_mix import (
    column_numbers,
    column_offsets,
    column_strides,
    columns_of,
    count_columns,
    dot_chunk,
    half_precision,
    store_products,
    tile_of,
)
from .launch import CouplingSpec, Tile, positions, with_channels

# The unrolled kernel has channel_mix's tiles, since it holds u as that one holds x; so has this one, except for the
# columns at 64 outputs. In half precision ptxas serialises sm_90's wgmma from 64 outputs on (C7515: two loops add
# to one sum). At C = 128 memory still takes five times as long as the products (768 bytes, 33 kFLOP per column).
DOTS: tuple[tuple[int, Tile], ...] = (
    (16, {"OUTPUTS": 16, "COLUMNS": 128, "DEPTH": 16, "num_warps": 4}),
    (32, {"OUTPUTS": 32, "COLUMNS": 64, "DEPTH": 16, "num_warps": 4}),
    (64, {"OUTPUTS": 64, "COLUMNS": 32, "DEPTH": 16, "num_warps": 4}),  # 64 columns spill on sm_100
    (1 << 62, {"OUTPUTS": 128, "COLUMNS": 64, "DEPTH": 16, "num_warps": 8}),
)


@triton.jit
def _store_log_det(
    partial_ptr, log_s, n_columns, INVERSE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """+-sum of each GROUP of columns; log_s [COLUMNS] is summed over channels."""
    total = tl.sum(tl.reshape(log_s, (COLUMNS // GROUP, GROUP)), 1)
    group = column_numbers(COLUMNS // GROUP, INT64)
    tl.store(partial_ptr + group, -total if INVERSE else total, mask=group * GROUP < n_columns)


@triton.jit(do_not_specialize=["n_batch"])
def _coupling_mix_unrolled_kernel(
    x_ptr, shift_ptr, raw_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, n_batch, n_positions, stride_xb,
    stride_xc, stride_xp, stride_pb, stride_pc, stride_pp, stride_wo, stride_wc, stride_bo, stride_yb, stride_yc,
    stride_yp, bound, floor,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, MOVES_SECOND: tl.constexpr, KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr, INVERSE: tl.constexpr, LOG_DET: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, MERGED: tl.constexpr, INT64: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n_columns = count_columns(n_batch, n_positions, INT64)
    n = column_numbers(COLUMNS, INT64)
    inside = n < n_columns
    x_at = x_ptr + column_offsets(n, n_positions, stride_xb, stride_xp, MERGED)
    p_at = column_offsets(n, n_positions, stride_pb, stride_pp, MERGED)
    y_at = y_ptr + column_offsets(n, n_positions, stride_yb, stride_yp, MERGED)
    total = tl.zeros((COLUMNS,), tl.float32)
    u = ()
    for c in tl.static_range(N_IN):
        channel_at = x_at + c * stride_xc
        if (c >= (N_IN + 1) // 2) == MOVES_SECOND:
            moved, _, _, log_s = load_coupled(
                channel_at, shift_ptr + p_at, raw_ptr + p_at, inside, bound, floor, KIND, SCALE_FIRST, INVERSE
            )
            total += log_s
            p_at += stride_pc
            u = u + (moved,)  # type: ignore[assignment]  # noqa: RUF005
        else:
            value = tl.load(channel_at, mask=inside, other=0.0)
            u = u + (value.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    store_products(
        y_at, stride_yc, u, weight_ptr, stride_wo, stride_wc, bias_ptr, stride_bo, inside, N_IN, N_OUT, BIAS
    )  # fmt: skip
    if LOG_DET:
        _store_log_det(partial_ptr, tl.where(inside, total, 0.0), n_columns, INVERSE, GROUP, COLUMNS, INT64)


@triton.jit(do_not_specialize=["n_batch"])
def _coupling_mix_dot_kernel(
    moved_ptr, kept_ptr, shift_ptr, raw_ptr, weight_moved_ptr, weight_kept_ptr, bias_ptr, y_ptr, partial_ptr,
    n_moved, n_kept, n_out, n_batch, n_positions, stride_xb, stride_xc, stride_xp, stride_pb, stride_pc,
    stride_pp, stride_wo, stride_wc, stride_bo, stride_yb, stride_yc, stride_yp, bound, floor,
    KIND: tl.constexpr, SCALE_FIRST: tl.constexpr, INVERSE: tl.constexpr, LOG_DET: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr, MERGED: tl.constexpr, INT64: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    n_columns = count_columns(n_batch, n_positions, INT64)
    n = column_numbers(COLUMNS, INT64)
    o = tl.arange(0, OUTPUTS)
    k = tl.arange(0, DEPTH)
    if INT64:
        o, k = o.to(tl.int64), k.to(tl.int64)
    inside = (n < n_columns)[None, :]
    x_at = column_offsets(n, n_positions, stride_xb, stride_xp, MERGED)[None, :]
    p_at = column_offsets(n, n_positions, stride_pb, stride_pp, MERGED)[None, :]
    y_at = column_offsets(n, n_positions, stride_yb, stride_yp, MERGED)[None, :]
    total = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    sum_log_s = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, n_moved, DEPTH):
        c = first + k
        moves = (c < n_moved)[:, None] & inside
        at = p_at + c[:, None] * stride_pc
        u, _, _, log_s = load_coupled(
            moved_ptr + x_at + c[:, None] * stride_xc, shift_ptr + at, raw_ptr + at, moves, bound, floor, KIND,
            SCALE_FIRST, INVERSE,
        )  # fmt: skip
        if LOG_DET:
            sum_log_s += tl.sum(tl.where(moves, log_s, 0.0), 0)
        u = u.to(moved_ptr.dtype.element_ty)
        total = dot_chunk(total, weight_moved_ptr, o, c, n_out, n_moved, stride_wo, stride_wc, u, HALF)
    for first in range(0, n_kept, DEPTH):
        c = first + k
        x = tl.load(kept_ptr + x_at + c[:, None] * stride_xc, mask=(c < n_kept)[:, None] & inside, other=0.0)
        total = dot_chunk(total, weight_kept_ptr, o, c, n_out, n_kept, stride_wo, stride_wc, x, HALF)
    if BIAS:
        total += tl.load(bias_ptr + o * stride_bo, mask=o < n_out, other=0.0).to(tl.float32)[:, None]
    mask = (o < n_out)[:, None] & inside
    tl.store(y_ptr + y_at + o[:, None] * stride_yc, total.to(y_ptr.dtype.element_ty), mask=mask)
    if LOG_DET:
        _store_log_det(partial_ptr, sum_log_s, n_columns, INVERSE, GROUP, COLUMNS, INT64)


def launch_coupling_mix(
    x: Tensor, params: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """(y [B, O, ...] of x's dtype, log|det| [B] fp32; [0] where not requested)."""
    spec, y = CouplingSpec(*constants), with_channels(x, weight.shape[0])
    if x.numel() == 0:
        return y, x.new_zeros(x.shape[0] if spec.log_det else 0, dtype=torch.float32)
    views, y_view = positions(x), positions(y)
    shift, raw = spec.shift_and_raw(positions(params))
    n_out, n_in = weight.shape
    n_positions = views.shape[2]
    unrolled, tile = tile_of(views, n_out, n_out, DOTS)
    # Columns of a tile that always lie in one sample: a power of two that divides P.
    group = min(n_positions & -n_positions, tile["COLUMNS"])
    partial = x.new_empty((x.shape[0], n_positions // group) if spec.log_det else (0,), dtype=torch.float32)
    bias_or_x, stride_bo = (x, 0) if bias is None else (bias, bias.stride(0))
    grid, sizes, options = columns_of(tile, (views, shift, y_view), (x, y, params, weight))
    sizes += (
        *column_strides(views), *column_strides(shift), *weight.stride(), stride_bo, *column_strides(y_view),
        spec.bound, spec.floor,
    )  # fmt: skip
    options |= {**spec.constexprs, "LOG_DET": spec.log_det, "GROUP": group, "BIAS": bias is not None}
    if unrolled:
        _coupling_mix_unrolled_kernel[grid](
            views, shift, raw, weight, bias_or_x, y_view, partial, *sizes,
            N_IN=n_in, N_OUT=n_out, MOVES_SECOND=spec.moves_second, **options,
        )  # fmt: skip
    else:
        moved, kept = spec.halves(views)
        _coupling_mix_dot_kernel[grid](
            moved, kept, shift, raw, *spec.halves(weight), bias_or_x, y_view, partial,
            moved.shape[1], kept.shape[1], n_out, *sizes,
            HALF=half_precision(x, weight), **options,
        )  # fmt: skip
    return y, partial.sum(1) if spec.log_det else partial
