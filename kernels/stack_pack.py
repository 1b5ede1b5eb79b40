"""Packs a coupling stack's weights in one launch: a gather, which also splits operands into parts.

    values[p]    0, 1, or flat[source[p]] in fp32, + shift on the diagonal of a Linearizer's A
    operands     the values of conditioners' matrices, each in the mode's parts
    map_operands the values of dense maps, each in a map's parts

The tables and the gradient are in kernels/pack_table.py. Bytes per packed value: 8 of tables, 4 read, 4 written,
and 2 per part; all of it fits in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div
from .mlp import split
from .pack_table import ONE, SHIFT, pack_table
from .stack_spec import N_PARTS, map_parts

_ONE = tl.constexpr(ONE)
_SHIFT = tl.constexpr(SHIFT)


# Four values per thread: the tables are read, and the values written, 16 bytes at a time.
TILE = {"VALUES": 512, "num_warps": 4}


@triton.jit
def _store_parts(ptr, part_stride, value, inside, PARTS: tl.constexpr):
    part0, part1, part2 = split(value, ptr.dtype.element_ty, PARTS)
    tl.store(ptr, part0, mask=inside)
    if PARTS > 1:
        tl.store(ptr + part_stride, part1, mask=inside)
    if PARTS > 2:
        tl.store(ptr + 2 * part_stride, part2, mask=inside)


@triton.jit(do_not_specialize=["n_values"])
def _stack_pack_kernel(
    flat_ptr,
    source_ptr,
    target_ptr,
    values_ptr,
    operands_ptr,
    map_operands_ptr,
    n_values,
    part_stride,
    map_part_stride,
    shift,
    OPERANDS: tl.constexpr,
    MAP_OPERANDS: tl.constexpr,
    VALUES: tl.constexpr,
):
    p = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    inside = p < n_values
    source = tl.load(source_ptr + p, mask=inside, other=-1)
    target = tl.load(target_ptr + p, mask=inside, other=-1)
    shifted = source >= _SHIFT
    value = tl.load(flat_ptr + tl.where(shifted, source - _SHIFT, source), mask=source >= 0, other=0.0)
    value = tl.where(source == _ONE, 1.0, value.to(tl.float32) + tl.where(shifted, shift, 0.0))
    tl.store(values_ptr + p, value, mask=inside)
    _store_parts(operands_ptr + target, part_stride, value, target >= 0, OPERANDS)
    if MAP_OPERANDS:
        _store_parts(map_operands_ptr + (-2 - target), map_part_stride, value, target <= -2, MAP_OPERANDS)


def launch_stack_pack(
    flat: Tensor, rows: list[int], shift: float, precision: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [N] fp32, operands [parts, n], map_operands [parts, m], or [0] without a dense map)."""
    table = pack_table(rows, flat.device)
    of_matrices = torch.float32 if precision == "tf32" else dtype
    values = flat.new_empty(table.source.shape[0], dtype=torch.float32)
    operands = flat.new_empty(N_PARTS[precision], table.n_operands, dtype=of_matrices)
    of_maps = map_parts(precision) if table.n_map_operands else 0
    map_operands = flat.new_empty((of_maps, table.n_map_operands) if of_maps else 0, dtype=dtype)
    _stack_pack_kernel[(ceil_div(values.shape[0], TILE["VALUES"]),)](
        flat, table.source, table.target, values, operands, map_operands, values.shape[0], operands.stride(0),
        map_operands.stride(0), shift, OPERANDS=N_PARTS[precision], MAP_OPERANDS=of_maps, **TILE,
    )  # fmt: skip
    return values, operands, map_operands
