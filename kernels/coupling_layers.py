"""A coupling stack layer by layer, for conditioners that are too wide for one program to hold a row of them.

For a coupling with kept half k [B, K], moved half m [B, M] and an MLP of n linear layers, one launch each:

    _layer_kernel            h_1 = act(k W_1^T + b_1), h_i = act(h_{i-1} W_i^T + b_i)       [B, H], i < n
    _layer_coupling_kernel   (t, r) = h_{n-1} W_n^T + b_n   m <- couple(m, t, log_s(r))     log|det| += sum(log_s)

A program computes a tile of rows and columns in steps of DEPTH, and applies activation or coupling to its sums in
registers. Weights are packed as for kernels/coupling_stack.py, split into the mode's parts; k and h are split as
they are loaded. The rows of W_n are shift_i, raw_i in turn, so that a tile has whole features. The state is fp32,
in y or in a copy of a 16-bit x; a half of an fp32 x is read from x until a layer has written it to y. A program
adds its log-scales to its own row of ``sums`` [column tiles, B]: launches run in order, and the same input gives
the same bits. h is fp32, in "fast" of the operands' 16-bit dtype, and is in memory for ROWS_AT_A_TIME rows.

Bytes per row: n - 1 times h is written and read, k is read, m read and written. The library path (torch's products,
activations and affine_coupling, one after another) moves twice as many. docs/roofline.md has both, for D = 256,
H = 512. L2, which is the limit: a tile reads its rows once per column tile, and W once per 128 rows. Small
batches wait for launches: n a coupling here, 2 n in the library, or in "fast" 4 n + 1 with the casts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div
from .math import couple, log_scale
from .mlp import activate, activation_form, operand, product
from .stack_configs import LayersConfig
from .stack_spec import STACK_PARTS, StackSpec

# Rows whose hidden layers are in memory at once: 1 GB of them in fp32 at H = 512.
ROWS_AT_A_TIME = 2**18


@triton.jit
def _linear_tile(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    start,
    n_rows,
    n_inner,
    column,
    part_stride,
    stride_xb,
    stride_xk,
    stride_w,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
):
    """x W^T + b, fp32: rows from ``start`` and COLUMNS columns from ``column`` on."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    SCALED: tl.constexpr = PARTS == 2 and dtype == tl.float16
    r = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    n = column + tl.arange(0, COLUMNS)
    inside = (r < n_rows - start)[:, None]
    x_ptr += start * stride_xb
    w_ptr += n[None, :] * stride_w
    if INT64:
        r = r.to(tl.int64)
        k = k.to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, n_inner, DEPTH, num_stages=STAGES):
        at = first + k
        mask = inside & (at < n_inner)[None, :]
        x = tl.load(x_ptr + r[:, None] * stride_xb + at[None, :] * stride_xk, mask=mask, other=0.0)
        x0, x1, x2, unscale = operand(x, dtype, PARTS)
        total = product(x0, x1, x2, unscale, w_ptr + at[:, None], part_stride, total, PARTS)
    if SCALED:
        total *= tl.load(scale_ptr + n)[None, :]
    return total + tl.load(bias_ptr + n)[None, :]


@triton.jit(do_not_specialize=["n_rows"])
def _layer_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    n_rows,
    n_inner,
    n_tiles,
    part_stride,
    stride_xb,
    stride_xk,
    stride_w,
    h_ptr,
    stride_h,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
):
    start = (tl.program_id(0) // n_tiles).to(tl.int64) * ROWS
    column = tl.program_id(0) % n_tiles * COLUMNS
    h = _linear_tile(
        x_ptr, w_ptr, bias_ptr, scale_ptr, start, n_rows, n_inner, column, part_stride, stride_xb, stride_xk,
        stride_w, ROWS, COLUMNS, DEPTH, STAGES, PARTS, INT64,
    )  # fmt: skip
    h = activate(h, ACTIVATION, FORM).to(h_ptr.dtype.element_ty)
    r = tl.arange(0, ROWS)
    n = column + tl.arange(0, COLUMNS)
    tl.store(h_ptr + start * stride_h + r[:, None] * stride_h + n[None, :], h, mask=(r < n_rows - start)[:, None])


@triton.jit(do_not_specialize=["n_rows", "stride_sums"])
def _layer_coupling_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    n_rows,
    n_inner,
    n_tiles,
    part_stride,
    stride_xb,
    stride_xk,
    stride_w,
    moved_ptr,
    out_ptr,
    sums_ptr,
    n_moved,
    stride_mb,
    stride_mk,
    stride_ob,
    stride_sums,
    bound,
    floor,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    LOG_DET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
):
    FEATURES: tl.constexpr = COLUMNS // 2
    start = (tl.program_id(0) // n_tiles).to(tl.int64) * ROWS
    tile = tl.program_id(0) % n_tiles
    params = _linear_tile(
        x_ptr, w_ptr, bias_ptr, scale_ptr, start, n_rows, n_inner, tile * COLUMNS, part_stride, stride_xb,
        stride_xk, stride_w, ROWS, COLUMNS, DEPTH, STAGES, PARTS, INT64,
    )  # fmt: skip
    shift, raw = tl.split(tl.reshape(params, (ROWS, FEATURES, 2)))
    log_s = log_scale(raw, bound, floor, KIND, FORM)
    r = tl.arange(0, ROWS)
    i = tile * FEATURES + tl.arange(0, FEATURES)
    moves = (i < n_moved)[None, :]
    exists = r < n_rows - start
    if INT64:
        r = r.to(tl.int64)
        i = i.to(tl.int64)
    inside = exists[:, None] & moves
    at = moved_ptr + start * stride_mb + r[:, None] * stride_mb + i[None, :] * stride_mk
    value = tl.load(at, mask=inside, other=0.0)
    value = couple(value, shift, log_s, SCALE_FIRST, INVERSE, FORM)
    tl.store(out_ptr + start * stride_ob + r[:, None] * stride_ob + i[None, :], value, mask=inside)
    if LOG_DET:
        sums_ptr += tile * stride_sums + start + r
        before = tl.load(sums_ptr, mask=exists)
        of_tile = tl.sum(tl.where(moves, log_s, 0.0), 1)
        tl.store(sums_ptr, before - of_tile if INVERSE else before + of_tile, mask=exists)


def launch_layers(
    x: Tensor, y: Tensor, log_det: Tensor, weights: Tensor, operands: Tensor, spec: StackSpec, config: LayersConfig,
    int64: bool,
) -> None:  # fmt: skip
    """Write y [B, D] and, unless it is [0], log|det| [B]; ``spec`` has no maps."""
    for start in range(0, x.shape[0], ROWS_AT_A_TIME):
        run = slice(start, start + ROWS_AT_A_TIME)
        _run_of_rows(x[run], y[run], log_det[run], weights, operands, spec, config, int64)


def _run_of_rows(
    x: Tensor, y: Tensor, log_det: Tensor, weights: Tensor, operands: Tensor, spec: StackSpec, config: LayersConfig,
    int64: bool,
) -> None:  # fmt: skip
    n_rows, form = x.shape[0], activation_form(x, spec.precision)
    parts = {"PARTS": STACK_PARTS[spec.precision], "INT64": int64}
    state = y if x.dtype == torch.float32 else x.to(torch.float32, memory_format=torch.contiguous_format)
    written = state.split(spec.sizes, dim=1)
    halves = list(x.split(spec.sizes, dim=1) if state is y else written)
    dtype = operands.dtype if spec.precision == "fast" else torch.float32
    hidden = [x.new_empty(n_rows, spec.hidden, dtype=dtype) for _ in range(min(spec.n_linear - 1, 2))]
    last = _tile(spec.matrix_shapes[-1], config.last_columns, config)
    sums = weights.new_zeros(2 * spec.half // last["COLUMNS"], len(log_det))
    for layer, row in spec.steps(weights):
        assert layer is not None  # a map
        moved = 0 if spec.moves_first(layer) else 1
        h, value, out = halves[1 - moved], halves[moved], written[moved]
        matrices, biases = spec.matrices(operands[0, row]), spec.unpack(weights[row])[1]
        scales = spec.scales(weights[row])
        for i, (matrix, bias, scale) in enumerate(zip(matrices, biases, scales, strict=True)):
            is_last = i == spec.n_linear - 1
            tile = _tile(matrix.shape, config.last_columns if is_last else config.columns, config)
            n_tiles = ceil_div(2 * out.shape[1] if is_last else matrix.shape[0], tile["COLUMNS"])
            grid = (ceil_div(n_rows, tile["ROWS"]) * n_tiles,)
            product_of = (
                h, matrix, bias, scale, n_rows, h.shape[1], n_tiles, operands.stride(0), *h.stride(),
                matrix.stride(0),
            )  # fmt: skip
            if is_last:
                _layer_coupling_kernel[grid](
                    *product_of, value, out, sums, out.shape[1], *value.stride(), out.stride(0), sums.stride(0),
                    spec.bound, spec.floor, FORM=form, KIND=spec.kind, SCALE_FIRST=spec.scale_first,
                    INVERSE=spec.inverse, LOG_DET=spec.log_det, **parts, **tile,
                )  # fmt: skip
                continue
            _layer_kernel[grid](
                *product_of, hidden[i % 2], hidden[i % 2].stride(0), ACTIVATION=spec.activation, FORM=form,
                **parts, **tile,
            )  # fmt: skip
            h = hidden[i % 2]
        halves[moved] = out
    for half, own in zip(halves, written, strict=True):
        if half is not own:  # one coupling moves only one half
            own.copy_(half)
    if state is not y:
        y.copy_(state)
    if spec.log_det:
        torch.sum(sums, 0, out=log_det)


def _tile(shape: Sequence[int], columns: int, config: LayersConfig) -> dict[str, int]:
    """The tile for W [out, in], whose padded sizes it divides."""
    return {
        "ROWS": config.rows, "COLUMNS": math.gcd(columns, shape[0]),
        "DEPTH": math.gcd(config.depth, shape[1]), "STAGES": config.stages, "num_warps": config.num_warps,
    }  # fmt: skip
