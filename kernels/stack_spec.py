"""StackSpec, which describes a coupling stack: its sizes and options, and the memory layout of its weights.

Its fields, in their order, are the constants of the raw op. The schema, the launchers and the reference are derived
from them, so that a new option is one more field.

The weights have one row per layer, with every matrix [out, in] padded and contiguous:

    W_1 [H, P]  W_2 [H, H] ... W_n [2 P, H]  |  b_1 [H] ... b_n [2 P]  |  map  |  bias of the map [2 P]
    |  scales of a dense map's rows [2 P]  |  scales of the matrices' rows [H] ... [2 P]

P is the padded width of a half, H that of a hidden layer, n the number of linear layers. With n = 1 there is one
matrix [2 P, P], with n = 0 no conditioner. The rows of the last matrix are shift_i, raw_i alternating. The map
after the layer is absent, a diagonal [2 P] or a matrix [2 P, 2 P], over the padded halves,
[first | 0 | second | 0]. If the stack has a map before its first layer (a head), row 0 contains only that map.
Padding is zeros, which stay zeros through every product, activation and coupling.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NO_MAPS, DIAGONAL, DENSE = 0, 1, 2

# The number of parts into which each mode splits the operands of its products.
N_PARTS = {"exact": 3, "high": 2, "tf32": 1, "fast": 1}
# As packed for a stack: its "exact" has two parts of fp16 with a scale per row (kernels/mlp.py).
STACK_PARTS = {**N_PARTS, "exact": 2}
# By how much the low part of such operands is larger than the remainder that it holds.
LOW = 2.0**11
# Of a dense map's operands in every mode, at least: a map multiplies the state itself.
MAP_PARTS = 2


def operand_dtypes(precision: str, half: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """(the packed operands' dtype of conditioners, that of dense maps); ``half`` is that of "fast"."""
    half = torch.float16 if precision == "exact" else half
    return torch.float32 if precision == "tf32" else half, half


def is_scaled(parts: int, dtype: torch.dtype) -> bool:
    """Whether so many parts of this type are scaled, row by row (kernels/mlp.py)."""
    return parts == 2 and dtype == torch.float16


def padded_hidden(hidden: int) -> int:
    """The padded width of a hidden layer or a half, a multiple of any tile of it.

    It is a power of two, at least 16, which tl.dot requires; past 256, the widest layer that one program holds
    (kernels/stack_configs.py), a multiple of 64.
    """
    return -(-hidden // 64) * 64 if hidden > 256 else 1 << max(hidden - 1, 15).bit_length()


@dataclass(frozen=True)
class StackLayout:
    """Sizes of a stack, and offsets within a row of its weights, which are computed once.

    Args:
        features: D.
        n_linear: linear layers of each conditioner, 1 to 4; 0 where there are maps alone.
        hidden: H, padded; not used where n_linear is 1 or 0.
        maps: NO_MAPS, DIAGONAL or DENSE, the densest map of the stack.
        head: whether row 0 is a map before the first layer.
    """

    features: int
    n_linear: int
    hidden: int
    maps: int
    head: bool
    half: int = field(init=False, compare=False, repr=False)  # P
    sizes: tuple[int, int] = field(init=False, compare=False, repr=False)  # features of either half
    widths: tuple[int, ...] = field(init=False, compare=False, repr=False)  # (P, H, ..., H, 2 P)
    matrix_shapes: tuple[tuple[int, int], ...] = field(init=False, compare=False, repr=False)  # (out, in) of each
    matrix_size: int = field(init=False, compare=False, repr=False)  # elements of a row's conditioner matrices
    map_shape: tuple[int, ...] = field(init=False, compare=False, repr=False)  # of a row's map, without its bias
    map_size: int = field(init=False, compare=False, repr=False)
    map_offset: int = field(init=False, compare=False, repr=False)  # where a row's map begins
    scales_offset: int = field(init=False, compare=False, repr=False)  # where the scales of operands begin
    row_size: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        half, hidden = padded_hidden((self.features + 1) // 2), [self.hidden] * (self.n_linear - 1)
        widths = (half, *hidden, 2 * half) if self.n_linear else (half,)
        shapes = tuple(zip(widths[1:], widths[:-1], strict=True))
        matrix_size = sum([n_out * n_in for n_out, n_in in shapes])
        map_offset, map_size = matrix_size + sum(widths[1:]), (0, 2 * half, 4 * half * half)[self.maps]
        scales_offset = map_offset + map_size + (2 * half if self.maps else 0)
        computed: dict[str, Any] = {
            "half": half,
            "sizes": ((self.features + 1) // 2, self.features // 2),
            "widths": widths,
            "matrix_shapes": shapes,
            "matrix_size": matrix_size,
            "map_shape": ((0,), (2 * half,), (2 * half, 2 * half))[self.maps],
            "map_size": map_size,
            "map_offset": map_offset,
            "scales_offset": scales_offset,
            "row_size": scales_offset + (2 * half if self.maps == DENSE else 0) + sum(widths[1:]),
        }
        for name, value in computed.items():
            object.__setattr__(self, name, value)  # frozen; Dynamo of torch 2.11 knows no update of vars()

    def pad(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, 2 P]: zeros after each half; x itself where there is nothing to add."""
        if x.shape[1] == 2 * self.half:
            return x
        halves = x.split(self.sizes, dim=1)
        return torch.cat([F.pad(half, (0, self.half - half.shape[1])) for half in halves], dim=1)

    def unpad(self, z: Tensor) -> Tensor:
        """[B, 2 P] -> [B, D]; z itself where nothing is removed."""
        if self.features == 2 * self.half:
            return z
        halves = z.split(self.half, dim=1)
        return torch.cat([half[:, :size] for half, size in zip(halves, self.sizes, strict=True)], dim=1)

    def core_matrix(self, core: Tensor) -> Tensor:
        """A Linearizer's padded A, [2 P, 2 P] or [2 P], from ``core`` [1, A | bias | scales], one map's stack."""
        width = 2 * self.half
        if core.shape[1] == 2 * width:  # the diagonal and the bias
            return core[0, :width]
        return core[0, : width * width].view(width, width)

    def apply_core(self, z: Tensor, core: Tensor) -> Tensor:
        """A z for z [B, D], in z's dtype."""
        values, A = self.pad(z.to(core.dtype)), self.core_matrix(core)
        return self.unpad(values * A if A.ndim == 1 else F.linear(values, A)).to(z.dtype)

    def scales(self, row: Tensor) -> tuple[Tensor, ...]:
        """What each matrix's operands are to be multiplied by, row by row: views of one row [row_size]."""
        return row[self.row_size - sum(self.widths[1:]) :].split(self.widths[1:])

    def n_layers(self, weights: Tensor) -> int:
        """The number of coupling layers in weights [rows, row_size]."""
        return weights.shape[0] - self.head

    def matrices(self, row: Tensor) -> list[Tensor]:
        """The conditioner's matrices [out, in] in a row of operands [matrix_size]: views."""
        parts = row.split([n_out * n_in for n_out, n_in in self.matrix_shapes])
        return [part.view(shape) for part, shape in zip(parts, self.matrix_shapes, strict=True)]

    def unpack(self, row: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """(matrices, biases, map, bias of the map): views of one row [row_size]."""
        shapes = [*self.matrix_shapes, *((n,) for n in self.widths[1:])]
        if self.maps:
            shapes += [self.map_shape, (2 * self.half,)]
        parts = row[: self.scales_offset].split([torch.Size(shape).numel() for shape in shapes])
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        n = self.n_linear
        empty = row.new_empty(0)
        return views[:n], views[n : 2 * n], *(views[2 * n :] or (empty, empty))


@dataclass(frozen=True)
class StackSpec(StackLayout):
    """A coupling stack without its weights, and the options of a call.

    Args:
        activation: its number in linfast.ops.activations.ACTIVATION_NAMES, which kernels/mlp.py shares.
        kind: the scale map's id, ``ScaleMap.constexpr_id``.
        bound: the scale map's c.
        floor: the scale map's floor.
        scale_first: m e^s + t in place of (m + t) e^s.
        moves_second: layer 0 moves the second half in place of the first.
        inverse: apply the inverses of the layers, last to first.
        log_det: also sum the couplings' log-scales.
        precision: one of linfast.precision.PRECISIONS.
    """

    activation: int
    kind: int
    bound: float
    floor: float
    scale_first: bool
    moves_second: bool
    inverse: bool
    log_det: bool
    precision: str

    @property
    def constants(self) -> tuple[Any, ...]:
        """The fields in their order: the raw op's arguments after its tensors."""
        return tuple([getattr(self, name) for name in _NAMES])

    def steps(self, weights: Tensor) -> list[tuple[int | None, int]]:
        """(layer, or None for a map; row of the weights) of each step, in the order in which they are applied."""
        steps: list[tuple[int | None, int]] = [(None, 0)] if self.head else []
        for layer in range(self.n_layers(weights)):
            row = layer + self.head
            steps += [(layer, row), *([(None, row)] if self.maps else [])]
        return steps[::-1] if self.inverse else steps

    def moves_first(self, layer: int) -> bool:
        return (layer + self.moves_second) % 2 == 0

    def moved_size(self, layer: int) -> int:
        """Features of the half that this layer moves."""
        return self.sizes[0 if self.moves_first(layer) else 1]

    def halves(self, z: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(kept, moved) of z [B, 2 P]: views."""
        first, second = z.split(self.half, dim=1)
        return (second, first) if self.moves_first(layer) else (first, second)


_FIELDS = tuple([field for field in fields(StackSpec) if field.init])
_NAMES = tuple([field.name for field in _FIELDS])
N_CONSTANTS = len(_NAMES)
# Cached, because launchers are called with the same constants many times.
spec_of = functools.lru_cache(256)(StackSpec)


def specs_of(constants: Sequence[Any]) -> tuple[StackSpec, StackSpec]:
    """The specs of g_x and of g_y's inverse from the constants of a Linearizer's raw op."""
    return spec_of(*constants[:N_CONSTANTS]), spec_of(*constants[N_CONSTANTS:])


def schema_of(suffix: str = "") -> str:
    """The constants as a raw op's schema declares them: "int features, int n_linear, ...", with a suffix each."""
    return ", ".join(f"{field.type} {field.name}{suffix}" for field in _FIELDS)
