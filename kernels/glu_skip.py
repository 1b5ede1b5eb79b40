"""The end of a gated residual block on [B, H], one launch forward and one backward.

    out = h + (r + b) s,  s = sigmoid(g)        r, h [B, H], b [H], g [B or 1, H]

Gradients, with d = dL/dout:

    dh = d        dr = d s        db = sum_b dr        dg = d (r + b) s (1 - s), summed over b where g is one row

r, b and g are saved. Bytes in fp32: 16 B H forward, 24 B H backward. A program takes a tile of rows and columns, or
all rows of its columns where it sums over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, needs_int64
from .math import sigmoid
from .norm_activate import grid_of, load_columns, part_of, rows_at


@triton.jit(do_not_specialize=["batch", "rows_each"])
def _glu_skip_kernel(
    h_ptr, r_ptr, bias_ptr, gate_ptr, out_ptr, batch, width, rows_each, stride_hb, stride_hc, stride_rb, stride_rc,
    stride_gb, stride_gc, stride_ob, stride_oc, INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c, is_column, first = part_of(width, rows_each, COLUMNS, INT64)
    b, is_row = rows_at(first, batch, ROWS, INT64)
    inside = is_row & is_column
    h = tl.load(h_ptr + b * stride_hb + c * stride_hc, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + b * stride_rb + c * stride_rc, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + b * stride_gb + c * stride_gc, mask=inside, other=0.0).to(tl.float32)
    out = h + (r + load_columns(bias_ptr, c, is_column, 0.0)) * sigmoid(g)
    tl.store(out_ptr + b * stride_ob + c * stride_oc, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "rows_each"])
def _glu_skip_backward_kernel(
    r_ptr, bias_ptr, gate_ptr, grad_ptr, dh_ptr, dr_ptr, dbias_ptr, dgate_ptr, batch, width, rows_each, stride_rb,
    stride_rc, stride_gb, stride_gc, stride_db, stride_dc, stride_hb, stride_hc, stride_rgb, stride_rgc, stride_ggb,
    stride_ggc, ONE_GATE: tl.constexpr, INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c, is_column, first = part_of(width, rows_each, COLUMNS, INT64)
    bias = load_columns(bias_ptr, c, is_column, 0.0)
    sum_r = tl.zeros((1, COLUMNS), tl.float32)
    sum_g = tl.zeros((1, COLUMNS), tl.float32)
    for b0 in range(first, tl.minimum(first + rows_each, batch), ROWS):
        b, is_row = rows_at(b0, batch, ROWS, INT64)
        inside = is_row & is_column
        d = tl.load(grad_ptr + b * stride_db + c * stride_dc, mask=inside, other=0.0).to(tl.float32)
        s = sigmoid(tl.load(gate_ptr + b * stride_gb + c * stride_gc, mask=inside, other=0.0).to(tl.float32))
        dr = d * s
        if dh_ptr is not None:
            tl.store(dh_ptr + b * stride_hb + c * stride_hc, d.to(dh_ptr.dtype.element_ty), mask=inside)
        if dr_ptr is not None:
            tl.store(dr_ptr + b * stride_rgb + c * stride_rgc, dr.to(dr_ptr.dtype.element_ty), mask=inside)
        if dbias_ptr is not None:
            sum_r += tl.sum(dr, 0)[None, :]
        if dgate_ptr is not None:
            r = tl.load(r_ptr + b * stride_rb + c * stride_rc, mask=inside, other=0.0).to(tl.float32)
            dg = dr * (r + bias) * (1.0 - s)
            if ONE_GATE:
                sum_g += tl.sum(dg, 0)[None, :]
            else:
                to = dgate_ptr + b * stride_ggb + c * stride_ggc
                tl.store(to, dg.to(dgate_ptr.dtype.element_ty), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_r, mask=is_column)
    if ONE_GATE and dgate_ptr is not None:
        tl.store(dgate_ptr + c, sum_g, mask=is_column)


def _row_strides(gate: Tensor) -> tuple[int, int]:
    """The strides of the gate; 0 for the rows of a single one."""
    return (0 if gate.shape[0] == 1 else gate.stride(0)), gate.stride(1)


def launch_glu_skip(h: Tensor, r: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """out like h."""
    out = torch.empty_like(h)
    if h.numel() > 0:
        grid, rows, tile = grid_of(h, False)
        _glu_skip_kernel[grid](
            h, r, bias if bias is None else bias.contiguous(), gate, out, *h.shape, rows, *h.stride(), *r.stride(),
            *_row_strides(gate), *out.stride(), INT64=needs_int64(h, r, gate, out), **tile,
        )  # fmt: skip
    return out


def launch_glu_skip_backward(
    r: Tensor, bias: Tensor | None, gate: Tensor, grad: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(dh like dout, dr, dbias, dgate); None where not needed."""
    one = gate.shape[0] == 1
    made = r.new_zeros if r.numel() == 0 or grad is None else r.new_empty
    d = made(r.shape) if grad is None else grad
    dh, dr = (torch.empty_like(r) if needs[i] else None for i in (0, 1))
    dbias = made(r.shape[1], dtype=torch.float32) if needs[2] and bias is not None else None
    dgate = None
    if needs[3]:
        dgate = made(gate.shape, dtype=torch.float32) if one else torch.empty_like(gate)
    if r.numel() > 0:
        grid, rows, tile = grid_of(r, dbias is not None or (one and needs[3]))
        strides = [(0, 0) if t is None else t.stride() for t in (dh, dr, dgate)]
        _glu_skip_backward_kernel[grid](
            r, bias if bias is None else bias.contiguous(), gate, d, dh, dr, dbias, dgate, *r.shape, rows,
            *r.stride(), *_row_strides(gate), *d.stride(), *strides[0], *strides[1], *strides[2], ONE_GATE=one,
            INT64=needs_int64(r, gate, d, dh, dr, dgate), **tile, **UNFUSED,
        )  # fmt: skip
    return (
        dh,
        dr,
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        None if dgate is None else dgate.to(gate.dtype),
    )
