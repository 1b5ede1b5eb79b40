"""Tiles of conv2d_fused, and the sizes at which it replaces torch's convolution. Does not import Triton.

The sizes are predicted from data-sheet rates, not timed. Per output position, with C channels in and out and e
bytes per number, a residual block's two norms, two convolutions, shift and skip move 13 C e bytes in torch's
kernels (norm 2 each, conv 2 each, shift 2, sum 3) and 6 C e fused (statistics 1, conv 2 each, skip 1; the second
norm's statistics come with the first convolution's output). Each convolution takes 18 C^2 FLOP.

    C = 16, tf32: 4.6 kFLOP per convolution, 12 ps at 400 TFLOP/s; 448 bytes saved per block: 67 ps per convolution
                  at 3.35 TB/s. The prologue runs once per tap: 9 x 16 tanh.approx, 39 ps at 16 per cycle of each of
                  132 SMs, 1.755 GHz.
    C = 64, tf32: 74 kFLOP, 184 ps; 268 ps saved; the prologue's 155 ps run beside the products, on other units.
    C = 128, tf32: 295 kFLOP, 740 ps at full rate, of which cuDNN may reach twice the share that gathered tiles do:
                  more than the 535 ps saved.

So our kernel runs up to 64 channels and cuDNN above. "high" and "exact" take 3 or 6 bf16 products, two special
functions per SiLU, and a splitting of every operand at every tap, against cuDNN's fp32 on the fp32 units: here ours
runs up to 32 channels. Below 8 channels most of a tile's least depth, 16, is padding. Without a norm only the
epilogue is fused; the limits are the same. For gfx942 we have no figures: torch's convolution runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Tile, ceil_div, power_of_two, tile_for, with_channels


class ConvSpec(NamedTuple):
    """The constants of conv2d_fused's raw ops, in their order; see the public function for their meaning."""

    groups: int
    eps: float
    activation: bool
    alpha: float
    next_groups: int
    precision: str
    part_dtype: torch.dtype


CONV_SCHEMA = (
    "int groups, float eps, bool activation, float alpha, int next_groups, str precision, ScalarType part_dtype"
)


# (widest C_out, tile): a program computes ROWS positions by COLUMNS output channels, in steps of DEPTH input
# channels with loads in STAGES pipeline stages; split_warps are its warps where operands have several parts. Up to
# 128 channels one program has all of C_out, so that a is computed only k^2 times. 64 positions are the least of
# Hopper's matrix instructions, and with them small batches of 16 x 16 images fill the GPU. The depth is 16, because
# with 32, or with 128 positions, some target spills.
TILES: tuple[tuple[int, Tile], ...] = (
    (16, {"ROWS": 64, "COLUMNS": 16, "DEPTH": 16, "STAGES": 2, "num_warps": 4}),
    (32, {"ROWS": 64, "COLUMNS": 32, "DEPTH": 16, "STAGES": 2, "num_warps": 4}),
    (64, {"ROWS": 64, "COLUMNS": 64, "DEPTH": 16, "STAGES": 2, "num_warps": 8, "split_warps": 4}),
    (1 << 62, {"ROWS": 64, "COLUMNS": 128, "DEPTH": 16, "STAGES": 2, "num_warps": 8}),
)

# (widest of C_in and C_out, tile) of the weight gradient: COLUMNS output by DEPTH input channels, ROWS positions
# per step. 32 positions are two matrix instructions in 16 bits, four in tf32.
WEIGHT_TILES: tuple[tuple[int, Tile], ...] = (
    (16, {"ROWS": 64, "COLUMNS": 16, "DEPTH": 16, "STAGES": 2, "num_warps": 4}),
    (32, {"ROWS": 32, "COLUMNS": 32, "DEPTH": 32, "STAGES": 2, "num_warps": 4}),  # 64 rows spill on sm_100
    (1 << 62, {"ROWS": 32, "COLUMNS": 64, "DEPTH": 64, "STAGES": 2, "num_warps": 8}),
)
_SPLITS = 128  # each split has nine taps: 1152 programs, and 4.7 MB of partial sums at C = 32
_STEPS_A_SPLIT = 8  # fewer steps would write more partial sums than they read inputs

# The largest C_in and C_out that run fused, by precision, and the smallest, by the docstring's arithmetic.
WIDEST = {"tf32": 64, "fast": 64, "high": 32, "exact": 32}
WIDEST_1X1 = 32  # 64 channels spill on sm_80
NARROWEST = 8
_TARGETS = ("sm_80", "sm_90", "sm_100")


def runs_fused(n_in: int, n_out: int, kernel: int, precision: str, target: str | None) -> bool:
    """Whether our kernel is predicted to take less time than torch's convolution and the kernels around it."""
    widest = {1: WIDEST_1X1, 3: WIDEST[precision]}.get(kernel, 0)
    return min(n_in, n_out) >= NARROWEST and max(n_in, n_out) <= widest and target in _TARGETS


def choose_tile(
    n_out: int, n_positions: int, table: Sequence[tuple[int, Tile]] = TILES, parts: int = 1
) -> dict[str, int]:
    """The tile for images of this many positions; for a weight gradient ``n_out`` is the larger of C_in, C_out."""
    tile = dict(tile_for(n_out, table))
    split_warps = tile.pop("split_warps", tile["num_warps"])
    rows = min(tile["ROWS"], max(power_of_two(n_positions), 16))  # tl.dot takes at least 16 rows
    return {**tile, "ROWS": rows, "num_warps": tile["num_warps"] if parts == 1 else split_warps}


def weight_splits(n_steps: int) -> tuple[int, int]:
    """(splits, steps per split) of the weight gradient's sum over this many tiles of positions."""
    steps = max(_STEPS_A_SPLIT, ceil_div(n_steps, _SPLITS))
    return ceil_div(n_steps, steps), steps


def padded_group(n_channels: int, groups: int) -> int:
    """Columns that a group takes in a tile of which groups are summed: a power of two; 1 if there are no groups."""
    return power_of_two(n_channels // groups) if groups else 1


def handed_over(n_out: int, groups: int) -> bool:
    """Whether each program of the convolution has all of y's groups, so that it can compute their statistics."""
    return power_of_two(groups) * padded_group(n_out, groups) <= tile_for(n_out, TILES)["COLUMNS"]


def n_row_tiles(n_out: int, n_positions: int) -> int:
    """Tiles of positions per sample."""
    return ceil_div(n_positions, choose_tile(n_out, n_positions)["ROWS"])


def empty_outputs(x: Tensor, weight: Tensor, residual: Tensor | None, spec: ConvSpec) -> tuple[Tensor, ...]:
    """Empty outputs of conv2d_fused: y, followed by ``empty_statistics``."""
    dtype = weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)
    return with_channels(x, weight.shape[0], dtype), *empty_statistics(x, weight.shape[0], spec)


def empty_statistics(x: Tensor, n_out: int, spec: ConvSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (mean and rstd of x [B, groups], statistics of y's tiles [B, tiles, next_groups, 2])."""
    mean, rstd = (x.new_empty((x.shape[0], spec.groups), dtype=torch.float32) for _ in range(2))
    tiles = n_row_tiles(n_out, x.shape[2] * x.shape[3])
    return mean, rstd, x.new_empty((x.shape[0], tiles, spec.next_groups, 2), dtype=torch.float32)


def tile_rows_of(n_tiles: int, n_positions: int) -> int:
    """Positions per tile, a power of two, where ``n_tiles`` tiles hold ``n_positions``."""
    return power_of_two(ceil_div(n_positions, n_tiles))
