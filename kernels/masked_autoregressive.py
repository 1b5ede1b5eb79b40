"""A masked autoregressive transform, affine or additive, in one launch: forward or inverse, with its log|det|.

    y_i = x_i e^{s_i} + t_i   or   (x_i + t_i) e^{s_i}     (t_i, r_i) = net_i(x_1 .. x_{i-1}),  s_i = scale_map(r_i)
    log|det| = sum_i s_i                                   inverse: x_1, then x_2 from x_1, ..; -sum_i s_i

    value_l = (W_l read_{l-1} + b_l + term_l) gate_l + value_{adds_l}      read_l = activation(value_l) or value_l

A program holds ROWS rows of x and runs the steps of a schedule (kernels/masked_schedule.py) one after another. Each
computes UNITS units of one layer, W [UNITS, k] times read [k, ROWS], and stores what later steps read. Units are
sorted by degree, so that the k units that are needed are the first of their layer. In the inverse the units of a
step have one degree; every W is used once, and the inverse takes the operations of one forward pass: 2 sum_l H_l
H_{l-1} per row, about half of which are masked and left out. Sizes are run-time numbers: one compilation serves any
network.

Shapes: x [B, D] with any strides, y [B, D] of x's dtype, log|det| [B] fp32; weights and operands as in
kernels/masked_spec.py, operands [parts, ..] rounded as the mode rounds (kernels/mlp.py); extras [B, n_extras].

A step stores into scratch memory, [parts, units, ROWS] per program, already split into the mode's parts, and
[units, ROWS] in fp32 where a later layer adds it: Triton cannot index registers or shared memory by a number known
at run time. A program uses its scratch again for each tile of rows, so that it stays in L1 and L2. The loop over k
is not pipelined: asynchronous copies would bypass L1, and most steps have one or two iterations. All threads wait
between a store and the loads that need it. Bytes of device memory: x, y, extras and log|det| once. Bytes of L1 and
L2: per row, the parts of the k units that each step reads, and once those that it writes; per tile, the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, needs_int64
from .masked_schedule import LAST, STEP, WAITS, Schedule, schedule_of
from .masked_spec import ALIGNED, masked_spec_of
from .masked_steps import columns, hidden, invert, product, store_parts, transform
from .mlp import activation_form
from .stack_configs import multiprocessors, target_of
from .stack_spec import N_PARTS

_STEP = tl.constexpr(STEP)
_ALIGNED = tl.constexpr(ALIGNED)
_WAITS = tl.constexpr(WAITS)
_LAST = tl.constexpr(LAST)


class Tile(NamedTuple):
    """A program's tile, and how many programs run.

    Args:
        rows: rows of x per program.
        num_warps: warps per program.
        units: units per step.
        chunk: columns of W per iteration.
        programs: on a multiprocessor.
        programs_with_more: where there are extras, or values that are added.
        cache: bytes of the cache that holds all programs' scratch.
    """

    rows: int
    num_warps: int
    units: int
    chunk: int
    programs: int
    programs_with_more: int
    cache: int


# A product's dimensions are units and rows. 16 units are the fewest that mma.sync computes; a degree has some H / D
# units, where wgmma and tcgen05 would compute 64. 64 rows by 4 warps: 128 rows need twice the scratch, which then
# leaves L1, and spill in tf32. Chunks of 32 columns: wider ones compute more zeros past the end of a prefix.
_TILE = Tile(rows=64, num_warps=4, units=16, chunk=32, programs=0, programs_with_more=0, cache=0)
# Programs of a multiprocessor hide each other's waits, as a step's loads depend on the step before. All programs
# must run at once, as each takes an equal part of the rows: as many as the registers hold in "exact" (on sm_80 152
# per thread, 226 with extras and adds; on sm_90 126 and 164). Four fifths of the cache are for scratch.
TILES = {
    "sm_80": _TILE._replace(programs=3, programs_with_more=2, cache=32 << 20),
    "sm_90": _TILE._replace(programs=4, programs_with_more=3, cache=40 << 20),
    "sm_100": _TILE._replace(programs=4, programs_with_more=3, cache=100 << 20),
    # L2 has 4 MB on each of its dies; behind it is a cache of 256 MB.
    "gfx942": _TILE._replace(programs=4, programs_with_more=4, cache=200 << 20),
}


@triton.jit(
    do_not_specialize=["n_batch", "n_steps", "n_features", "n_units", "n_values", "part_stride", "stride_eb"]
)
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
                left = n_features - first
                x_at, valid = columns(x_tile, order_ptr, first, left, stride_xb, stride_xd, inside, FEATURES, INT64)
                x = tl.load(x_at, mask=valid, other=0.0)
                x_read_at = read_ptr + (first + f)[:, None] * ROWS + r[None, :]
                store_parts(x_read_at, read_part_stride, x, (f < left)[:, None], PARTS)
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
            total = product(
                matrix_ptr, part_stride * _ALIGNED, row_stride, count, read_ptr + reads * ROWS, read_part_stride,
                known, ROWS, UNITS, CHUNK, PARTS,
            )  # fmt: skip
            total += bias[:, None]
            if (flags & _LAST) != 0:
                if INVERSE:
                    log_det += invert(
                        total, value_ptr, x_tile, y_tile, read_ptr + writes * ROWS, read_part_stride,
                        tl.load(order_ptr + writes), stride_xb, stride_xd, n_features, bound, floor, inside,
                        PER_FEATURE, KIND, SCALE_FIRST, UNITS, PARTS, INT64,
                    )  # fmt: skip
                else:
                    log_det += transform(
                        total, x_tile, y_tile, order_ptr, writes, count // PER_FEATURE, stride_xb, stride_xd,
                        n_features, bound, floor, inside, PER_FEATURE, KIND, SCALE_FIRST, FEATURES, INT64,
                    )  # fmt: skip
            else:
                read = hidden(
                    total, extras_ptr + start * stride_eb, value_ptr, step_ptr, flags, count, stride_eb, inside,
                    ACTIVATION, FORM, HAS_EXTRAS, HAS_ADDS, ROWS, UNITS,
                )  # fmt: skip
                read_at = read_ptr + (writes + n)[:, None] * ROWS + r[None, :]
                store_parts(read_at, read_part_stride, read, (n < count)[:, None], PARTS)
        tl.store(log_det_ptr + start + r, log_det, mask=inside)
        tl.debug_barrier()  # before the next tile's steps write what this one's read


def launch_masked_autoregressive(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """(y [B, D] contiguous, log|det| [B] fp32)."""
    spec = masked_spec_of(*constants)
    extras = None if extras is None else extras.contiguous()
    y, log_det = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    if x.shape[0] == 0:
        return y, log_det
    tile = tile_for(x)
    schedule, parts = schedule_of(spec, tile.units, x.device), N_PARTS[spec.precision]
    programs = _programs(x, tile, schedule, parts * operands.element_size(), extras is not None or any(spec.adds))
    read = operands.new_empty(programs, parts, schedule.n_units, tile.rows)
    values = weights.new_empty(programs, schedule.n_values, tile.rows, dtype=torch.float32)
    _masked_autoregressive_kernel[(programs,)](
        x, y, log_det, weights, operands, weights if extras is None else extras, schedule.table, read, values,
        x.shape[0], schedule.n_steps, x.shape[1], schedule.n_units, schedule.n_values,
        operands.stride(0) // ALIGNED, x.stride(0), x.stride(1), 0 if extras is None else extras.stride(0),
        spec.bound, spec.floor, PER_FEATURE=spec.per_feature, ACTIVATION=spec.activation,
        FORM=activation_form(x, spec.precision), KIND=spec.kind, SCALE_FIRST=spec.scale_first,
        INVERSE=spec.inverse, HAS_EXTRAS=extras is not None, HAS_ADDS=any(spec.adds), ROWS=tile.rows,
        UNITS=tile.units, CHUNK=tile.chunk, PARTS=parts, INT64=needs_int64(x[: tile.rows], y[: tile.rows]),
        num_warps=tile.num_warps,
    )  # fmt: skip
    return y, log_det


def tile_for(x: Tensor) -> Tile:
    """The tile on x's GPU; that of sm_80 on a GPU without an entry."""
    return TILES[target_of(x) or "sm_80"]


def _programs(x: Tensor, tile: Tile, schedule: Schedule, bytes_per_unit: int, has_more: bool) -> int:
    """As many programs as x has tiles, at most what the multiprocessors and the cache hold."""
    scratch = tile.rows * (schedule.n_units * bytes_per_unit + 4 * schedule.n_values)
    held = multiprocessors(x) * (tile.programs_with_more if has_more else tile.programs)
    return min(ceil_div(x.shape[0], tile.rows), max(1, min(held, tile.cache // scratch)))
