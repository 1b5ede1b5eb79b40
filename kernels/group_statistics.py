"""Mean and standard deviation of channel groups of [B, C, H, W], from tiles of positions.

A tile of a group holds n_t values with mean m_t and sum of centred squares q_t; with n = sum n_t,

    m = sum_t n_t m_t / n        n var = sum_t q_t + n_t (m_t - m)^2        r = (var + eps)^-1/2

(Chan, Golub and LeVeque), which unlike E[x^2] - E[x]^2 does not cancel where the mean is much larger than the
spread. The statistics (m_t, q_t) are [B, tiles, groups, 2] fp32. One program writes a tile's, and their readers add
them in the order of tiles: no atomics, the same bits every time. conv2d_fused writes those of its output together
with it; for other tensors the kernel below takes one pass. Groups are padded to a power of two of columns, to be
summed by a reshape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv2d_configs import padded_group
from .launch import ceil_div, needs_int64, power_of_two

# Elements and warps per tile: 32 elements per thread, and at least one group of columns.
_ELEMENTS, _WARPS = 8192, 8
_COLUMNS = 128
_TILES = tl.constexpr(16)  # read at once; an image of 32 x 32 has 8 tiles


@triton.jit
def grouped_channels(column, PER_GROUP: tl.constexpr, PADDED: tl.constexpr):
    """(channel, whether it is one) of columns whose groups take PADDED each."""
    group = column // PADDED
    inner = column - group * PADDED
    return group * PER_GROUP + inner, inner < PER_GROUP


@triton.jit
def store_group_tiles(
    tiles_ptr, y, inside, count, at, first_group, n_groups,
    COLUMNS: tl.constexpr, PER_GROUP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(m_t, q_t) of y [ROWS, COLUMNS], of which ``count`` rows are inside, at tile number ``at``."""
    GROUPS: tl.constexpr = COLUMNS // PADDED
    n = 1.0 * count * PER_GROUP
    total = tl.sum(tl.where(inside, y, 0.0), 0)
    mean = tl.sum(tl.reshape(total, (GROUPS, PADDED)), 1) / n
    of_column = tl.reshape(tl.broadcast_to(mean[:, None], (GROUPS, PADDED)), (COLUMNS,))
    centred = y - of_column[None, :]
    # The square is chosen and not fused with the sum: lanes that hold the same sum then hold the same bits of it.
    squares = tl.sum(tl.reshape(tl.sum(tl.where(inside, centred * centred, 0.0), 0), (GROUPS, PADDED)), 1)
    group = first_group + tl.arange(0, GROUPS)
    to = tiles_ptr + (at * n_groups + group) * 2
    tl.store(to, mean, mask=group < n_groups)
    tl.store(to + 1, squares, mask=group < n_groups)


@triton.jit
def group_moments(tiles_ptr, b, group, inside, n_tiles, n_groups, tile_rows, n_positions, per_group, eps):
    """(m, r) of groups [K] of sample b."""
    n = 1.0 * n_positions * per_group
    mean = tl.zeros(group.shape, tl.float32)
    squares = tl.zeros(group.shape, tl.float32)
    for first in range(0, n_tiles, _TILES):
        tile = first + tl.arange(0, _TILES)
        count = 1.0 * per_group * tl.minimum(n_positions - tile * tile_rows, tile_rows)
        there = inside[:, None] & (tile < n_tiles)[None, :]
        at = tiles_ptr + ((b * n_tiles + tile)[None, :] * n_groups + group[:, None]) * 2
        mean += tl.sum(tl.load(at, mask=there, other=0.0) * (count / n)[None, :], 1)
    for first in range(0, n_tiles, _TILES):
        tile = first + tl.arange(0, _TILES)
        count = 1.0 * per_group * tl.minimum(n_positions - tile * tile_rows, tile_rows)
        there = inside[:, None] & (tile < n_tiles)[None, :]
        at = tiles_ptr + ((b * n_tiles + tile)[None, :] * n_groups + group[:, None]) * 2
        off = tl.load(at, mask=there, other=0.0) - mean[:, None]
        square = tl.load(at + 1, mask=there, other=0.0) + count[None, :] * off * off
        squares += tl.sum(tl.where(there, square, 0.0), 1)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(squares / n + eps))


@triton.jit
def _group_statistics_kernel(
    x_ptr, tiles_ptr, n_groups, n_positions, width, n_row_tiles, stride_xb, stride_xc, stride_xh, stride_xw,
    INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_GROUP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = program // n_row_tiles
    tile = program - b * n_row_tiles
    p = tile * ROWS + tl.arange(0, ROWS)
    first_group = tl.program_id(1) * (COLUMNS // PADDED)
    c, real = grouped_channels(first_group * PADDED + tl.arange(0, COLUMNS), PER_GROUP, PADDED)
    if INT64:
        b, p, c = b.to(tl.int64), p.to(tl.int64), c.to(tl.int64)
    i = p // width
    at = (i * stride_xh + (p - i * width) * stride_xw)[:, None] + (c * stride_xc)[None, :]
    inside = (p < n_positions)[:, None] & (real & (c < n_groups * PER_GROUP))[None, :]
    x = tl.load(x_ptr + b * stride_xb + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(n_positions - tile * ROWS, ROWS)
    store_group_tiles(
        tiles_ptr, x, inside, count, program, first_group, n_groups, COLUMNS, PER_GROUP, PADDED
    )  # fmt: skip


def launch_group_statistics(x: Tensor, groups: int) -> Tensor:
    """(m_t, q_t) as [B, tiles, groups, 2] of x [B, C, H, W], which must not be empty."""
    batch, channels, height, width = x.shape
    padded = padded_group(channels, groups)
    columns = max(padded, min(_COLUMNS, padded * power_of_two(groups)))
    rows = min(max(_ELEMENTS // columns, 1), power_of_two(height * width))
    n_tiles = ceil_div(height * width, rows)
    tiles = x.new_empty((batch, n_tiles, groups, 2), dtype=torch.float32)
    _group_statistics_kernel[(batch * n_tiles, ceil_div(groups, columns // padded))](
        x, tiles, groups, height * width, width, n_tiles, *x.stride(), INT64=needs_int64(x), ROWS=rows,
        COLUMNS=columns, PER_GROUP=channels // groups, PADDED=padded, num_warps=_WARPS,
    )  # fmt: skip
    return tiles
