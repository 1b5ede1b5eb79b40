"""The parameters of a spline on a tile of values, as @triton.jit helpers: one vector per parameter, a plane.

A tile is ROWS samples by FEATURES features, as one vector of N values. Each thread then has all parameters of its
value, and sums, maxima and searches over bins need no other thread. Where the parameters of a value are contiguous
(bins last), the lanes of a load would be P numbers apart. A matrix [N, WIDTH] is loaded instead, whose rows are
contiguous, and is split into its columns, which moves each number once through shared memory, to the thread of its
value. Gradients are joined and stored likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_mix import load_channels


@triton.jit
def tile_numbers(n_features, FEATURES: tl.constexpr, INT64: tl.constexpr):
    """(block of rows, tile of features, tiles of features) of this program, on one axis: others end at 65,535."""
    n_tiles = tl.cdiv(n_features, FEATURES)
    block = tl.program_id(0) // n_tiles
    tile = tl.program_id(0) - block * n_tiles
    if INT64:
        block = block.to(tl.int64)
        tile = tile.to(tl.int64)
    return block, tile, n_tiles


@triton.jit
def places(block, tile, n_rows, n_features, ROWS: tl.constexpr, FEATURES: tl.constexpr, SWAPPED: tl.constexpr):
    """(row, feature, whether both exist) of each value; features are innermost, or rows where SWAPPED."""
    i = tl.arange(0, ROWS * FEATURES)
    if SWAPPED:
        row = block * ROWS + i % ROWS
        feature = tile * FEATURES + i // ROWS
    else:
        row = block * ROWS + i // FEATURES
        feature = tile * FEATURES + i % FEATURES
    return row, feature, (row < n_rows) & (feature < n_features)


@triton.jit
def swapped(values, OUTER: tl.constexpr, INNER: tl.constexpr, SWAPPED: tl.constexpr):
    """A vector of OUTER x INNER values with INNER outermost, where SWAPPED; else unchanged."""
    if SWAPPED:
        values = tl.reshape(tl.trans(tl.reshape(values, [OUTER, INNER])), [OUTER * INNER])
    return values


@triton.jit
def appended(values, value):
    """A tuple with one more value."""
    return values + (value,)  # noqa: RUF005 (Triton has no starred tuples)


@triton.jit
def load_planes(ptr, stride, inside, COUNT: tl.constexpr, LEVELS: tl.constexpr, BINS_LAST: tl.constexpr):
    """COUNT planes in fp32, of which ptr [N] points at the first; with bins last the first 2^LEVELS as a matrix.

    COUNT is at most 2^LEVELS + 1. All loads are to come before ``planes_of``, whose barriers they cannot pass.
    """
    if BINS_LAST:
        j = tl.arange(0, 1 << LEVELS)[None, :]
        matrix = tl.load(ptr[:, None] + j, mask=inside[:, None] & (j < COUNT), other=0.0)
        last = load_channels(ptr + (1 << LEVELS), 1, inside, COUNT - (1 << LEVELS))
        planes = appended((), matrix.to(tl.float32)) + last
    else:
        planes = load_channels(ptr, stride, inside, COUNT)
    return planes


@triton.jit
def planes_of(loaded, COUNT: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr, BINS_LAST: tl.constexpr):
    """The COUNT vectors [N] that ``load_planes`` read."""
    if BINS_LAST:
        planes = _columns(loaded[0], COUNT, LEVELS, N) + loaded[1:]
    else:
        planes = loaded
    return planes


@triton.jit
def _columns(matrix, COUNT: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr):
    """The first columns of a matrix [N, 2^LEVELS]: it is split into even and odd columns, and so on."""
    parts = appended((), matrix)
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for i in tl.static_range(1 << level):
            a, b = tl.split(tl.reshape(parts[i], [N, 1 << (LEVELS - level - 1), 2]))
            even = appended(even, a)
            odd = appended(odd, b)
        parts = even + odd
    columns = ()
    for i in tl.static_range(COUNT if COUNT < (1 << LEVELS) else 1 << LEVELS):
        columns = appended(columns, tl.reshape(parts[i], [N]))
    return columns


@triton.jit
def store_planes(
    ptr, stride, planes, inside, COUNT: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr, BINS_LAST: tl.constexpr
):
    """Write COUNT vectors to where ``load_planes`` reads them."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    first: tl.constexpr = (1 << LEVELS) if BINS_LAST else 0
    if BINS_LAST:
        j = tl.arange(0, 1 << LEVELS)[None, :]
        matrix = _joined(planes, COUNT, LEVELS, N)
        tl.store(ptr[:, None] + j, matrix.to(dtype), mask=inside[:, None] & (j < COUNT))
    for j in tl.static_range(first, COUNT):
        tl.store(ptr + j * stride, planes[j].to(dtype), mask=inside)


@triton.jit
def _joined(columns, COUNT: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr):
    """The matrix [N, 2^LEVELS] that begins with these columns."""
    parts = appended((), tl.reshape(columns[0], [N, 1]))
    for i in tl.static_range(1, 1 << LEVELS):
        parts = appended(parts, tl.reshape(columns[i if i < COUNT else 0], [N, 1]))
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(1 << (LEVELS - level - 1)):
            pair = tl.join(parts[i], parts[i + (1 << (LEVELS - level - 1))])
            joined = appended(joined, tl.reshape(pair, [N, 1 << (level + 1)]))
        parts = joined
    return parts[0]
