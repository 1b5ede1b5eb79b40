"""A masked autoregressive transform, affine or additive, in one launch: forward or inverse, log|det| with it.

    y_i = x_i e^{s_i} + t_i   or   (x_i + t_i) e^{s_i}        (t_i, r_i) = net_i(x_1 .. x_{i-1}),  s_i = scale_map(r_i)
    log|det| = sum_i s_i                                      inverse: x_1, then x_2 from x_1, ..; -sum_i s_i

    value_l = (W_l read_{l-1} + b_l + term_l) gate_l + value_{adds_l}       read_l = activation(value_l) or value_l

A program holds ROWS rows of x and runs the steps of a schedule (kernels/masked_schedule.py), one after another: each
computes UNITS units of one layer from the units that are known, W [UNITS, k] times read [k, ROWS], and stores what
later steps read. Units are sorted by degree, so that k is the length of a prefix. In the inverse a step has the units
of one degree. Every W is thus used once, and the inverse takes about the operations of one forward pass: 2 sum_l
H_l H_{l-1} per row, half of it without the masked blocks. Sizes are run-time numbers: one compilation serves any
network.

Shapes: x [B, D] with any strides, y [B, D] of x's dtype, log|det| [B] fp32; weights and operands as in
kernels/masked_spec.py, operands [parts, ..] rounded as the mode rounds (kernels/mlp.py); extras [B, n_extras].

What a step stores goes to scratch in memory, [parts, units, ROWS] per program, already split into the mode's parts,
and [units, ROWS] in fp32 where a later layer adds it. Triton cannot index registers or shared memory by a number
known at run time. A program writes its scratch anew for each of its tiles of rows, so that it stays in L1 and L2, and
the loop over k is not pipelined: asynchronous copies would bypass L1, and most steps have one or two iterations. All
threads wait between a store and the loads that need it. Bytes from and to device memory: x, y, extras and log|det|,
once. From L1 and L2, per row: the parts of every k that a step reads, and per program and tile the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import masked_schedule as schedules
from .launch import ceil_div, needs_int64
from .masked_schedule import schedule_of
from .masked_spec import ALIGNED, masked_spec_of
from .math import LOG2E, couple, log_scale, tanh
from .mlp import EXACT, activate, activation_form, dot_parts, split
from .stack_configs import target_of
from .stack_spec import N_PARTS

# Indices in linfast.ops.masked_autoregressive.MASKED_ACTIVATIONS, as in kernels/mlp.py; a test checks that they agree.
ELU = tl.constexpr(4)

_STEP = tl.constexpr(schedules.STEP)
_ALIGNED = tl.constexpr(ALIGNED)
_WAITS = tl.constexpr(schedules.WAITS)
_LAST = tl.constexpr(schedules.LAST)
_ACTIVATED = tl.constexpr(schedules.ACTIVATED)
_KEEPS = tl.constexpr(schedules.KEEPS)
_ADDS = tl.constexpr(schedules.ADDS)
_TERMS = tl.constexpr(schedules.TERMS)
_GATES = tl.constexpr(schedules.GATES)


class Tile(NamedTuple):
    """A program's tile, and how many programs run.

    Args:
        rows: rows of x per program.
        num_warps: warps per program.
        inverse_units, forward_units: units per step.
        chunk: columns of W per iteration.
        programs: on the whole GPU, at most.
        cache: bytes of L2 for all programs' scratch.
    """

    rows: int
    num_warps: int
    inverse_units: int
    forward_units: int
    chunk: int
    programs: int
    cache: int


# 16 units are the fewest that mma.sync computes; a degree rarely has more (H / D units), and a forward has wider blocks.
# Units are the first dimension of a product and rows the second. The first is below 64, so that it runs on mma.sync:
# tcgen05 and wgmma would need 64 units. 64 rows by 4 warps: 16 rows per warp, few enough registers for 4 programs per
# multiprocessor or more, which hide each other's waits: a step's loads depend on the step before.
_TILE = Tile(rows=64, num_warps=4, inverse_units=16, forward_units=32, chunk=32, programs=0, cache=0)
# Four programs per multiprocessor, and four fifths of L2 for scratch. sm_80 also stands for GPUs without an entry.
TILES = {
    "sm_80": _TILE._replace(programs=4 * 108, cache=32 << 20),
    "sm_90": _TILE._replace(programs=4 * 132, cache=40 << 20),
    "sm_100": _TILE._replace(programs=4 * 148, cache=100 << 20),
    # Its L2 has 4 MB on each of eight dies; behind it is a cache of 256 MB.
    "gfx942": _TILE._replace(programs=4 * 304, cache=200 << 20),
}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, FORM: tl.constexpr):
    """activate, and ELU: e^x - 1 below 0, by tanh where the difference must not cancel."""
    if ACTIVATION == ELU:
        if FORM == EXACT:
            t = tanh(0.5 * x)
            below = 2.0 * t / (1.0 - t)
        else:
            below = tl.exp2(x * LOG2E) - 1.0
        result = tl.where(x > 0.0, x, below)
    else:
        result = activate(x, ACTIVATION, FORM)
    return result


@triton.jit
def _store_parts(ptr, part_stride, value, inside, PARTS: tl.constexpr):
    part0, part1, part2 = split(value, ptr.dtype.element_ty, PARTS)
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
def _product(
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
def _extras(extras_ptr, column, count, stride_eb, inside, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Terms or gates of a step's units, [UNITS, ROWS] fp32."""
    n = tl.arange(0, UNITS)
    r = tl.arange(0, ROWS)
    at = extras_ptr + r[None, :] * stride_eb + (column + n)[:, None]
    return tl.load(at, mask=(n < count)[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _columns(x_ptr, order_ptr, first, count, stride_b, stride_d, inside, FEATURES: tl.constexpr, INT64: tl.constexpr):
    """(pointers, mask) [FEATURES, ROWS] of features in the order of their degrees."""
    f = tl.arange(0, FEATURES)
    r = tl.arange(0, inside.shape[0])
    column = tl.load(order_ptr + first + f, mask=f < count, other=0)
    if INT64:
        column = column.to(tl.int64)
        r = r.to(tl.int64)
    return x_ptr + r[None, :] * stride_b + column[:, None] * stride_d, (f < count)[:, None] & inside[None, :]


@triton.jit(do_not_specialize=["n_batch", "n_steps", "n_features", "n_units", "n_values", "part_stride", "stride_eb"])
def _masked_autoregressive_kernel(
    x_ptr,
    y_ptr,
    log_det_ptr,
    weights_ptr,
    operands_ptr,
    extras_ptr,
    table_ptr,
    read_ptr,
    value_ptr,
    n_batch,
    n_steps,
    n_features,
    n_units,
    n_values,
    part_stride,
    stride_xb,
    stride_xd,
    stride_eb,
    bound,
    floor,
    PER_FEATURE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_EXTRAS: tl.constexpr,
    HAS_ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
):
    FEATURES: tl.constexpr = UNITS // PER_FEATURE
    n = tl.arange(0, UNITS)
    f = tl.arange(0, FEATURES)
    r = tl.arange(0, ROWS)
    order_ptr = table_ptr + n_steps * _STEP
    program = tl.program_id(0)
    read_part_stride = n_units * ROWS
    read_ptr += program.to(tl.int64) * (PARTS * read_part_stride)
    value_ptr += program.to(tl.int64) * (n_values * ROWS)
    for turn in range(tl.cdiv(tl.cdiv(n_batch, ROWS) - program, tl.num_programs(0))):
        start = (program + turn * tl.num_programs(0)).to(tl.int64) * ROWS
        inside = r < n_batch - start
        x_tile = x_ptr + start * stride_xb
        y_tile = y_ptr + start * n_features
        log_det = tl.zeros((ROWS,), tl.float32)
        if not INVERSE:
            for first in tl.range(0, n_features, FEATURES, num_stages=1):
                at, known = _columns(
                    x_tile, order_ptr, first, n_features - first, stride_xb, stride_xd, inside, FEATURES, INT64
                )
                x = tl.load(at, mask=known, other=0.0).to(tl.float32)
                into = read_ptr + (first + f)[:, None] * ROWS + r[None, :]
                _store_parts(into, read_part_stride, x, (first + f < n_features)[:, None], PARTS)
        for step in tl.range(0, n_steps, num_stages=1):
            step_ptr = table_ptr + step * _STEP
            flags = tl.load(step_ptr)
            count = tl.load(step_ptr + 1)
            known = tl.load(step_ptr + 2)
            matrix_ptr = operands_ptr + tl.load(step_ptr + 3) * _ALIGNED
            row_stride = tl.load(step_ptr + 4) * _ALIGNED
            bias = tl.load(weights_ptr + tl.load(step_ptr + 5) + n, mask=n < count, other=0.0).to(tl.float32)
            reads = tl.load(step_ptr + 6)
            writes = tl.load(step_ptr + 7)
            if (flags & _WAITS) != 0:
                tl.debug_barrier()
            total = _product(
                matrix_ptr, part_stride * _ALIGNED, row_stride, count, read_ptr + reads * ROWS, read_part_stride,
                known, ROWS, UNITS, CHUNK, PARTS,
            )  # fmt: skip
            total += bias[:, None]
            if (flags & _LAST) != 0:
                features = count // PER_FEATURE
                at, valid = _columns(
                    x_tile, order_ptr, writes, features, stride_xb, stride_xd, inside, FEATURES, INT64
                )
                into, _ = _columns(y_tile, order_ptr, writes, features, n_features, 1, inside, FEATURES, INT64)
                x = tl.load(at, mask=valid, other=0.0).to(tl.float32)
                if PER_FEATURE == 2:
                    pairs = tl.permute(tl.reshape(total, (FEATURES, 2, ROWS)), (0, 2, 1))
                    shift, raw = tl.split(pairs)
                    log_s = log_scale(raw, bound, floor, KIND)
                    log_det += tl.sum(tl.where(valid, log_s, 0.0), 0)
                    y = couple(x, shift, log_s, SCALE_FIRST, INVERSE)
                else:
                    y = couple(x, total, tl.zeros_like(total), True, INVERSE)
                tl.store(into, y.to(y_ptr.dtype.element_ty), mask=valid)
                if INVERSE:
                    into = read_ptr + (writes + f)[:, None] * ROWS + r[None, :]
                    _store_parts(into, read_part_stride, y, (f < features)[:, None], PARTS)
            else:
                computed = (n < count)[:, None]
                if HAS_EXTRAS:
                    extras_tile = extras_ptr + start * stride_eb
                    if (flags & _TERMS) != 0:
                        column = tl.load(step_ptr + 10)
                        total += _extras(extras_tile, column, count, stride_eb, inside, ROWS, UNITS)
                    if (flags & _GATES) != 0:
                        column = tl.load(step_ptr + 11)
                        total *= _extras(extras_tile, column, count, stride_eb, inside, ROWS, UNITS)
                if HAS_ADDS:
                    at_value = value_ptr + n[:, None] * ROWS + r[None, :]
                    if (flags & _ADDS) != 0:
                        total += tl.load(at_value + tl.load(step_ptr + 9) * ROWS, mask=computed, other=0.0)
                    if (flags & _KEEPS) != 0:
                        tl.store(at_value + tl.load(step_ptr + 8) * ROWS, total, mask=computed)
                if (flags & _ACTIVATED) != 0:
                    total = _activate(total, ACTIVATION, FORM)
                into = read_ptr + (writes + n)[:, None] * ROWS + r[None, :]
                _store_parts(into, read_part_stride, total, computed, PARTS)
        tl.store(log_det_ptr + start + r, -log_det if INVERSE else log_det, mask=inside)
        tl.debug_barrier()  # before the next tile's steps write what this one's read


def launch_masked_autoregressive(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """(y [B, D] contiguous, log|det| [B] fp32)."""
    spec = masked_spec_of(*constants)
    y, log_det = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    if x.shape[0] == 0:
        return y, log_det
    tile = tile_for(x)
    units = tile.inverse_units if spec.inverse else tile.forward_units
    schedule = schedule_of(spec, units, x.device)
    parts = N_PARTS[spec.precision]
    per_program = schedule.n_units * parts * operands.element_size() + 4 * schedule.n_values
    programs = min(
        ceil_div(x.shape[0], tile.rows), max(1, min(tile.programs, tile.cache // (per_program * tile.rows)))
    )
    read = operands.new_empty(programs, parts, schedule.n_units, tile.rows)
    values = weights.new_empty(programs, schedule.n_values, tile.rows, dtype=torch.float32)
    _masked_autoregressive_kernel[(programs,)](
        x, y, log_det, weights, operands, weights if extras is None else extras, schedule.table, read, values,
        x.shape[0], schedule.n_steps, x.shape[1], schedule.n_units, schedule.n_values,
        operands.stride(0) // ALIGNED, x.stride(0), x.stride(1), 0 if extras is None else extras.stride(0),
        spec.bound, spec.floor, PER_FEATURE=spec.per_feature, ACTIVATION=spec.activation,
        FORM=activation_form(x, spec.precision), KIND=spec.kind, SCALE_FIRST=spec.scale_first,
        INVERSE=spec.inverse, HAS_EXTRAS=extras is not None, HAS_ADDS=schedule.n_values > 0, ROWS=tile.rows,
        UNITS=units, CHUNK=tile.chunk, PARTS=parts, INT64=needs_int64(x[: tile.rows], y[: tile.rows]),
        num_warps=tile.num_warps,
    )  # fmt: skip
    return y, log_det


def tile_for(x: Tensor) -> Tile:
    """The tile on x's GPU."""
    return TILES.get(target_of(x) or "sm_80", TILES["sm_80"])
