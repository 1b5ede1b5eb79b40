"""What lies between two linear layers of a residual network, on [B, H], one launch forward and one backward.

With s = sigmoid(g), the statistics m, v of a column over the batch, or given ones, and r = (v + eps)^-1/2:

    u = k + (x + b) s        h = (u - m) r        n = h w + t        y = act(n)         without a norm n = u

k is the skip, g the gate [B or 1, H], b, w and t are [H]; without them k = 0 and s = 1. u is stored in x's dtype
where it is an output, and what follows is computed from the stored value. Gradients, with d = act'(n) dL/dy,
S1 = sum(d) and S2 = sum(d h) over the batch:

    given m, v   a = w r d                                 dt = S1    dw = S2
    of the batch a = w r (d - S1 / B - h S2 / B)           dt = S1    dw = S2
    no norm      a = d
    then         e = a + dL/du        dk = e        dx = e s        db = sum(dx)        dg = e (x + b) s (1 - s)

and dg is summed over the batch where g is one row. Saved: u where it is an output, otherwise x; x also with a gate;
m and v. Bytes in fp32: 4 B H for each matrix that is read or written; a batch's statistics read u again, mostly
from L2. A program takes some columns: all rows where it sums over them, else one tile of rows. The variance is
computed from centred values; sums are added in the order of the rows: no atomics, the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, ceil_div, needs_int64
from .masked_steps import ELU, activate
from .math import EXACT, exp, sigmoid
from .mlp import activation_derivative

# A program that sums over all rows takes few columns, so that 512 columns occupy 64 processors; 8 columns of fp32
# are one sector of memory. A program that takes one tile of rows reads whole lines.
SUMMING = {"ROWS": 256, "COLUMNS": 8, "num_warps": 8}
ELEMENTWISE = {"ROWS": 16, "COLUMNS": 64, "num_warps": 4}

# What normalises: linfast.ops.norm_activate has the names.
GIVEN, OF_BATCH = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _part_of(width, rows_each, COLUMNS: tl.constexpr, INT64: tl.constexpr):
    """(the columns [1, COLUMNS] of this program, which of them exist, its first row)."""
    blocks = tl.cdiv(width, COLUMNS)
    at = tl.program_id(0)
    c = at % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    c = c.to(tl.int64) if INT64 else c
    return c, c < width, at // blocks * rows_each


@triton.jit
def _rows_at(b0, batch, ROWS: tl.constexpr, INT64: tl.constexpr):
    """(ROWS rows from b0 on, [ROWS, 1], which of them exist)."""
    b = b0 + tl.arange(0, ROWS)[:, None]
    b = b.to(tl.int64) if INT64 else b
    return b, b < batch


@triton.jit
def _load_columns(ptr, c, inside, otherwise):
    """A parameter of the columns [1, COLUMNS], fp32; ``otherwise`` where it is not given."""
    if ptr is not None:
        value = tl.load(ptr + c, mask=inside, other=otherwise).to(tl.float32)
    else:
        value = tl.full(c.shape, otherwise, tl.float32)
    return value


@triton.jit
def _load(ptr, b, c, stride_b, stride_c, inside):
    return tl.load(ptr + b * stride_b + c * stride_c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, b, c, stride_b, stride_c, value, inside):
    tl.store(ptr + b * stride_b + c * stride_c, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _reciprocal_deviation(var, batch, eps, NORM: tl.constexpr):
    """r from a given variance, or from the unbiased variance of the batch."""
    if NORM == OF_BATCH:
        var = var * ((batch - 1.0) / batch)
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _slope(n, ACTIVATION: tl.constexpr):
    if ACTIVATION == ELU:
        result = tl.where(n > 0.0, 1.0, exp(n))
    else:
        result = activation_derivative(n, ACTIVATION)
    return result


@triton.jit
def _sum_at(
    x_ptr, skip_ptr, gate_ptr, u_ptr, b, c, inside, bias, stride_xb, stride_xc, stride_kb, stride_kc, stride_gb,
    stride_gc, stride_ob, stride_oc, AGAIN: tl.constexpr,
):  # fmt: skip
    """u, which is stored where it is an output; ``AGAIN``: it was stored before."""
    if AGAIN and u_ptr is not None:
        u = _load(u_ptr, b, c, stride_ob, stride_oc, inside)
    else:
        u = _load(x_ptr, b, c, stride_xb, stride_xc, inside) + bias
        if gate_ptr is not None:
            u = u * sigmoid(_load(gate_ptr, b, c, stride_gb, stride_gc, inside))
        if skip_ptr is not None:
            u = _load(skip_ptr, b, c, stride_kb, stride_kc, inside) + u
        if u_ptr is not None:
            _store(u_ptr, b, c, stride_ob, stride_oc, u, inside)
            u = u.to(u_ptr.dtype.element_ty).to(tl.float32)
    return u


@triton.jit(do_not_specialize=["batch", "rows_each"])
def _norm_activate_kernel(
    x_ptr, bias_ptr, skip_ptr, gate_ptr, weight_ptr, shift_ptr, given_mean_ptr, given_var_ptr, u_ptr, y_ptr,
    mean_ptr, var_ptr, batch, width, rows_each, stride_xb, stride_xc, stride_kb, stride_kc, stride_gb, stride_gc,
    stride_ob, stride_oc, eps, NORM: tl.constexpr, ACTIVATION: tl.constexpr, INT64: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c, is_column, first = _part_of(width, rows_each, COLUMNS, INT64)
    last = tl.minimum(first + rows_each, batch)
    bias = _load_columns(bias_ptr, c, is_column, 0.0)
    if NORM == OF_BATCH:
        total = tl.zeros((1, COLUMNS), tl.float32)
        for b0 in range(first, last, ROWS):
            b, is_row = _rows_at(b0, batch, ROWS, INT64)
            u = _sum_at(
                x_ptr, skip_ptr, gate_ptr, u_ptr, b, c, is_row & is_column, bias, stride_xb, stride_xc, stride_kb,
                stride_kc, stride_gb, stride_gc, stride_ob, stride_oc, False,
            )  # fmt: skip
            total += tl.sum(tl.where(is_row, u, 0.0), 0)[None, :]
        mean = total / batch
        tl.debug_barrier()  # other threads may have stored the u that one reads from here on
        squares = tl.zeros((1, COLUMNS), tl.float32)
        for b0 in range(first, last, ROWS):
            b, is_row = _rows_at(b0, batch, ROWS, INT64)
            u = _sum_at(
                x_ptr, skip_ptr, gate_ptr, u_ptr, b, c, is_row & is_column, bias, stride_xb, stride_xc, stride_kb,
                stride_kc, stride_gb, stride_gc, stride_ob, stride_oc, True,
            )  # fmt: skip
            centred = tl.where(is_row, u - mean, 0.0)
            squares += tl.sum(centred * centred, 0)[None, :]
        var = squares / (batch - 1.0)
        tl.store(mean_ptr + c, mean, mask=is_column)
        tl.store(var_ptr + c, var, mask=is_column)
    if NORM == GIVEN:
        mean = _load_columns(given_mean_ptr, c, is_column, 0.0)
        var = _load_columns(given_var_ptr, c, is_column, 1.0)
    if NORM:
        gain = _reciprocal_deviation(var, batch, eps, NORM)
        weight = _load_columns(weight_ptr, c, is_column, 1.0)
        shift = _load_columns(shift_ptr, c, is_column, 0.0)
    for b0 in range(first, last, ROWS):
        b, is_row = _rows_at(b0, batch, ROWS, INT64)
        n = _sum_at(
            x_ptr, skip_ptr, gate_ptr, u_ptr, b, c, is_row & is_column, bias, stride_xb, stride_xc, stride_kb,
            stride_kc, stride_gb, stride_gc, stride_ob, stride_oc, NORM == OF_BATCH,
        )  # fmt: skip
        if NORM:
            n = (n - mean) * gain * weight + shift
        if y_ptr is not None:
            _store(y_ptr, b, c, stride_ob, stride_oc, activate(n, ACTIVATION, EXACT), is_row & is_column)


@triton.jit
def _d_and_h(
    u_ptr, grad_ptr, b, c, stride_ub, stride_uc, stride_yb, stride_yc, inside, bias, mean, gain, weight, shift,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """d = act'(n) dL/dy and h, from u - bias and the gradient of y."""
    h = _load(u_ptr, b, c, stride_ub, stride_uc, inside) + bias
    grad = _load(grad_ptr, b, c, stride_yb, stride_yc, inside)
    if NORM:
        h = (h - mean) * gain
        n = h * weight + shift
    else:
        n = h
    return tl.where(inside, grad * _slope(n, ACTIVATION), 0.0), h


@triton.jit(do_not_specialize=["batch", "rows_each"])
def _norm_activate_backward_kernel(
    u_ptr, x_ptr, bias_ptr, gate_ptr, weight_ptr, shift_ptr, mean_ptr, var_ptr, grad_u_ptr, grad_y_ptr, dx_ptr,
    dbias_ptr, dskip_ptr, dgate_ptr, dweight_ptr, dshift_ptr, batch, width, rows_each, stride_ub, stride_uc,
    stride_xb, stride_xc, stride_gb, stride_gc, stride_sb, stride_sc, stride_yb, stride_yc, stride_db, stride_dc,
    stride_dgb, stride_dgc, eps, NORM: tl.constexpr, ACTIVATION: tl.constexpr, WITH_SUM: tl.constexpr,
    ONE_GATE: tl.constexpr, INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """u_ptr holds u ``WITH_SUM``, otherwise x."""
    c, is_column, first = _part_of(width, rows_each, COLUMNS, INT64)
    last = tl.minimum(first + rows_each, batch)
    bias = _load_columns(bias_ptr, c, is_column, 0.0)
    rest = tl.zeros((1, COLUMNS), tl.float32) if WITH_SUM else bias
    mean = _load_columns(mean_ptr, c, is_column, 0.0)
    weight = _load_columns(weight_ptr, c, is_column, 1.0)
    shift = _load_columns(shift_ptr, c, is_column, 0.0)
    gain = tl.full((1, COLUMNS), 1.0, tl.float32)
    if NORM:
        gain = _reciprocal_deviation(_load_columns(var_ptr, c, is_column, 1.0), batch, eps, NORM)
    sum_d = tl.zeros((1, COLUMNS), tl.float32)
    sum_dh = tl.zeros((1, COLUMNS), tl.float32)
    sum_x = tl.zeros((1, COLUMNS), tl.float32)
    sum_g = tl.zeros((1, COLUMNS), tl.float32)
    if NORM == OF_BATCH and grad_y_ptr is not None:
        for b0 in range(first, last, ROWS):
            b, is_row = _rows_at(b0, batch, ROWS, INT64)
            d, h = _d_and_h(
                u_ptr, grad_y_ptr, b, c, stride_ub, stride_uc, stride_yb, stride_yc, is_row & is_column, rest, mean,
                gain, weight, shift, NORM, ACTIVATION,
            )  # fmt: skip
            sum_d += tl.sum(d, 0)[None, :]
            sum_dh += tl.sum(d * h, 0)[None, :]
    for b0 in range(first, last, ROWS):
        b, is_row = _rows_at(b0, batch, ROWS, INT64)
        inside = is_row & is_column
        e = tl.zeros((ROWS, COLUMNS), tl.float32)
        if grad_u_ptr is not None:
            e = _load(grad_u_ptr, b, c, stride_sb, stride_sc, inside)
        of_bias = e
        if grad_y_ptr is not None:
            d, h = _d_and_h(
                u_ptr, grad_y_ptr, b, c, stride_ub, stride_uc, stride_yb, stride_yc, inside, rest, mean, gain,
                weight, shift, NORM, ACTIVATION,
            )  # fmt: skip
            if NORM == OF_BATCH:
                d = tl.where(inside, d - sum_d / batch - h * (sum_dh / batch), 0.0)
            elif dshift_ptr is not None:
                sum_d += tl.sum(d, 0)[None, :]
            if NORM != OF_BATCH and dweight_ptr is not None:
                sum_dh += tl.sum(d * h, 0)[None, :]
            if NORM:
                d = d * (weight * gain)
            e += d
            if NORM != OF_BATCH:  # of which the sum over the batch is 0
                of_bias = e
        if dskip_ptr is not None:
            _store(dskip_ptr, b, c, stride_db, stride_dc, e, inside)
        if gate_ptr is not None:
            s = sigmoid(_load(gate_ptr, b, c, stride_gb, stride_gc, inside))
            e *= s
            of_bias = e
            if dgate_ptr is not None:
                dgate = e * (_load(x_ptr, b, c, stride_xb, stride_xc, inside) + bias) * (1.0 - s)
                if ONE_GATE:
                    sum_g += tl.sum(dgate, 0)[None, :]
                else:
                    _store(dgate_ptr, b, c, stride_dgb, stride_dgc, dgate, inside)
        if dx_ptr is not None:
            _store(dx_ptr, b, c, stride_db, stride_dc, e, inside)
        if dbias_ptr is not None:
            sum_x += tl.sum(of_bias, 0)[None, :]
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_x, mask=is_column)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, sum_dh, mask=is_column)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + c, sum_d, mask=is_column)
    if ONE_GATE and dgate_ptr is not None:
        tl.store(dgate_ptr + c, sum_g, mask=is_column)


def _grid_of(x: Tensor, sums: bool) -> tuple[tuple[int], int, dict[str, int]]:
    """(grid, rows per program, tile) for x [B, H]; ``sums``: a program takes all rows of its columns."""
    tile = SUMMING if sums else ELEMENTWISE
    rows = max(x.shape[0], 1) if sums else tile["ROWS"]
    return (ceil_div(x.shape[1], tile["COLUMNS"]) * ceil_div(x.shape[0], rows),), rows, tile


def _contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if parameter is None else parameter.contiguous() for parameter in parameters]


def _strides(*tensors: Tensor | None) -> list[int]:
    """Those of each tensor; 0 for None."""
    return [stride for t in tensors for stride in ((0, 0) if t is None else t.stride())]


def _rows_of(gate: Tensor | None, x: Tensor) -> Tensor | None:
    """The gate of every row: a single one is repeated, with a stride of 0."""
    return gate if gate is None else gate.expand(x.shape)


def launch_norm_activate(
    x: Tensor, bias: Tensor | None, skip: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    shift: Tensor | None, mean: Tensor | None, var: Tensor | None, norm: int, eps: float, activation: int,
    with_sum: bool, y: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(u and y like x, mean and unbiased variance [H] fp32 of the batch), or None; ``y``: memory for y."""
    of_batch = norm == OF_BATCH.value
    u = torch.empty_like(x) if with_sum else None
    y = torch.empty_like(x) if activation >= 0 and y is None else y
    found = [x.new_empty(x.shape[1], dtype=torch.float32) if of_batch else None for _ in range(2)]
    if x.numel() > 0:
        grid, rows, tile = _grid_of(x, of_batch)
        bias, *parameters = _contiguous(bias, weight, shift, mean, var)
        gate = _rows_of(gate, x)
        _norm_activate_kernel[grid](
            x, bias, skip, gate, *parameters, u, y, *found, *x.shape, rows,
            *_strides(x, skip, gate, u if y is None else y), eps, NORM=norm, ACTIVATION=activation,
            INT64=needs_int64(x, skip, gate, u, y), **tile, **UNFUSED,
        )  # fmt: skip
    return u, y, *found


def launch_norm_activate_backward(
    u: Tensor, x: Tensor | None, bias: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    shift: Tensor | None, mean: Tensor | None, var: Tensor | None, batch_mean: Tensor, batch_var: Tensor,
    grad_u: Tensor | None, grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, norm: int,
    eps: float, activation: int, with_sum: bool, needs: Sequence[bool], dx: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dbias, dskip, dgate, dweight, dshift, None, None); None where not needed.

    x is None where it is not saved; ``dx``: memory for dx. No caller differentiates the statistics.
    """
    of_batch = norm == OF_BATCH.value
    stored: Any = u if with_sum else x
    statistics = (batch_mean, batch_var) if of_batch else (mean, var)
    made = stored.new_zeros if stored.numel() == 0 else stored.new_empty
    dx = torch.empty_like(stored) if needs[0] and dx is None else dx
    dskip = torch.empty_like(stored) if needs[2] else None
    sums = [made(stored.shape[1], dtype=torch.float32) if needs[i] else None for i in (1, 4, 5)]
    one, dgate = gate is not None and gate.shape[0] == 1, None
    if needs[3] and gate is not None:
        dgate = made(gate.shape, dtype=torch.float32) if one else torch.empty_like(gate)
    if stored.numel() > 0:
        summing = of_batch or any(s is not None for s in sums) or (one and needs[3])
        grid, rows, tile = _grid_of(stored, summing)
        bias_, *parameters = _contiguous(bias, weight, shift, *statistics)
        gates = _rows_of(gate, stored)
        _norm_activate_backward_kernel[grid](
            stored, x if needs[3] else None, bias_, gates, *parameters, grad_u, grad_y, dx, sums[0], dskip, dgate,
            *sums[1:], *stored.shape, rows,
            *_strides(stored, x, gates, grad_u, grad_y, dskip if dx is None else dx, dgate), eps, NORM=norm,
            ACTIVATION=activation, WITH_SUM=with_sum, ONE_GATE=one,
            INT64=needs_int64(stored, x, gates, grad_u, grad_y, dx, dskip, dgate), **tile, **UNFUSED,
        )  # fmt: skip
    found = zip((sums[0], dgate, *sums[1:]), (bias, gate, weight, shift), strict=True)
    dbias, dgate, *of_norm = [s if s is None or t is None else s.to(t.dtype) for s, t in found]
    return dx, dbias, dskip, dgate, *of_norm, None, None
