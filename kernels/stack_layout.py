"""How a coupling stack's weights lie in memory: one row a layer, every matrix padded.

A row of the fp32 weights, [out, in] matrices contiguous and in turn:

    W_1 [H, P]  W_2 [H, H] ... W_n [2 P, H]  |  b_1 [H] ... b_n [2 P]  |  map  |  map's bias [2 P]

with P a padded half and H the padded hidden width; n = 1 has the one matrix [2 P, P]. The
last matrix's rows are (shift_i, raw_i) in turn. The map after the layer is nothing, a
diagonal [2 P] or a matrix [2 P, 2 P], over [first half | padding | second half | padding].
Where the stack has a map before its first layer, row 0 holds that map alone.

Padding is zeros, which stay zeros through every product, activation and coupling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import power_of_two

__all__ = ["DENSE", "DIAGONAL", "NO_MAPS", "N_PARTS", "StackLayout", "map_parts", "padded_half", "padded_hidden"]

NO_MAPS, DIAGONAL, DENSE = 0, 1, 2

# In how many parts a mode's products take their operands.
N_PARTS = {"exact": 3, "high": 2, "tf32": 1, "fast": 1}


def map_parts(precision: str) -> int:
    """Parts of a dense map's operands: two at least, since a map moves the state itself."""
    return max(N_PARTS[precision], 2)


def padded_half(features: int) -> int:
    """P: a power of two, at least the 16 that a product of operands sums over."""
    return max(16, power_of_two((features + 1) // 2))


def padded_hidden(hidden: int) -> int:
    """H: a power of two, at least 16."""
    return max(16, power_of_two(hidden))


@dataclass(frozen=True)
class StackLayout:
    """Sizes and offsets within a row.

    Args:
        features: D.
        n_linear: linear layers of each conditioner, 1 to 4.
        hidden: H, padded; anything where n_linear is 1.
        maps: NO_MAPS, DIAGONAL or DENSE.
        head: whether row 0 is a map before the first layer.
    """

    features: int
    n_linear: int
    hidden: int
    maps: int
    head: bool

    @property
    def half(self) -> int:
        return padded_half(self.features)

    @property
    def sizes(self) -> tuple[int, int]:
        """Features of the first and of the second half."""
        return (self.features + 1) // 2, self.features // 2

    @property
    def widths(self) -> tuple[int, ...]:
        """(P, H, ..., H, 2 P)."""
        return (self.half, *[self.hidden] * (self.n_linear - 1), 2 * self.half)

    @property
    def matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each linear layer."""
        return tuple(zip(self.widths[1:], self.widths[:-1], strict=True))

    @property
    def matrix_size(self) -> int:
        """Elements of a row's conditioner matrices."""
        return sum(n_out * n_in for n_out, n_in in self.matrix_shapes)

    @property
    def map_shape(self) -> tuple[int, ...]:
        return ((0,), (2 * self.half,), (2 * self.half, 2 * self.half))[self.maps]

    @property
    def map_offset(self) -> int:
        return self.matrix_size + sum(self.widths[1:])

    @property
    def row_size(self) -> int:
        return self.map_offset + (torch.Size(self.map_shape).numel() + 2 * self.half if self.maps else 0)

    def pad(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, 2 P]: zeros after each half."""
        halves = x.split(self.sizes, dim=1)
        return torch.cat([F.pad(half, (0, self.half - half.shape[1])) for half in halves], dim=1)

    def unpad(self, z: Tensor) -> Tensor:
        """[B, 2 P] -> [B, D]."""
        halves = z.split(self.half, dim=1)
        return torch.cat([half[:, :size] for half, size in zip(halves, self.sizes, strict=True)], dim=1)

    def n_layers(self, weights: Tensor) -> int:
        """L of weights [rows, row_size]."""
        return weights.shape[0] - self.head

    def unpack(self, row: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """(matrices, biases, map, map's bias): views of one row [row_size]."""
        shapes = [*self.matrix_shapes, *((n,) for n in self.widths[1:])]
        if self.maps:
            shapes += [self.map_shape, (2 * self.half,)]
        parts = row.split([torch.Size(shape).numel() for shape in shapes])
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        n = self.n_linear
        empty = row.new_empty(0)
        return views[:n], views[n : 2 * n], *(views[2 * n :] or (empty, empty))
