"""The parts of a step of a masked autoregressive transform on a tile of rows, as @triton.jit helpers.

Units are the first dimension and rows the second: a step stores contiguous runs of rows. What is not yet written is
masked when it is loaded, as 0 times it could be NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import masked_schedule as schedules
from .masked_spec import ALIGNED
from .math import EXACT_PTX, LOG2E, couple, log_scale, tanh
from .mlp import activate as _activate
from .mlp import dot_parts, split

# Its index in linfast.ops.masked_autoregressive.MASKED_ACTIVATIONS; a test checks that all agree.
ELU = tl.constexpr(4)

_ALIGNED = tl.constexpr(ALIGNED)
_ACTIVATED = tl.constexpr(schedules.ACTIVATED)
_KEEPS = tl.constexpr(schedules.KEEPS)
_ADDS = tl.constexpr(schedules.ADDS)
_TERMS = tl.constexpr(schedules.TERMS)
_GATES = tl.constexpr(schedules.GATES)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FORM: tl.constexpr):
    """An activation of kernels/mlp.py, or ELU: e^x - 1 below 0, by tanh where the difference must not cancel."""
    if ACTIVATION == ELU:
        if FORM <= EXACT_PTX:
            t = tanh(0.5 * x)
            below = 2.0 * t / (1.0 - t)
        else:
            below = tl.exp2(x * LOG2E) - 1.0
        result = tl.where(x > 0.0, x, below)
    else:
        result = _activate(x, ACTIVATION, FORM)
    return result


@triton.jit
def store_parts(ptr, part_stride, value, inside, PARTS: tl.constexpr):
    if PARTS > 1 and value.dtype == ptr.dtype.element_ty:
        part0 = value
        part1 = tl.zeros_like(value)
        part2 = part1
    else:
        part0, part1, part2 = split(value.to(tl.float32), ptr.dtype.element_ty, PARTS)
    tl.store(ptr, part0, mask=inside)
    if PARTS > 1:
        tl.store(ptr + part_stride, part1, mask=inside)
    if PARTS > 2:
        tl.store(ptr + 2 * part_stride, part2, mask=inside)


@triton.jit
def _load_parts(ptr, part_stride, inside, PARTS: tl.constexpr):
    part0 = tl.load(ptr, mask=inside, other=0.0)
    part1 = part0
    part2 = part0
    if PARTS > 1:
        part1 = tl.load(ptr + part_stride, mask=inside, other=0.0)
    if PARTS > 2:
        part2 = tl.load(ptr + 2 * part_stride, mask=inside, other=0.0)
    return part0, part1, part2


@triton.jit
def product(
    matrix_ptr,
    part_stride,
    row_stride,
    count,
    read_ptr,
    read_part_stride,
    known,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """W[:count, :known] read[:known], fp32 [UNITS, ROWS]: what lies past ``known`` is not yet written."""
    n = tl.arange(0, UNITS)
    r = tl.arange(0, ROWS)
    total = tl.zeros((UNITS, ROWS), tl.float32)
    padded = (known + _ALIGNED - 1) // _ALIGNED * _ALIGNED  # so that whole vectors are inside or outside
    for at in tl.range(0, known, CHUNK, num_stages=1):
        k = at + tl.arange(0, CHUNK)
        w0, w1, w2 = _load_parts(
            matrix_ptr + n[:, None] * row_stride + k[None, :], part_stride,
            (n < count)[:, None] & (k < padded)[None, :], PARTS,
        )  # fmt: skip
        h0, h1, h2 = _load_parts(
            read_ptr + k[:, None] * ROWS + r[None, :], read_part_stride, (k < known)[:, None], PARTS
        )
        total = dot_parts(w0, w1, w2, h0, h1, h2, total, PARTS)
    return total


@triton.jit
def columns(
    x_ptr, order_ptr, first, count, stride_b, stride_d, inside, FEATURES: tl.constexpr, INT64: tl.constexpr
):
    """(pointers, mask) [FEATURES, ROWS] of features in the order of their degrees."""
    f = tl.arange(0, FEATURES)
    r = tl.arange(0, inside.shape[0])
    column = tl.load(order_ptr + first + f, mask=f < count, other=0)
    if INT64:
        column = column.to(tl.int64)
        r = r.to(tl.int64)
    return x_ptr + r[None, :] * stride_b + column[:, None] * stride_d, (f < count)[:, None] & inside[None, :]


@triton.jit
def transform(
    total,
    x_ptr,
    y_ptr,
    order_ptr,
    first,
    count,
    stride_xb,
    stride_xd,
    stride_yb,
    bound,
    floor,
    inside,
    PER_FEATURE: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    FEATURES: tl.constexpr,
    INT64: tl.constexpr,
):
    """Transform ``count`` features by their parameters [UNITS, ROWS]; the sum of their log-scales [ROWS]."""
    x_at, known = columns(x_ptr, order_ptr, first, count, stride_xb, stride_xd, inside, FEATURES, INT64)
    y_at, _ = columns(y_ptr, order_ptr, first, count, stride_yb, 1, inside, FEATURES, INT64)
    x = tl.load(x_at, mask=known, other=0.0).to(tl.float32)
    if PER_FEATURE == 2:
        shift, raw = tl.split(tl.permute(tl.reshape(total, (FEATURES, 2, inside.shape[0])), (0, 2, 1)))
        log_s = log_scale(raw, bound, floor, KIND)
        y = couple(x, shift, log_s, SCALE_FIRST, False)
        log_det = tl.sum(tl.where(known, log_s, 0.0), 0)
    else:
        y = x + total
        log_det = tl.zeros_like(inside.to(tl.float32))
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=known)
    return log_det


@triton.jit
def invert(
    total,
    params_ptr,
    x_ptr,
    y_ptr,
    read_ptr,
    read_part_stride,
    column,
    stride_xb,
    stride_xd,
    stride_yb,
    bound,
    floor,
    inside,
    PER_FEATURE: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
):
    """Invert one feature by its parameters, the first rows of [UNITS, ROWS]; minus its log-scales [ROWS].

    In the product's layout eight lanes hold the parameters of each row, and each lane would compute four
    rows. Through memory a lane has one row: a quarter of the instructions.
    """
    ROWS: tl.constexpr = inside.shape[0]
    n = tl.arange(0, UNITS)
    r = tl.arange(0, ROWS)
    at = params_ptr + n[:, None] * ROWS + r[None, :]
    tl.store(at, total, mask=(n < PER_FEATURE)[:, None])
    row = r
    if INT64:
        column = column.to(tl.int64)
        row = r.to(tl.int64)
    x = tl.load(x_ptr + row * stride_xb + column * stride_xd, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()
    shift = tl.load(params_ptr + r)
    if PER_FEATURE == 2:
        log_s = log_scale(tl.load(params_ptr + ROWS + r), bound, floor, KIND)
        y = couple(x, shift, log_s, SCALE_FIRST, True)
    else:
        log_s = tl.zeros_like(shift)
        y = x - shift
    tl.store(y_ptr + row * stride_yb + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    store_parts(read_ptr + r, read_part_stride, y, r < ROWS, PARTS)
    return -log_s


@triton.jit
def _extras(extras_ptr, column, count, stride_eb, inside, UNITS: tl.constexpr):
    """Terms or gates of a step's units, [UNITS, ROWS] fp32."""
    n = tl.arange(0, UNITS)
    r = tl.arange(0, inside.shape[0])
    at = extras_ptr + r[None, :] * stride_eb + (column + n)[:, None]
    return tl.load(at, mask=(n < count)[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def hidden(
    total,
    extras_ptr,
    value_ptr,
    step_ptr,
    flags,
    count,
    stride_eb,
    inside,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
    HAS_EXTRAS: tl.constexpr,
    HAS_ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """What the next layer reads of hidden units, from W h + b; keeps their values where a later layer adds them."""
    n = tl.arange(0, UNITS)
    r = tl.arange(0, ROWS)
    if HAS_EXTRAS:
        if (flags & _TERMS) != 0:
            total += _extras(extras_ptr, tl.load(step_ptr + 10), count, stride_eb, inside, UNITS)
        if (flags & _GATES) != 0:
            total *= _extras(extras_ptr, tl.load(step_ptr + 11), count, stride_eb, inside, UNITS)
    if HAS_ADDS:
        value_at = value_ptr + n[:, None] * ROWS + r[None, :]
        computed = (n < count)[:, None]
        if (flags & _ADDS) != 0:
            total += tl.load(value_at + tl.load(step_ptr + 9) * ROWS, mask=computed, other=0.0)
        if (flags & _KEEPS) != 0:
            tl.store(value_at + tl.load(step_ptr + 8) * ROWS, total, mask=computed)
    if (flags & _ACTIVATED) != 0:
        total = activate(total, ACTIVATION, FORM)
    return total
