"""Affine coupling on [batch, channel, position]: one pass over x and the parameters, one output.

m is the moved half of x, k the kept half, t the shift, r the raw log-scale, and l = scale_map(r):

    forward   y = (m + t) e^l   or  m e^l + t        inverse   y = m e^-l - t   or  (m - t) e^-l
    log|det| = +sum(l), -sum(l)

Gradients in terms of the output y (shift first / scale first), so that x need not be saved; g = dL/dy and
h = dL/d log|det|:

    forward   dm = g e^l     dt = dm / g       dl =  g y + h       /  g (y - t) + h
    inverse   dm = g e^-l    dt = -g / -dm     dl = -g (y + t) - h / -g y - h
    dr = dl * dl/dr,  dk = g

Bytes per sample in fp32, forward: 4 (C + C + 2 C_m) P for x, y and params, and 4 for log|det|, with C_m moved
channels and P positions. The backward reads y's moved half, g and params, and writes dx and dparams.

A program computes a tile of rows (batch, outer) by columns (inner) of both halves (see ``launch.Walk``). log|det|
is summed within a row of a tile by the kernel and over these sums by torch: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import CouplingSpec, Tile, Walk, ceil_div, like, needs_int64, positions, tile_for, walk
from .math import couple, couple_backward, log_scale, log_scale_derivative

# (widest row in elements, tile). 1024 elements over 128 threads are 8 per thread: two 16-byte loads of each tensor
# in flight, and 32 registers forward and 44 backward on sm_90. With 2048 elements they are 56 and 72, and half as
# many warps are resident.
TILES: tuple[tuple[int, Tile], ...] = (
    (16, {"ROWS": 64, "COLUMNS": 16, "num_warps": 4}),  # narrow vectors: many samples per tile
    (64, {"ROWS": 16, "COLUMNS": 64, "num_warps": 4}),  # D = 128 and below
    (256, {"ROWS": 4, "COLUMNS": 256, "num_warps": 4}),
    (1 << 62, {"ROWS": 1, "COLUMNS": 1024, "num_warps": 4}),  # images, wide vectors: one long run
)


@triton.jit
def _tile(n_rows, n_outer, n_inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INT64: tl.constexpr):
    """Row numbers, batch, outer index and column of a program's tile, each broadcastable; where its sum goes.

    Tiles are numbered on one axis, because a grid's others end at 65,535.
    """
    n_tiles = tl.cdiv(n_inner, COLUMNS)
    block = tl.program_id(0) // n_tiles
    tile = tl.program_id(0) - block * n_tiles
    if INT64:
        block, tile = block.to(tl.int64), tile.to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    batch = row // n_outer
    return row, batch[:, None], (row - batch * n_outer)[:, None], column[None, :], row * n_tiles + tile


@triton.jit
def load_coupled(
    value_at, shift_at, raw_at, mask, bound, floor,
    KIND: tl.constexpr, SCALE_FIRST: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """(the moved half after the coupling, shift, raw, log_s) in fp32; meaningless outside the mask, but finite."""
    value = tl.load(value_at, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_at, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(raw_at, mask=mask, other=0.0).to(tl.float32)
    log_s = log_scale(raw, bound, floor, KIND)
    return couple(value, shift, log_s, SCALE_FIRST, INVERSE), shift, raw, log_s


@triton.jit(do_not_specialize=["n_rows"])
def _affine_coupling_kernel(
    moved_ptr,
    kept_ptr,
    shift_ptr,
    raw_ptr,
    y_moved_ptr,
    y_kept_ptr,
    partial_ptr,
    n_rows,
    n_outer,
    outer_moved,
    inner_moved,
    outer_kept,
    inner_kept,
    stride_xb,
    stride_xo,
    stride_xi,
    stride_pb,
    stride_po,
    stride_pi,
    stride_yb,
    stride_yo,
    stride_yi,
    bound,
    floor,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    LOG_DET: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, b, o, i, at = _tile(n_rows, n_outer, tl.maximum(inner_moved, inner_kept), ROWS, COLUMNS, INT64)
    inside = row[:, None] < n_rows
    kept = inside & (o < outer_kept) & (i < inner_kept)
    x_at = b * stride_xb + o * stride_xo + i * stride_xi
    y_at = b * stride_yb + o * stride_yo + i * stride_yi
    tl.store(y_kept_ptr + y_at, tl.load(kept_ptr + x_at, mask=kept), mask=kept)

    moves = inside & (o < outer_moved) & (i < inner_moved)
    p_at = b * stride_pb + o * stride_po + i * stride_pi
    y, _, _, log_s = load_coupled(
        moved_ptr + x_at, shift_ptr + p_at, raw_ptr + p_at, moves, bound, floor, KIND, SCALE_FIRST, INVERSE
    )
    tl.store(y_moved_ptr + y_at, y.to(y_moved_ptr.dtype.element_ty), mask=moves)
    if LOG_DET:
        total = tl.sum(tl.where(moves, log_s, 0.0), 1)
        tl.store(partial_ptr + at, -total if INVERSE else total, mask=row < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def _affine_coupling_backward_kernel(
    y_ptr,
    shift_ptr,
    raw_ptr,
    grad_moved_ptr,
    grad_kept_ptr,
    grad_log_det_ptr,
    dx_moved_ptr,
    dx_kept_ptr,
    dshift_ptr,
    draw_ptr,
    n_rows,
    n_outer,
    outer_moved,
    inner_moved,
    outer_kept,
    inner_kept,
    stride_yb,
    stride_yo,
    stride_yi,
    stride_pb,
    stride_po,
    stride_pi,
    stride_gb,
    stride_go,
    stride_gi,
    stride_xb,
    stride_xo,
    stride_xi,
    stride_qb,
    stride_qo,
    stride_qi,
    stride_hb,
    bound,
    floor,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    LOG_DET: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, b, o, i, _ = _tile(n_rows, n_outer, tl.maximum(inner_moved, inner_kept), ROWS, COLUMNS, INT64)
    inside = row[:, None] < n_rows
    kept = inside & (o < outer_kept) & (i < inner_kept)
    g_at = b * stride_gb + o * stride_go + i * stride_gi
    x_at = b * stride_xb + o * stride_xo + i * stride_xi
    tl.store(dx_kept_ptr + x_at, tl.load(grad_kept_ptr + g_at, mask=kept), mask=kept)

    moves = inside & (o < outer_moved) & (i < inner_moved)
    p_at = b * stride_pb + o * stride_po + i * stride_pi
    y_at = b * stride_yb + o * stride_yo + i * stride_yi
    q_at = b * stride_qb + o * stride_qo + i * stride_qi
    y = tl.load(y_ptr + y_at, mask=moves, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + p_at, mask=moves, other=0.0).to(tl.float32)
    raw = tl.load(raw_ptr + p_at, mask=moves, other=0.0).to(tl.float32)
    grad = tl.load(grad_moved_ptr + g_at, mask=moves, other=0.0).to(tl.float32)
    if LOG_DET:
        grad_log_det = tl.load(grad_log_det_ptr + b * stride_hb, mask=inside, other=0.0).to(tl.float32)
    else:
        grad_log_det = 0.0
    log_s = log_scale(raw, bound, floor, KIND)
    dx, dshift, dlog_s = couple_backward(y, shift, log_s, grad, grad_log_det, SCALE_FIRST, INVERSE)
    draw = dlog_s * log_scale_derivative(raw, bound, floor, KIND)
    tl.store(dx_moved_ptr + x_at, dx.to(dx_moved_ptr.dtype.element_ty), mask=moves)
    tl.store(dshift_ptr + q_at, dshift.to(dshift_ptr.dtype.element_ty), mask=moves)
    tl.store(draw_ptr + q_at, draw.to(draw_ptr.dtype.element_ty), mask=moves)


def _row_grid(path: Walk, moved: Tensor, kept: Tensor) -> tuple[tuple[int, ...], int, int, Tile]:
    """((n_rows, n_outer, outer and inner extents of each half), programs, tiles per row, tile)."""
    (outer_m, inner_m), (outer_k, inner_k) = path.sizes(moved), path.sizes(kept)
    n_outer, inner = max(outer_m, outer_k), max(inner_m, inner_k)
    n_rows, tile = moved.shape[0] * n_outer, tile_for(inner, TILES)
    sizes = (n_rows, n_outer, outer_m, inner_m, outer_k, inner_k)
    n_tiles = ceil_div(inner, tile["COLUMNS"])
    return sizes, ceil_div(n_rows, tile["ROWS"]) * n_tiles, n_tiles, tile


def launch_affine_coupling(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    """(y like x, log|det| [B] fp32; [0] where not requested)."""
    spec, y = CouplingSpec(*constants), like(x)
    if x.numel() == 0:
        return y, x.new_zeros(x.shape[0] if spec.log_det else 0, dtype=torch.float32)
    moved, kept = spec.halves(positions(x))
    y_moved, y_kept = spec.halves(positions(y))
    shift, raw = spec.shift_and_raw(positions(params))
    path = walk(moved, kept, shift, y_moved, y_kept)
    sizes, programs, n_tiles, tile = _row_grid(path, moved, kept)
    partial = x.new_empty((x.shape[0], sizes[1] * n_tiles) if spec.log_det else (0,), dtype=torch.float32)
    _affine_coupling_kernel[(programs,)](
        moved, kept, shift, raw, y_moved, y_kept, partial, *sizes,
        *path.strides(moved), *path.strides(shift), *path.strides(y_moved), spec.bound, spec.floor,
        LOG_DET=spec.log_det, INT64=needs_int64(x, y, params), **spec.constexprs, **tile,
    )  # fmt: skip
    if not spec.log_det:
        return y, partial
    return y, partial[:, 0] if partial.shape[1] == 1 else partial.sum(1)


def launch_affine_coupling_backward(
    y: Tensor, params: Tensor, grad: Tensor | None, grad_log_det: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """(dx like y, dparams like params). A gradient that is None is zero."""
    dx, dparams = like(y), like(params)
    spec = CouplingSpec(*constants)
    if y.numel() == 0:
        return dx, dparams
    grad = y.new_zeros(()).expand_as(y) if grad is None else grad
    y_moved, _ = spec.halves(positions(y))
    grad_moved, grad_kept = spec.halves(positions(grad))
    dx_moved, dx_kept = spec.halves(positions(dx))
    shift, raw = spec.shift_and_raw(positions(params))
    dshift, draw = spec.shift_and_raw(positions(dparams))
    path = walk(y_moved, grad_moved, grad_kept, shift, dshift, dx_moved, dx_kept)
    sizes, programs, _, tile = _row_grid(path, grad_moved, grad_kept)
    h = grad if grad_log_det is None else grad_log_det
    _affine_coupling_backward_kernel[(programs,)](
        y_moved, shift, raw, grad_moved, grad_kept, h, dx_moved, dx_kept, dshift, draw, *sizes,
        *path.strides(y_moved), *path.strides(shift), *path.strides(grad_moved), *path.strides(dx_moved),
        *path.strides(dshift), h.stride(0), spec.bound, spec.floor, LOG_DET=grad_log_det is not None,
        INT64=needs_int64(y, params, grad, dx, dparams), **spec.constexprs, **tile,
    )  # fmt: skip
    return dx, dparams
