"""Packs a coupling stack's weights in one launch: a gather, which also splits operands into parts.

    values[p]    0, 1, or flat[source[p]] in fp32, + shift on the diagonal of a Linearizer's A; or a scale
    operands     the values of conditioners' matrices, each in the mode's parts
    map_operands the values of dense maps, each in a map's parts

Two parts of fp16 are parts of s W_ij, s a power of two for each row i of a matrix W (kernels/mlp.py); the values
then contain 2^14 / s. A row of a matrix is a run; a program packs several runs. The tables and the gradient are in
kernels/pack_table.py. Bytes per packed value: 8 of tables, 4 read, 4 written, and 2 per part; all of it fits in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div
from .mlp import scale_of, scaled_parts, split
from .pack_table import ONE, SHIFT, pack_table
from .stack_spec import MAP_PARTS, STACK_PARTS, operand_dtypes

_ONE = tl.constexpr(ONE)
_SHIFT = tl.constexpr(SHIFT)


# Values per program, 16 per thread: rows of matrices are read and written 16 bytes at a time.
TILE = {"VALUES": 2048, "num_warps": 4}


@triton.jit
def _store_parts(ptr, part_stride, value, inside, PARTS: tl.constexpr, SCALED: tl.constexpr):
    if SCALED:
        part0, part1 = scaled_parts(value)
        part2 = part0
    else:
        part0, part1, part2 = split(value, ptr.dtype.element_ty, PARTS)
    tl.store(ptr, part0, mask=inside)
    if PARTS > 1:
        tl.store(ptr + part_stride, part1, mask=inside)
    if PARTS > 2:
        tl.store(ptr + 2 * part_stride, part2, mask=inside)


@triton.jit(do_not_specialize=["n_runs"])
def _stack_pack_kernel(
    flat_ptr,
    source_ptr,
    target_ptr,
    runs_ptr,
    values_ptr,
    operands_ptr,
    map_operands_ptr,
    n_runs,
    part_stride,
    map_part_stride,
    shift,
    OPERANDS: tl.constexpr,
    MAP_OPERANDS: tl.constexpr,
    RUNS: tl.constexpr,
    LONGEST: tl.constexpr,
):
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    runs_ptr += 3 * run
    begin = tl.load(runs_ptr, mask=run < n_runs, other=0)
    length = tl.load(runs_ptr + 1, mask=run < n_runs, other=0)
    scale_at = tl.load(runs_ptr + 2, mask=run < n_runs, other=-1)
    i = tl.arange(0, LONGEST)
    p = begin[:, None] + i[None, :]
    inside = i[None, :] < length[:, None]
    source = tl.load(source_ptr + p, mask=inside, other=-1)
    target = tl.load(target_ptr + p, mask=inside, other=-1)
    shifted = source >= _SHIFT
    value = tl.load(flat_ptr + tl.where(shifted, source - _SHIFT, source), mask=source >= 0, other=0.0)
    value = tl.where(source == _ONE, 1.0, value.to(tl.float32) + tl.where(shifted, shift, 0.0))
    tl.store(values_ptr + p, value, mask=inside)
    scale, unscale = scale_of(tl.max(tl.abs(value), 1))
    unscale *= 268435456.0  # 2^28: 2^14 / s from 2^-14 / s
    of_map = tl.max((target < -1).to(tl.float32), 1) > 0
    SCALED: tl.constexpr = OPERANDS == 2 and operands_ptr.dtype.element_ty == tl.float16
    MAP_SCALED: tl.constexpr = MAP_OPERANDS == 2 and map_operands_ptr.dtype.element_ty == tl.float16
    if MAP_SCALED and not SCALED:
        unscale = tl.where(of_map, unscale, 1.0)
    elif not SCALED:
        unscale = tl.full((RUNS,), 1.0, tl.float32)
    scaled = value * scale[:, None]
    _store_parts(operands_ptr + target, part_stride, scaled if SCALED else value, target >= 0, OPERANDS, SCALED)
    if MAP_OPERANDS:
        scaled = scaled if MAP_SCALED else value
        _store_parts(
            map_operands_ptr + (-2 - target), map_part_stride, scaled, target < -1, MAP_OPERANDS, MAP_SCALED
        )
    tl.store(values_ptr + scale_at, unscale, mask=scale_at >= 0)


def launch_stack_pack(
    flat: Tensor, rows: list[int], shift: float, precision: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [N] fp32, operands [parts, n], map_operands [parts, m], or [0] without a dense map)."""
    table = pack_table(rows, flat.device)
    of_matrices, of_maps = operand_dtypes(precision, dtype)
    values = flat.new_empty(table.source.shape[0], dtype=torch.float32)
    operands = flat.new_empty(STACK_PARTS[precision], table.n_operands, dtype=of_matrices)
    map_parts = MAP_PARTS if table.n_map_operands else 0
    map_operands = flat.new_empty((map_parts, table.n_map_operands) if map_parts else 0, dtype=of_maps)
    n_runs, runs_per_program = table.runs.shape[0], max(TILE["VALUES"] // table.longest, 1)
    _stack_pack_kernel[(ceil_div(n_runs, runs_per_program),)](
        flat, table.source, table.target, table.runs, values, operands, map_operands, n_runs, operands.stride(0),
        map_operands.stride(0), shift, OPERANDS=STACK_PARTS[precision], MAP_OPERANDS=map_parts,
        RUNS=runs_per_program, LONGEST=table.longest, num_warps=TILE["num_warps"],
    )  # fmt: skip
    return values, operands, map_operands
