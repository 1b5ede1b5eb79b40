"""Index tables of packing: the source and the target of each packed value. They depend only on shapes.

``rows`` describes the tensors that are flattened one after another, as integers: for each stack

    features, n_linear, hidden, maps, head, number of rows         StackLayout's fields
    of every row except the head's
        in, out_1, ..., out_n        the widths of its linear layers
        1 or 0, n times              whether each has a bias
        1 or 0                       whether its output is shift_i, raw_i alternating
    of every row
        NO_MAPS, DIAGONAL or DENSE   its map; SHIFTED for DENSE with a number added to its diagonal
        1 or 0                       whether the map has a bias

The tensors of a row are its weights, its biases, its map's weight and its map's bias.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .stack_spec import DENSE, DIAGONAL, NO_MAPS, StackLayout

ZERO, ONE = -1, -2  # sources of padding, and of the diagonal of a map that is the identity
SHIFT = 1 << 30  # added to the source of a value to which that number is added
SHIFTED = 3
# The most tables that are cached, at 12 bytes per weight: 2.7 MB at D = 64, H = 128 and 8 layers.
_KEPT = 32
_captured: set[PackTable] = set()


@dataclass(frozen=True, eq=False)
class PackTable:
    """Tables of int32 on one device.

    Args:
        source: [N], for each packed value: its index in the flattened tensors, + SHIFT where the number is added to
            it; or ZERO or ONE.
        target: [N], for each packed value: its index t >= 0 in the conditioners' operands; -2 - t for index t in
            the maps' operands; -1 where it is no operand.
        inverse: [M], for each flattened value: its index in the packed values.
        runs: [R, 3], runs of packed values: where each begins, its length, and the index of its scale or -1. A row
            of a matrix is one run and has a scale. Scales are in no run.
        longest: the largest length of a run, rounded up to a power of two.
        n_operands: number of the conditioners' operands.
        n_map_operands: number of the dense maps' operands.
    """

    source: Tensor
    target: Tensor
    inverse: Tensor
    runs: Tensor
    longest: int
    n_operands: int
    n_map_operands: int


def layouts_of(rows: Sequence[int]) -> Iterator[tuple[StackLayout, int, list[list[int]]]]:
    """(layout, number of rows, each row's integers) of every stack that ``rows`` describes."""
    at = 0
    while at < len(rows):
        features, n_linear, hidden, maps, head, count = rows[at : at + 6]
        at += 6
        described = []
        for row in range(count):
            size = 2 if n_linear == 0 or (head and row == 0) else 2 * n_linear + 4
            described.append(list(rows[at : at + size]))
            at += size
        yield StackLayout(features, n_linear, hidden, maps, bool(head)), count, described


def pack_table(rows: Sequence[int], device: torch.device) -> PackTable:
    """The tables for these shapes on this device, from a cache.

    Tables that a CUDA graph captures are never freed: the graph holds only their addresses.
    """
    table = _kept(tuple(rows), device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.add(table)
    return table


def packing_gradient(
    flat: Tensor, grad: Tensor | None, _operands: Any, _map_operands: Any, rows: list[int], *_: Any
) -> Tensor:
    """dL/d flat from dL/d values: one gather. Operands are rounded copies, which no gradient reaches."""
    if grad is None:
        return torch.zeros_like(flat)
    return grad.index_select(0, pack_table(rows, flat.device).inverse).to(flat.dtype)


@functools.lru_cache(_KEPT)
def _kept(rows: tuple[int, ...], device: torch.device) -> PackTable:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        table = _built(rows)
    moved = {name: getattr(table, name).to(device) for name in ("source", "target", "inverse", "runs")}
    return replace(table, **moved)


def _built(rows: tuple[int, ...]) -> PackTable:
    sources, targets = [], []
    runs: list[tuple[int, int, int]] = []
    n_flat = n_operands = n_map_operands = n_values = 0
    for layout, count, described in layouts_of(rows):
        source = torch.full((count, layout.row_size), ZERO, dtype=torch.int32)
        target = torch.full_like(source, -1)
        for row, numbers in zip(source, described, strict=True):
            n_flat = _fill(layout, row, numbers, n_flat)
        size = count * layout.matrix_size
        target[:, : layout.matrix_size] = _run(n_operands, (count, layout.matrix_size))
        n_operands += size
        if layout.maps == DENSE:
            at = slice(layout.map_offset, layout.map_offset + layout.map_size)
            target[:, at] = -2 - _run(n_map_operands, (count, layout.map_size))
            n_map_operands += count * layout.map_size
        for row in range(count):
            runs += _runs(layout, n_values + row * layout.row_size)
        n_values += source.numel()
        sources.append(source.flatten())
        targets.append(target.flatten())
    source = torch.cat(sources)
    places = torch.arange(source.shape[0], dtype=torch.int32)[source >= 0]
    inverse = torch.empty(n_flat, dtype=torch.int32)
    inverse[(source[source >= 0] % SHIFT).long()] = places
    of_runs = torch.tensor(runs, dtype=torch.int32)
    longest = 1 << (int(of_runs[:, 1].max()) - 1).bit_length()
    return PackTable(source, torch.cat(targets), inverse, of_runs, longest, n_operands, n_map_operands)


def _runs(layout: StackLayout, start: int) -> Iterator[tuple[int, int, int]]:
    """The runs of a row of weights that begins at ``start``: (begin, length, index of the scale or -1)."""
    width, end = 2 * layout.half, start + layout.row_size
    at, scale = start, end - sum(layout.widths[1:])
    for n_out, n_in in layout.matrix_shapes:
        for _ in range(n_out):
            yield at, n_in, scale
            at, scale = at + n_in, scale + 1
    if layout.maps == DENSE:
        matrix, scales = start + layout.map_offset, start + layout.scales_offset
        yield from ((matrix + i * width, width, scales + i) for i in range(width))
    after = layout.map_offset + (layout.map_size if layout.maps == DENSE else 0)
    rest = ((layout.matrix_size, layout.map_offset), (after, layout.scales_offset))
    for first, last in rest:
        yield from ((start + at, min(layout.half, last - at), -1) for at in range(first, last, layout.half))


def _fill(layout: StackLayout, row: Tensor, numbers: list[int], start: int) -> int:
    """Write the sources of a row, whose flattened tensors begin at ``start``; return where they end."""
    matrices, biases, matrix, bias = layout.unpack(row)
    *conditioner, kind, map_has_bias = numbers
    if conditioner:
        n = layout.n_linear
        widths, has_bias, interleaved = conditioner[: n + 1], conditioner[n + 1 : 2 * n + 1], conditioner[-1]
        shapes: list[tuple[int, ...]] = list(zip(widths[1:], widths[:-1], strict=True))
        given = [(matrices[i], shapes[i], i == n - 1) for i in range(n)]
        given += [(biases[i], shapes[i][:1], i == n - 1) for i in range(n) if has_bias[i]]
        for into, shape, is_last in given:
            piece = _run(start, shape)
            start += piece.numel()
            if is_last and not interleaved:  # [all shifts | all raws] in memory
                piece = piece.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
            into[tuple(slice(size) for size in shape)] = piece
    if layout.maps == NO_MAPS:
        return start
    D, (first, _) = layout.features, layout.sizes
    at = torch.arange(D) + (torch.arange(D) >= first) * (layout.half - first)
    if kind in (DENSE, SHIFTED):
        matrix[at[:, None], at] = _run(start, (D, D))
        matrix[at, at] += SHIFT * (kind == SHIFTED)
    else:
        diagonal = matrix.diagonal() if layout.maps == DENSE else matrix
        diagonal[at] = _run(start, (D,)) if kind == DIAGONAL else ONE
    start += (0, D, D * D, D * D)[kind]
    if map_has_bias:
        bias[at] = _run(start, (D,))
        start += D
    return start


def _run(start: int, shape: tuple[int, ...]) -> Tensor:
    """start, start + 1, ... in this shape."""
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.int32).view(shape)
