"""A bias, batch norm and an activation on x [B, H], one launch forward and one backward.

With the statistics m, v of a column over the batch, or given ones, and r = (v + eps)^-1/2:

    z = x + b        h = (z - m) r        u = h w + s        y = act(u)         without a norm u = z

Gradients, with d = act'(u) dL/dy, S1 = sum(d) and S2 = sum(d h) over the batch:

    given m, v   dx = w r d                                db = w r S1     ds = S1    dw = S2
    of the batch dx = w r (d - S1 / B - h S2 / B)          db = 0          ds = S1    dw = S2
    no norm      dx = d                                    db = S1

x, m and v are saved, but not z, h or u. Bytes in fp32: 8 B H forward, 12 B H backward; a batch's statistics read x
again, mostly from L2. A program takes some columns: all rows where it sums over them, else one tile of rows. The
variance is computed from centred values; sums are added in the order of the rows: no atomics, the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, ceil_div, needs_int64
from .masked_steps import ELU, activate
from .math import EXACT, exp
from .mlp import activation_derivative

# A program that sums over all rows takes few columns, so that 512 columns occupy 64 processors; 8 columns of fp32
# are one sector of memory. A program that takes one tile of rows reads whole lines.
SUMMING = {"ROWS": 256, "COLUMNS": 8, "num_warps": 8}
ELEMENTWISE = {"ROWS": 16, "COLUMNS": 64, "num_warps": 4}

# What normalises: linfast.ops.norm_activate has the names.
GIVEN, OF_BATCH = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def part_of(width, rows_each, COLUMNS: tl.constexpr, INT64: tl.constexpr):
    """(the columns [1, COLUMNS] of this program, which of them exist, its first row)."""
    blocks = tl.cdiv(width, COLUMNS)
    at = tl.program_id(0)
    c = at % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    c = c.to(tl.int64) if INT64 else c
    return c, c < width, at // blocks * rows_each


@triton.jit
def rows_at(b0, batch, ROWS: tl.constexpr, INT64: tl.constexpr):
    """(ROWS rows from b0 on, [ROWS, 1], which of them exist)."""
    b = b0 + tl.arange(0, ROWS)[:, None]
    b = b.to(tl.int64) if INT64 else b
    return b, b < batch


@triton.jit
def load_columns(ptr, c, inside, otherwise):
    """A parameter of the columns [1, COLUMNS], fp32; ``otherwise`` where it is not given."""
    if ptr is not None:
        value = tl.load(ptr + c, mask=inside, other=otherwise).to(tl.float32)
    else:
        value = tl.full(c.shape, otherwise, tl.float32)
    return value


@triton.jit
def _reciprocal_deviation(var, batch, eps, NORM: tl.constexpr):
    """r from a given variance, or from the unbiased variance of the batch."""
    if NORM == OF_BATCH:
        var = var * ((batch - 1.0) / batch)
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _slope(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == ELU:
        result = tl.where(u > 0.0, 1.0, exp(u))
    else:
        result = activation_derivative(u, ACTIVATION)
    return result


@triton.jit(do_not_specialize=["batch", "rows_each"])
def _norm_activate_kernel(
    x_ptr, bias_ptr, weight_ptr, shift_ptr, given_mean_ptr, given_var_ptr, y_ptr, mean_ptr, var_ptr, batch, width,
    rows_each, stride_xb, stride_xc, stride_yb, stride_yc, eps, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c, is_column, first = part_of(width, rows_each, COLUMNS, INT64)
    last = tl.minimum(first + rows_each, batch)
    bias = load_columns(bias_ptr, c, is_column, 0.0)
    x_ptr += c * stride_xc
    y_ptr += c * stride_yc
    if NORM == OF_BATCH:
        total = tl.zeros((1, COLUMNS), tl.float32)
        for b0 in range(first, last, ROWS):
            b, is_row = rows_at(b0, batch, ROWS, INT64)
            z = tl.load(x_ptr + b * stride_xb, mask=is_row & is_column, other=0.0).to(tl.float32) + bias
            total += tl.sum(tl.where(is_row, z, 0.0), 0)[None, :]
        mean = total / batch
        squares = tl.zeros((1, COLUMNS), tl.float32)
        for b0 in range(first, last, ROWS):
            b, is_row = rows_at(b0, batch, ROWS, INT64)
            z = tl.load(x_ptr + b * stride_xb, mask=is_row & is_column, other=0.0).to(tl.float32) + bias
            centred = tl.where(is_row, z - mean, 0.0)
            squares += tl.sum(centred * centred, 0)[None, :]
        var = squares / (batch - 1.0)
        tl.store(mean_ptr + c, mean, mask=is_column)
        tl.store(var_ptr + c, var, mask=is_column)
    if NORM == GIVEN:
        mean = load_columns(given_mean_ptr, c, is_column, 0.0)
        var = load_columns(given_var_ptr, c, is_column, 1.0)
    if NORM:
        gain = _reciprocal_deviation(var, batch, eps, NORM)
        weight = load_columns(weight_ptr, c, is_column, 1.0)
        shift = load_columns(shift_ptr, c, is_column, 0.0)
    for b0 in range(first, last, ROWS):
        b, is_row = rows_at(b0, batch, ROWS, INT64)
        u = tl.load(x_ptr + b * stride_xb, mask=is_row & is_column, other=0.0).to(tl.float32) + bias
        if NORM:
            u = (u - mean) * gain * weight + shift
        y = activate(u, ACTIVATION, EXACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + b * stride_yb, y, mask=is_row & is_column)


@triton.jit
def _d_and_h(
    x_ptr, grad_ptr, inside, bias, mean, gain, weight, shift, NORM: tl.constexpr, ACTIVATION: tl.constexpr
):
    """d = act'(u) dL/dy and h, from x and the gradient of y."""
    h = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32) + bias
    grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        h = (h - mean) * gain
        u = h * weight + shift
    else:
        u = h
    return tl.where(inside, grad * _slope(u, ACTIVATION), 0.0), h


@triton.jit(do_not_specialize=["batch", "rows_each"])
def _norm_activate_backward_kernel(
    x_ptr, bias_ptr, weight_ptr, shift_ptr, mean_ptr, var_ptr, grad_ptr, dx_ptr, dbias_ptr, dweight_ptr, dshift_ptr,
    batch, width, rows_each, stride_xb, stride_xc, stride_gb, stride_gc, stride_db, stride_dc, eps,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, SUMS: tl.constexpr, INPUT: tl.constexpr, INT64: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c, is_column, first = part_of(width, rows_each, COLUMNS, INT64)
    last = tl.minimum(first + rows_each, batch)
    bias = load_columns(bias_ptr, c, is_column, 0.0)
    mean = load_columns(mean_ptr, c, is_column, 0.0)
    weight = load_columns(weight_ptr, c, is_column, 1.0)
    shift = load_columns(shift_ptr, c, is_column, 0.0)
    gain = tl.full((1, COLUMNS), 1.0, tl.float32)
    if NORM:
        gain = _reciprocal_deviation(load_columns(var_ptr, c, is_column, 1.0), batch, eps, NORM)
    x_ptr += c * stride_xc
    grad_ptr += c * stride_gc
    dx_ptr += c * stride_dc
    sum_d = tl.zeros((1, COLUMNS), tl.float32)
    sum_dh = tl.zeros((1, COLUMNS), tl.float32)
    if SUMS:
        for b0 in range(first, last, ROWS):
            b, is_row = rows_at(b0, batch, ROWS, INT64)
            d, h = _d_and_h(
                x_ptr + b * stride_xb, grad_ptr + b * stride_gb, is_row & is_column, bias, mean, gain, weight,
                shift, NORM, ACTIVATION,
            )  # fmt: skip
            sum_d += tl.sum(d, 0)[None, :]
            sum_dh += tl.sum(d * h, 0)[None, :]
        if dbias_ptr is not None:
            scaled = tl.zeros_like(sum_d) if NORM == OF_BATCH else sum_d * (weight * gain)
            tl.store(dbias_ptr + c, scaled, mask=is_column)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + c, sum_dh, mask=is_column)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + c, sum_d, mask=is_column)
    if INPUT:
        for b0 in range(first, last, ROWS):
            b, is_row = rows_at(b0, batch, ROWS, INT64)
            d, h = _d_and_h(
                x_ptr + b * stride_xb, grad_ptr + b * stride_gb, is_row & is_column, bias, mean, gain, weight,
                shift, NORM, ACTIVATION,
            )  # fmt: skip
            if NORM == OF_BATCH:
                d = d - sum_d / batch - h * (sum_dh / batch)
            if NORM:
                d = d * (weight * gain)
            tl.store(dx_ptr + b * stride_db, d.to(dx_ptr.dtype.element_ty), mask=is_row & is_column)


def grid_of(x: Tensor, sums: bool) -> tuple[tuple[int], int, dict[str, int]]:
    """(grid, rows per program, tile) for x [B, H]; ``sums``: a program takes all rows of its columns."""
    tile = SUMMING if sums else ELEMENTWISE
    rows = max(x.shape[0], 1) if sums else tile["ROWS"]
    return (ceil_div(x.shape[1], tile["COLUMNS"]) * ceil_div(x.shape[0], rows),), rows, tile


def _contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if parameter is None else parameter.contiguous() for parameter in parameters]


def launch_norm_activate(
    x: Tensor, bias: Tensor | None, weight: Tensor | None, shift: Tensor | None, mean: Tensor | None,
    var: Tensor | None, norm: int, eps: float, activation: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(y like x, mean and unbiased variance [H] fp32 of the batch, or None)."""
    y, parameters = torch.empty_like(x), _contiguous(bias, weight, shift, mean, var)
    of_batch = norm == OF_BATCH.value
    found = [x.new_empty(x.shape[1], dtype=torch.float32) if of_batch else None for _ in range(2)]
    if x.numel() > 0:
        grid, rows, tile = grid_of(x, of_batch)
        _norm_activate_kernel[grid](
            x, *parameters, y, *found, *x.shape, rows, *x.stride(), *y.stride(), eps, NORM=norm,
            ACTIVATION=activation, INT64=needs_int64(x, y), **tile, **UNFUSED,
        )  # fmt: skip
    return y, *found


def launch_norm_activate_backward(
    x: Tensor, bias: Tensor | None, weight: Tensor | None, shift: Tensor | None, mean: Tensor | None,
    var: Tensor | None, batch_mean: Tensor, batch_var: Tensor, grad: Tensor | None, grad_mean: Tensor | None,
    grad_var: Tensor | None, norm: int, eps: float, activation: int, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dbias, dweight, dshift, None, None); None where not needed. No caller differentiates the statistics."""
    of_batch = norm == OF_BATCH.value
    statistics = (batch_mean, batch_var) if of_batch else (mean, var)
    parameters = _contiguous(bias, weight, shift, *statistics)
    g = x.new_zeros(()).expand_as(x) if grad is None else grad
    dx = torch.empty_like(x)
    made = x.new_zeros if x.numel() == 0 else x.new_empty
    sums = [made(x.shape[1], dtype=torch.float32) if need else None for need in needs[1:4]]
    if x.numel() > 0:
        summing = of_batch or any(needs[1:4])
        grid, rows, tile = grid_of(x, summing)
        _norm_activate_backward_kernel[grid](
            x, *parameters, g, dx, *sums, *x.shape, rows, *x.stride(), *g.stride(), *dx.stride(), eps, NORM=norm,
            ACTIVATION=activation, SUMS=summing, INPUT=needs[0], INT64=needs_int64(x, g, dx), **tile, **UNFUSED,
        )  # fmt: skip
    of_parameters = zip(sums, (bias, weight, shift), strict=True)
    gradients = [s if s is None or t is None else s.to(t.dtype) for s, t in of_parameters]
    return dx if needs[0] else None, *gradients, None, None
