"""Packing a coupling stack's weights for its kernel: stacked, padded, interleaved, split by precision.

Packing is plain torch in the graph, at every call, so that gradients reach the layers' own
tensors; ``pack_stack`` is separate so that frozen weights are packed once. The layout of a row
is linfast.kernels.stack_layout's. Beside the fp32 weights, which gradients are of, go the
operands of the products, which they are not: rounded copies, in parts or to tf32 (linfast.kernels.mlp).

A map between layers moves the state itself, and W and W^-1 rounded separately are no longer
inverses: its operands have two parts at least, whatever the mode (three in "exact").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import without_autocast
from ..kernels.stack_layout import DENSE, DIAGONAL, N_PARTS, NO_MAPS, StackLayout, map_parts, padded_hidden
from ..linalg import inverse_or_nan

__all__ = [
    "AffineMap",
    "CouplingLayer",
    "PackedMap",
    "PackedStack",
    "pack_map",
    "pack_stack",
    "stack_layout",
    "widest",
]


class AffineMap(NamedTuple):
    """x -> W x + c on all features.

    Args:
        weight: W [D, D], or its diagonal [D].
        bias: c [D], or None for 0.
        inverse: W^-1 [D, D] where the caller has it; by default computed where it is needed.
        log_det: log|det W|, 0-d, likewise.
    """

    weight: Tensor
    bias: Tensor | None = None
    inverse: Tensor | None = None
    log_det: Tensor | None = None

    def inverted(self) -> tuple[Tensor, Tensor | None]:
        """(V, d) with V y + d = W^-1 (y - c), outside autocast; NaN where W is singular."""
        return without_autocast(self.weight.device.type, self._inverted)

    def _inverted(self) -> tuple[Tensor, Tensor | None]:
        V = self.inverse
        if V is None:
            weight = self.weight.to(_wide(self.weight))
            V = weight.reciprocal() if weight.ndim == 1 else inverse_or_nan(weight)
        if self.bias is None:
            return V, None
        bias = self.bias.to(V.dtype)
        return V, -V * bias if V.ndim == 1 else -(V @ bias)

    def log_abs_det(self) -> Tensor:
        """log|det W|, in fp32 or wider."""
        if self.log_det is not None:
            return self.log_det
        weight = self.weight.to(_wide(self.weight))
        return weight.abs().log().sum() if weight.ndim == 1 else torch.linalg.slogdet(weight).logabsdet


class CouplingLayer(NamedTuple):
    """One affine coupling with an MLP conditioner, and what follows it.

    Args:
        weights: of 1 to 4 linear layers, [out, in]: the kept half's width in, twice the moved half's out.
        biases: [out] or None, one a linear layer.
        layout: of the output: "halves" [shift | raw] or "interleaved".
        map: an affine map over all features after the coupling, or None.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    layout: str = "halves"
    map: AffineMap | None = None


@dataclass(frozen=True)
class PackedStack:
    """What the kernel reads.

    Args:
        weights: [rows, row_size] fp32; gradients are of this.
        operands: [parts, rows, matrix_size], the matrices as products take them.
        map_operands: [parts, rows, 4 P^2], the dense maps likewise; empty where there are none.
        layout: sizes and offsets.
    """

    weights: Tensor
    operands: Tensor
    map_operands: Tensor
    layout: StackLayout


class PackedMap(NamedTuple):
    """A map without bias as the kernel reads it: values [4 P^2] or a diagonal's [2 P], operands [parts, 4 P^2]."""

    values: Tensor
    operands: Tensor


def stack_layout(layers: Sequence[CouplingLayer], features: int, head: AffineMap | None) -> StackLayout:
    """The common layout of these layers: the widest hidden layer, the densest map."""
    maps = [m for m in (head, *(layer.map for layer in layers)) if m is not None]
    kind = max([NO_MAPS, *[DENSE if m.weight.ndim == 2 else DIAGONAL for m in maps]])
    return StackLayout(features, len(layers[0].weights), padded_hidden(widest(layers)), kind, head is not None)


def widest(layers: Sequence[CouplingLayer]) -> int:
    """The widest hidden layer; 1 where there is none."""
    return max([1, *[weight.shape[0] for layer in layers for weight in layer.weights[:-1]]])


def pack_stack(
    layers: Sequence[CouplingLayer],
    features: int,
    *,
    inverse: bool,
    precision: str,
    dtype: torch.dtype,
    head: AffineMap | None = None,
) -> PackedStack:
    """The layers' weights as one launch reads them.

    Args:
        layers: as ``coupling_stack`` takes them.
        features: D.
        inverse: pack the maps' inverses.
        precision: one of linfast.precision.PRECISIONS.
        dtype: what parts are rounded to (``half_dtype``).
        head: the map before the first layer.
    """
    layout = stack_layout(layers, features, head)
    pieces = [*_matrices(layers, layout), *_biases(layers, layout)]
    weights = torch.cat([piece.flatten(1) for piece in pieces], dim=1)
    if layout.head:
        weights = F.pad(weights, (0, 0, 1, 0))
    if layout.maps:
        maps = [head, *(layer.map for layer in layers)] if head is not None else [layer.map for layer in layers]
        weights = torch.cat((weights, _maps(maps, layout, inverse, weights)), dim=1)
    held = weights.detach()
    matrices = held[:, : layout.matrix_size]
    operands = _tf32(matrices)[None] if precision == "tf32" else _parts(matrices, N_PARTS[precision], dtype)
    if layout.maps == DENSE:
        size = 4 * layout.half**2
        map_operands = _parts(held[:, layout.map_offset : layout.map_offset + size], map_parts(precision), dtype)
    else:
        map_operands = held.new_empty(0, dtype=dtype)
    return PackedStack(weights, operands, map_operands, layout)


def pack_map(weight: Tensor, *, precision: str, dtype: torch.dtype) -> PackedMap:
    """A map W [D, D], or its diagonal [D], over all features, without a bias."""
    layout = StackLayout(weight.shape[0], 1, 1, DENSE if weight.ndim == 2 else DIAGONAL, False)
    values = weight.to(_wide(weight))
    for dim in range(weight.ndim):
        values = _pad_halves(values, dim, layout)
    values = values.flatten()
    if weight.ndim == 1:
        return PackedMap(values, values.new_empty(0, dtype=dtype))
    return PackedMap(values, _parts(values.detach(), map_parts(precision), dtype))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _stacked(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """[L, *shape], zeros after each tensor's own extent; one copy where the shapes agree, a view of a lone one."""
    if len({tensor.shape for tensor in tensors}) > 1:
        tensors = [_padded(tensor, shape) for tensor in tensors]
    stacked = torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
    return _padded(stacked, (len(tensors), *shape)).to(_wide(stacked))


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape == shape:
        return tensor
    amounts = [n for have, want in zip(tensor.shape[::-1], shape[::-1], strict=True) for n in (0, want - have)]
    return F.pad(tensor, amounts)


def _matrices(layers: Sequence[CouplingLayer], layout: StackLayout) -> list[Tensor]:
    *inner, (_, n_in) = layout.matrix_shapes
    pieces = [_stacked([layer.weights[i] for layer in layers], shape) for i, shape in enumerate(inner)]
    return [*pieces, _stacked([_pairs(layer.weights[-1], layer) for layer in layers], (layout.half, 2, n_in))]


def _biases(layers: Sequence[CouplingLayer], layout: StackLayout) -> list[Tensor]:
    def bias(layer: CouplingLayer, i: int) -> Tensor:
        weight, given = layer.weights[i], layer.biases[i]
        return weight.new_zeros(weight.shape[0]) if given is None else given

    last = layout.n_linear - 1
    pieces = [_stacked([bias(layer, i) for layer in layers], (layout.hidden,)) for i in range(last)]
    return [*pieces, _stacked([_pairs(bias(layer, last), layer) for layer in layers], (layout.half, 2))]


def _pairs(tensor: Tensor, layer: CouplingLayer) -> Tensor:
    """The last layer's rows as [moved, (shift, raw), ...]: a view."""
    if layer.layout == "interleaved":
        return tensor.unflatten(0, (-1, 2))
    return tensor.unflatten(0, (2, -1)).transpose(0, 1)


def _pad_halves(tensor: Tensor, dim: int, layout: StackLayout) -> Tensor:
    """[D] along this dimension to [first half | zeros | second half | zeros], [2 P]."""
    if layout.features == 2 * layout.half:
        return tensor
    halves = tensor.split(layout.sizes, dim)
    shape = list(tensor.shape)
    shape[dim] = layout.half
    return torch.cat([_padded(half, tuple(shape)) for half in halves], dim)


def _maps(maps: Sequence[AffineMap | None], layout: StackLayout, inverse: bool, like: Tensor) -> Tensor:
    """[rows, map, bias]; the identity where there is none."""
    rows = []
    for entry in maps:
        weight, bias = (
            (None, None) if entry is None else entry.inverted() if inverse else (entry.weight, entry.bias)
        )
        weight = like.new_ones(layout.features) if weight is None else weight.to(like.dtype)
        bias = like.new_zeros(layout.features) if bias is None else bias.to(like.dtype)
        if layout.maps == DENSE:
            weight = torch.diag(weight) if weight.ndim == 1 else weight
            weight = _pad_halves(weight, 1, layout)
        rows.append(torch.cat((_pad_halves(weight, 0, layout).flatten(), _pad_halves(bias, 0, layout))))
    return torch.stack(rows)


def _tf32(tensor: Tensor) -> Tensor:
    """To the nearest tf32, ties away from zero, in fp32; NaN and float64 as they are."""
    if tensor.dtype != torch.float32:
        return tensor
    nearest = (tensor.contiguous().view(torch.int32) + 0x1000) & -0x2000
    return torch.where(tensor.isnan(), tensor, nearest.view(torch.float32))


def _parts(tensor: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[count, *shape]: the rounding of the tensor, then of what is left over."""
    parts, rest = [tensor.to(dtype)], tensor
    for _ in range(count - 1):
        rest = rest - _with_its_bits(parts[-1]).to(rest.dtype)
        parts.append(rest.to(dtype))
    # torch.stack under autocast refuses a half type that is not autocast's.
    return without_autocast(tensor.device.type, torch.stack, parts) if count > 1 else parts[0][None]


def _with_its_bits(part: Tensor) -> Tensor:
    """The part as it is. Inductor leaves a cast down and up again out, and with it what the next part holds."""
    if not torch.compiler.is_compiling():
        return part
    return part.view(torch.int16).bitwise_not().bitwise_not().view(part.dtype)
