"""How the coupling stack's backward runs: the modes of its products, its tiles, programs and runs of rows.

Bytes of scratch memory, for tiles of ROWS rows, runs of R rows, N = n - 1 hidden layers, and w_h, w_s and w_d bytes
per number of h, act' and d, which are 2 in "fast" and else 4:

    per program    4 numel(weights) + ROWS (w_h P + w_d 2 P + (w_h + w_s + w_d) N H) + 8 P R (steps + 1)

SCRATCH_BYTES limits their sum: a deep stack has shorter runs, and where that does not suffice fewer programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import ceil_div
from .row_products import Mode
from .stack_spec import MAP_PARTS, N_PARTS, StackSpec

# A program's tile: its rows, the columns of a product, the depth of a step and the stages of its loads. Eight warps
# leave 255 registers per thread to the one program of a multiprocessor; with four, small tiles spill on sm_100. 128
# rows, because the weights and their partial sums pass through L2 once per tile. 64 columns: 32 sums per thread.
LARGE = {"ROWS": 128, "COLUMNS": 64, "DEPTH": 32, "STAGES": 2, "num_warps": 8}
# Where a tile of 128 rows for every multiprocessor would leave some of them idle.
SMALL = {**LARGE, "ROWS": 32}
# Four stages where they do not spill: with two a step's operands are waited for with nothing beside. Not for narrow
# networks, whose products are one step.
STAGES = {"sm_90": 4, "sm_100": 4}

# The most tiles of a run, and the scratch memory of all programs.
TILES_A_RUN = 8
SCRATCH_BYTES = 2**30


@dataclass(frozen=True)
class StackPass:
    """The weights of the op, their spec, and whether its kernels run on a GPU."""

    weights: Tensor
    operands: Tensor
    spec: StackSpec
    on_gpu: bool

    @property
    def matrices(self) -> Tensor:
        """The conditioners' matrices, a row per layer; in modes of one part rounded, as in the forward."""
        return self.operands[0] if N_PARTS[self.spec.precision] == 1 else self.weights

    @property
    def part_dtype(self) -> torch.dtype:
        """bf16, for its range; fp32, which means tf32, under Triton's interpreter, which has no bf16 arithmetic."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def forward_mode(self) -> Mode:
        parts = N_PARTS[self.spec.precision]
        return Mode(parts, self.operands.dtype if parts == 1 else self.part_dtype)

    @property
    def gradient_mode(self) -> Mode:
        precision = self.spec.precision
        return Mode(N_PARTS[precision], torch.float32 if precision == "tf32" else self.part_dtype)

    @property
    def map_mode(self) -> Mode:
        return Mode(max(N_PARTS[self.spec.precision], MAP_PARTS), self.part_dtype)

    @property
    def scratch_dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of h, act' and d: in "fast" those of the operands, and fp16 for act', which lies between -0.2 and 1.2."""
        if self.spec.precision != "fast":
            return torch.float32, torch.float32, torch.float32
        return self.operands.dtype, torch.float16, self.gradient_mode.dtype


class Grid(NamedTuple):
    """How the rows are shared among programs.

    Args:
        tile: a program's tile.
        programs: how many run.
        run: rows that a program takes through the whole stack before it takes others, a multiple of the tile's.
    """

    tile: dict[str, int]
    programs: int
    run: int


def grid_of(batch: int, stack: StackPass, multiprocessors: int, target: str | None = None) -> Grid:
    """Few programs or short runs where SCRATCH_BYTES requires it; see the top of this file."""
    spec, layers = stack.spec, stack.spec.n_linear - 1
    tile = LARGE if batch >= LARGE["ROWS"] * multiprocessors else SMALL
    if min(spec.widths) >= tile["DEPTH"]:
        tile = {**tile, "STAGES": STAGES.get(target or "", tile["STAGES"])}
    rows = tile["ROWS"]
    programs = min(ceil_div(batch, rows), multiprocessors)
    h, slope, d = [dtype.itemsize for dtype in stack.scratch_dtypes]
    of_layer = h * spec.half + 2 * d * spec.half + (h + slope + d) * layers * spec.hidden
    of_tile = 8 * rows * spec.half * (len(spec.steps(stack.weights)) + 1)
    fixed = 4 * stack.weights.numel() + rows * of_layer
    tiles = min(TILES_A_RUN, ceil_div(ceil_div(batch, rows), programs))
    tiles = max(1, min(tiles, (SCRATCH_BYTES // programs - fixed) // of_tile))
    programs = max(1, min(programs, SCRATCH_BYTES // (fixed + tiles * of_tile)))
    return Grid(tile, min(programs, ceil_div(batch, tiles * rows)), tiles * rows)
