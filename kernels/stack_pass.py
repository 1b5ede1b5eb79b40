"""What the gradient of a coupling stack holds while it runs: constants, modes of products, scratch, rows a run.

Scratch of a run of R rows: every step's input [R, 2 P] fp32; of one layer at a time h_i [R, H], fp32
or in "fast" its 16-bit type, act'_i [R, H] and d_n [R, 2 P] fp32, so that db sums what was not rounded.

Bytes: R (8 P (steps + 2) + (n - 1) H (4 + w) + 8 P) with w = 2 in "fast" and 4 else; a run is as long as
SCRATCH_BYTES allow, so that this does not grow with B; the weights' partial sums besides.

As operands in "fast", gradients are bf16 even where x is fp16, whose range ends at 6e-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .row_products import Mode, n_splits
from .stack_layout import N_PARTS, StackLayout, map_parts

__all__ = ["ROWS_AT_A_TIME", "SCRATCH_BYTES", "Scratch", "StackPass"]

# One step's scratch, 1.8 KB a row in "fast" at D = 64, H = 128, n = 3, stays in an L2 of 40 MB or more.
ROWS_AT_A_TIME = 16384
# What a run of rows may take: a deep stack's inputs of steps, 256 B each at D = 64, shorten it.
SCRATCH_BYTES = 2**27
_FEWEST_ROWS = 1024


@dataclass(frozen=True)
class StackPass:
    """The op's weights and constants; ``layout`` is of the padded rows [R, 2 P]."""

    weights: Tensor
    operands: Tensor
    layout: StackLayout
    sizes: tuple[int, int]
    activation: int
    kind: int
    bound: float
    floor: float
    scale_first: bool
    moves_second: bool
    inverse: bool
    precision: str
    on_gpu: bool

    @classmethod
    def of(cls, x: Tensor, weights: Tensor, operands: Tensor, constants: Sequence[Any]) -> StackPass:
        """For the raw op's arguments."""
        n_linear, hidden, maps, head, activation, kind, bound, floor, scale_first, *rest = constants
        moves_second, inverse, _, precision = rest
        rows = StackLayout(x.shape[1], n_linear, hidden, maps, head)
        return cls(
            weights, operands, replace(rows, features=2 * rows.half), rows.sizes, activation, kind, bound, floor,
            scale_first, moves_second, inverse, precision, x.is_cuda,
        )  # fmt: skip

    @property
    def steps(self) -> list[tuple[int | None, int]]:
        """(layer, or None for a map; row of the weights), in the order they run."""
        head, maps = int(self.layout.head), self.layout.maps
        steps: list[tuple[int | None, int]] = [(None, 0)] if head else []
        for layer in range(self.layout.n_layers(self.weights)):
            steps += [(layer, layer + head), *([(None, layer + head)] if maps else [])]
        return steps[::-1] if self.inverse else steps

    def moves_first(self, layer: int) -> bool:
        return (layer + self.moves_second) % 2 == 0

    def halves(self, z: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(kept, moved) of z [R, 2 P]: views."""
        first, second = z.split(self.layout.half, dim=1)
        return (second, first) if self.moves_first(layer) else (first, second)

    def matrices(self, row: int) -> list[Tensor]:
        """The conditioner's, [out, in]: rounded where there is one part, which is what the forward multiplied."""
        shapes = self.layout.matrix_shapes
        held = (
            self.operands[0, row] if N_PARTS[self.precision] == 1 else self.weights[row, : self.layout.matrix_size]
        )
        return [m.view(shape) for m, shape in zip(held.split([a * b for a, b in shapes]), shapes, strict=True)]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Where a row of the weights has each linear layer's matrix, and its bias."""
        places, at, bias_at = [], 0, self.layout.matrix_size
        for n_out, n_in in self.layout.matrix_shapes:
            places.append((at, bias_at))
            at, bias_at = at + n_out * n_in, bias_at + n_out
        return places

    @property
    def part_dtype(self) -> torch.dtype:
        """bf16, for its range; under Triton's interpreter, which computes on bf16's bits, tf32 stands in."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def forward_mode(self) -> Mode:
        fast_or_tf32 = N_PARTS[self.precision] == 1
        return Mode(N_PARTS[self.precision], self.operands.dtype if fast_or_tf32 else self.part_dtype)

    @property
    def gradient_mode(self) -> Mode:
        return Mode(N_PARTS[self.precision], torch.float32 if self.precision == "tf32" else self.part_dtype)

    @property
    def map_mode(self) -> Mode:
        return Mode(map_parts(self.precision), self.part_dtype)

    @property
    def hidden_dtype(self) -> torch.dtype:
        return self.operands.dtype if self.precision == "fast" else torch.float32

    def rows_at_a_time(self) -> int:
        """As many rows as SCRATCH_BYTES hold; the formula at the top of this file."""
        layout = self.layout
        hidden = (layout.n_linear - 1) * layout.hidden * (4 + self.hidden_dtype.itemsize)
        bytes_a_row = 4 * layout.features * (len(self.steps) + 2) + hidden + 4 * layout.features
        return min(ROWS_AT_A_TIME, max(_FEWEST_ROWS, SCRATCH_BYTES // bytes_a_row))


@dataclass
class Scratch:
    """One layer's h_i, act'_i (then d_i) and d_n, and the partial sums of a row of the weights."""

    h: list[Tensor]
    slopes: list[Tensor]
    d: Tensor
    partials: Tensor

    @classmethod
    def of(cls, z: Tensor, stack: StackPass) -> Scratch:
        rows, (*hidden, n_out) = z.shape[0], stack.layout.widths[1:]
        return cls(
            [z.new_empty(rows, n, dtype=stack.hidden_dtype) for n in hidden],
            [z.new_empty(rows, n) for n in hidden],
            z.new_empty(rows, n_out),
            z.new_empty(n_splits(rows), stack.layout.row_size),
        )
