"""What the gradient of a coupling stack holds while it runs: modes of products, scratch, rows per run.

Scratch of a run of R rows: every step's input [R, 2 P] fp32; of one layer at a time h_i [R, H], fp32
or in "fast" its 16-bit type, act'_i [R, H] and d_n [R, 2 P] fp32, so that db sums what was not rounded.

Bytes: R (8 P (steps + 2) + (n - 1) H (4 + w) + 8 P) with w = 2 in "fast" and 4 else; a run is as long as
SCRATCH_BYTES allow, so that this does not grow with B; the weights' partial sums besides.

As operands in "fast", gradients are bf16 even where x is fp16, whose range ends at 6e-8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .row_products import Mode, n_splits
from .stack_spec import N_PARTS, StackSpec, map_parts

__all__ = ["ROWS_AT_A_TIME", "SCRATCH_BYTES", "Scratch", "StackPass"]

# One step's scratch, 1.8 KB per row in "fast" at D = 64, H = 128, n = 3, stays in an L2 of 40 MB or more.
ROWS_AT_A_TIME = 16384
# What a run of rows may take: a deep stack's inputs of steps, 256 B each at D = 64, shorten it.
SCRATCH_BYTES = 2**27
_FEWEST_ROWS = 1024


@dataclass(frozen=True)
class StackPass:
    """The op's weights, what they are, and where its kernels run."""

    weights: Tensor
    operands: Tensor
    spec: StackSpec
    on_gpu: bool

    def matrices(self, row: int) -> list[Tensor]:
        """The conditioner's, [out, in]: rounded where there is one part, which is what the forward multiplied."""
        spec, shapes = self.spec, self.spec.matrix_shapes
        held = self.operands[0, row] if N_PARTS[spec.precision] == 1 else self.weights[row, : spec.matrix_size]
        return [m.view(shape) for m, shape in zip(held.split([a * b for a, b in shapes]), shapes, strict=True)]

    @property
    def part_dtype(self) -> torch.dtype:
        """bf16, for its range; under Triton's interpreter, which computes on bf16's bits, tf32 stands in."""
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
        return Mode(map_parts(self.spec.precision), self.part_dtype)

    @property
    def hidden_dtype(self) -> torch.dtype:
        return self.operands.dtype if self.spec.precision == "fast" else torch.float32

    def rows_at_a_time(self) -> int:
        """As many rows as SCRATCH_BYTES hold; the formula at the top of this file."""
        spec, steps = self.spec, len(self.spec.steps(self.weights))
        hidden = (spec.n_linear - 1) * spec.hidden * (4 + self.hidden_dtype.itemsize)
        bytes_per_row = 8 * spec.half * (steps + 3) + hidden
        return min(ROWS_AT_A_TIME, max(_FEWEST_ROWS, SCRATCH_BYTES // bytes_per_row))


@dataclass
class Scratch:
    """One layer's h_i, act'_i (then d_i) and d_n, and the partial sums of a row of the weights."""

    h: list[Tensor]
    slopes: list[Tensor]
    d: Tensor
    partials: Tensor

    @classmethod
    def of(cls, z: Tensor, stack: StackPass) -> Scratch:
        rows, (*hidden, n_out) = z.shape[0], stack.spec.widths[1:]
        return cls(
            [z.new_empty(rows, n, dtype=stack.hidden_dtype) for n in hidden],
            [z.new_empty(rows, n) for n in hidden],
            z.new_empty(rows, n_out),
            z.new_empty(n_splits(rows), stack.spec.row_size),
        )
