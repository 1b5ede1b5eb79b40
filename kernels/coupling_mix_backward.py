"""Gradients of coupling_mix, y = W u + bias; u, the coupling's output, is recomputed from x and not saved.

With g = dL/dy and h = dL/d log|det|:

    du = W^T g,  dk = du on the kept half,  (dm, dt, dr) from (u, t, l, du, h) as in affine_coupling
    dW[o, c] = sum_{b, p} g[b, o, p] u[b, c, p],   dbias[o] = sum_{b, p} g[b, o, p]

Elements per position, with C channels in and out and C / 2 moved:

    dx, dparams   read g, moved x, params; write dx, dparams                   4.5 C; the two ops in turn: 9.5 C
    dW            read kept x, write u; read g and u in channel_mix's kernel   3.5 C more

A second kernel that recomputed u for dW would move 3 C in place of these 3.5 C, and nearly duplicate channel_mix's.
Where only dW is needed, affine_coupling's launch computes u.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .affine_coupling import launch_affine_coupling, load_coupled
from .channel_mix import (
    column_numbers,
    column_offsets,
    column_strides,
    columns_of,
    count_columns,
    dot_chunk,
    half_precision,
    launch_channel_mix_backward,
    load_channels,
    tile_of,
    weighted_sum,
)
from .launch import CouplingSpec, Tile, like, positions, with_channels
from .math import couple_backward, log_scale_derivative

# (widest half of C, tile). OUTPUTS are channels of a half; both halves are summed at once, to read g once.
BACKWARD_DOTS: tuple[tuple[int, Tile], ...] = (
    (16, {"OUTPUTS": 16, "COLUMNS": 64, "DEPTH": 16, "num_warps": 4}),
    (32, {"OUTPUTS": 32, "COLUMNS": 64, "DEPTH": 16, "num_warps": 4}),
    (64, {"OUTPUTS": 64, "COLUMNS": 64, "DEPTH": 16, "num_warps": 8}),
)


@triton.jit
def _store_moved(
    u, shift, raw, log_s, du, h, dx_at, dshift_at, draw_at, u_at, mask, bound, floor,
    KIND: tl.constexpr, SCALE_FIRST: tl.constexpr, INVERSE: tl.constexpr, KEEP_U: tl.constexpr,
):  # fmt: skip
    """dx, dshift and draw of the moved half, and u where dW needs it."""
    dx, dshift, dlog_s = couple_backward(u, shift, log_s, du, h, SCALE_FIRST, INVERSE)
    draw = dlog_s * log_scale_derivative(raw, bound, floor, KIND)
    tl.store(dx_at, dx.to(dx_at.dtype.element_ty), mask=mask)
    tl.store(dshift_at, dshift.to(dshift_at.dtype.element_ty), mask=mask)
    tl.store(draw_at, draw.to(draw_at.dtype.element_ty), mask=mask)
    if KEEP_U:
        tl.store(u_at, u.to(u_at.dtype.element_ty), mask=mask)


@triton.jit
def _column_log_det_gradient(h_ptr, n, n_positions, stride_hb, inside, LOG_DET: tl.constexpr):
    """h of each column's sample, 0 where there is none."""
    if LOG_DET:
        h = tl.load(h_ptr + (n // n_positions) * stride_hb, mask=inside, other=0.0).to(tl.float32)
    else:
        h = tl.zeros(n.shape, tl.float32)
    return h


@triton.jit(do_not_specialize=["n_batch"])
def _coupling_mix_backward_unrolled_kernel(
    x_ptr, shift_ptr, raw_ptr, weight_ptr, grad_ptr, h_ptr, dx_ptr, dshift_ptr, draw_ptr, u_ptr, n_batch,
    n_positions, stride_xb, stride_xc, stride_xp, stride_pb, stride_pc, stride_pp, stride_wo, stride_wc, stride_gb,
    stride_gc, stride_gp, stride_hb, stride_db, stride_dc, stride_dp, stride_qb, stride_qc, stride_qp, bound, floor,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, MOVES_SECOND: tl.constexpr, KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr, INVERSE: tl.constexpr, LOG_DET: tl.constexpr, KEEP_U: tl.constexpr,
    MERGED: tl.constexpr, INT64: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n_columns = count_columns(n_batch, n_positions, INT64)
    n = column_numbers(COLUMNS, INT64)
    inside = n < n_columns
    x_at = x_ptr + column_offsets(n, n_positions, stride_xb, stride_xp, MERGED)
    p_at = column_offsets(n, n_positions, stride_pb, stride_pp, MERGED)
    q_at = column_offsets(n, n_positions, stride_qb, stride_qp, MERGED)
    d_at = column_offsets(n, n_positions, stride_db, stride_dp, MERGED)
    g_at = grad_ptr + column_offsets(n, n_positions, stride_gb, stride_gp, MERGED)
    h = _column_log_det_gradient(h_ptr, n, n_positions, stride_hb, inside, LOG_DET)
    g = load_channels(g_at, stride_gc, inside, N_OUT)
    for c in tl.static_range(N_IN):
        channel_at = x_at + c * stride_xc
        du = weighted_sum(g, weight_ptr + c * stride_wc, stride_wo, N_OUT)
        if (c >= (N_IN + 1) // 2) == MOVES_SECOND:
            u, shift, raw, log_s = load_coupled(
                channel_at, shift_ptr + p_at, raw_ptr + p_at, inside, bound, floor, KIND, SCALE_FIRST, INVERSE
            )
            _store_moved(
                u, shift, raw, log_s, du, h, dx_ptr + d_at, dshift_ptr + q_at, draw_ptr + q_at, u_ptr + d_at,
                inside, bound, floor, KIND, SCALE_FIRST, INVERSE, KEEP_U,
            )  # fmt: skip
            p_at += stride_pc
            q_at += stride_qc
        else:
            tl.store(dx_ptr + d_at, du.to(dx_ptr.dtype.element_ty), mask=inside)
            if KEEP_U:
                tl.store(u_ptr + d_at, tl.load(channel_at, mask=inside), mask=inside)
        d_at += stride_dc


@triton.jit(do_not_specialize=["n_batch"])
def _coupling_mix_backward_dot_kernel(
    moved_ptr, kept_ptr, shift_ptr, raw_ptr, weight_moved_ptr, weight_kept_ptr, grad_ptr, h_ptr, dx_moved_ptr,
    dx_kept_ptr, dshift_ptr, draw_ptr, u_moved_ptr, u_kept_ptr, n_moved, n_kept, n_out, n_batch, n_positions,
    stride_xb, stride_xc, stride_xp, stride_pb, stride_pc, stride_pp, stride_wo, stride_wc, stride_gb, stride_gc,
    stride_gp, stride_hb, stride_db, stride_dc, stride_dp, stride_qb, stride_qc, stride_qp, bound, floor,
    KIND: tl.constexpr, SCALE_FIRST: tl.constexpr, INVERSE: tl.constexpr, LOG_DET: tl.constexpr,
    KEEP_U: tl.constexpr, HALF: tl.constexpr, MERGED: tl.constexpr, INT64: tl.constexpr, OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    n_columns = count_columns(n_batch, n_positions, INT64)
    n = column_numbers(COLUMNS, INT64)
    c = tl.arange(0, OUTPUTS)
    k = tl.arange(0, DEPTH)
    if INT64:
        c, k = c.to(tl.int64), k.to(tl.int64)
    inside = (n < n_columns)[None, :]
    g_at = column_offsets(n, n_positions, stride_gb, stride_gp, MERGED)[None, :]
    du_moved = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    du_kept = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    for first in range(0, n_out, DEPTH):
        o = first + k
        g = tl.load(grad_ptr + g_at + o[:, None] * stride_gc, mask=(o < n_out)[:, None] & inside, other=0.0)
        du_moved = dot_chunk(du_moved, weight_moved_ptr, c, o, n_moved, n_out, stride_wc, stride_wo, g, HALF)
        du_kept = dot_chunk(du_kept, weight_kept_ptr, c, o, n_kept, n_out, stride_wc, stride_wo, g, HALF)

    x_at = column_offsets(n, n_positions, stride_xb, stride_xp, MERGED)[None, :] + c[:, None] * stride_xc
    d_at = column_offsets(n, n_positions, stride_db, stride_dp, MERGED)[None, :] + c[:, None] * stride_dc
    kept = (c < n_kept)[:, None] & inside
    tl.store(dx_kept_ptr + d_at, du_kept.to(dx_kept_ptr.dtype.element_ty), mask=kept)
    if KEEP_U:
        tl.store(u_kept_ptr + d_at, tl.load(kept_ptr + x_at, mask=kept), mask=kept)

    p_at = column_offsets(n, n_positions, stride_pb, stride_pp, MERGED)[None, :] + c[:, None] * stride_pc
    q_at = column_offsets(n, n_positions, stride_qb, stride_qp, MERGED)[None, :] + c[:, None] * stride_qc
    moves = (c < n_moved)[:, None] & inside
    h = _column_log_det_gradient(h_ptr, n[None, :], n_positions, stride_hb, inside, LOG_DET)
    u, shift, raw, log_s = load_coupled(
        moved_ptr + x_at, shift_ptr + p_at, raw_ptr + p_at, moves, bound, floor, KIND, SCALE_FIRST, INVERSE
    )
    _store_moved(
        u, shift, raw, log_s, du_moved, h, dx_moved_ptr + d_at, dshift_ptr + q_at, draw_ptr + q_at,
        u_moved_ptr + d_at, moves, bound, floor, KIND, SCALE_FIRST, INVERSE, KEEP_U,
    )  # fmt: skip


def launch_coupling_mix_backward(
    x: Tensor, params: Tensor, weight: Tensor, grad: Tensor | None, grad_log_det: Tensor | None, *constants: Any
) -> tuple[Tensor | None, ...]:
    """(dx, dparams, dweight, dbias); None for those that are not needed. A gradient that is None is zero."""
    spec, needs = CouplingSpec(*constants[:-1]), constants[-1]
    needs_inputs, (needs_weight, needs_bias) = needs[0] or needs[1], needs[2:]
    if grad is None:
        grad = x.new_zeros(()).expand(x.shape[0], weight.shape[0], *x.shape[2:])
    dx = with_channels(x, x.shape[1]) if needs_inputs else x.new_empty(0)
    dparams = like(params) if needs_inputs else params.new_empty(0)
    u = x
    if needs_inputs and x.numel():
        u = with_channels(x, x.shape[1]) if needs_weight else dx
        _backward(x, params, weight, grad, grad_log_det, dx, dparams, u, spec)
    elif needs_weight:
        u, _ = launch_affine_coupling(x, params, *spec._replace(log_det=False))
    _, dweight, dbias = launch_channel_mix_backward(u, weight, grad, [False, needs_weight, needs_bias])
    return dx if needs[0] else None, dparams if needs[1] else None, dweight, dbias


def _backward(
    x: Tensor, params: Tensor, weight: Tensor, grad: Tensor, grad_log_det: Tensor | None, dx: Tensor,
    dparams: Tensor, u: Tensor, spec: CouplingSpec,
) -> None:  # fmt: skip
    """Write dx, dparams and, unless it is dx itself, u, which has dx's strides."""
    x_view, g_view, d_view, u_view = (positions(t) for t in (x, grad, dx, u))
    shift, raw = spec.shift_and_raw(positions(params))
    dshift, draw = spec.shift_and_raw(positions(dparams))
    n_out, n_in = weight.shape
    unrolled, tile = tile_of(x_view, n_out, (n_in + 1) // 2, BACKWARD_DOTS)
    h = grad if grad_log_det is None else grad_log_det
    views = (x_view, shift, g_view, d_view, dshift)
    grid, sizes, options = columns_of(tile, views, (x, params, weight, grad, dx, dparams))
    sizes += (
        *column_strides(x_view), *column_strides(shift), *weight.stride(), *column_strides(g_view), h.stride(0),
        *column_strides(d_view), *column_strides(dshift), spec.bound, spec.floor,
    )  # fmt: skip
    options |= {**spec.constexprs, "LOG_DET": grad_log_det is not None, "KEEP_U": u is not dx}
    if unrolled:
        _coupling_mix_backward_unrolled_kernel[grid](
            x_view, shift, raw, weight, g_view, h, d_view, dshift, draw, u_view, *sizes,
            N_IN=n_in, N_OUT=n_out, MOVES_SECOND=spec.moves_second, **options,
        )  # fmt: skip
        return
    moved, kept = spec.halves(x_view)
    _coupling_mix_backward_dot_kernel[grid](
        moved, kept, shift, raw, *spec.halves(weight), g_view, h, *spec.halves(d_view), dshift, draw,
        *spec.halves(u_view), moved.shape[1], kept.shape[1], n_out, *sizes,
        HALF=half_precision(grad, weight), **options,
    )  # fmt: skip
