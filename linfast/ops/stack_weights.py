"""Packs a coupling stack's weights for its kernel in two launches: torch.cat, then a gather that also rounds.

All weights, biases and maps of a stack, or of a Linearizer's two stacks and its A, are flattened one after another
and gathered into rows (linfast.kernels.stack_spec). The results are these fp32 weights, which carry the gradients,
and the operands of the products: copies rounded to parts or to tf32 (linfast.kernels.mlp), without gradients.
Weights are packed at every call, inside autograd's graph, so that gradients reach the layers' own tensors.
``pack_stacks`` is a separate function, so that frozen weights are packed once.

A map between layers multiplies the state itself, and W and W^-1 rounded separately are not inverses. Its operands
therefore have two parts in every mode. For an inverse stack torch first inverts the
maps: a reciprocal per diagonal, a matrix inverse per dense map that is given without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import inverse_or_nan, without_autocast
from ..kernels.pack_table import ONE, SHIFT, SHIFTED, PackTable, layouts_of, pack_table, packing_gradient
from ..kernels.stack_spec import (
    DENSE,
    DIAGONAL,
    LOW,
    MAP_PARTS,
    N_PARTS,
    NO_MAPS,
    STACK_PARTS,
    StackLayout,
    is_scaled,
    operand_dtypes,
    padded_hidden,
)
from ..scale_maps import ScaleMap
from .register import define_op


class AffineMap(NamedTuple):
    """x -> W x + c on all features.

    Args:
        weight: W [D, D], or its diagonal [D].
        bias: c [D], or None for 0.
        inverse: W^-1, shaped as W; None: computed when it is needed.
        log_det: log|det W|, 0-d; None: computed when it is needed.
        inverse_bias: d = -W^-1 c, [D], used only with ``inverse``; None: computed when it is needed.
    """

    weight: Tensor
    bias: Tensor | None = None
    inverse: Tensor | None = None
    log_det: Tensor | None = None
    inverse_bias: Tensor | None = None

    def inverted(self) -> tuple[Tensor, Tensor | None]:
        """(V, d) with V y + d = W^-1 (y - c), outside autocast; NaN or infinite where W is singular."""
        return without_autocast(self.weight.device.type, self._inverted)

    def _inverted(self) -> tuple[Tensor, Tensor | None]:
        V = self.inverse
        if V is None:
            weight = self.weight.to(_wide(self.weight))
            V = weight.reciprocal() if weight.ndim == 1 else inverse_or_nan(weight)
        if self.inverse is not None and self.inverse_bias is not None:
            return V, self.inverse_bias
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
    """One affine coupling with an MLP conditioner, and the affine map after it.

    Args:
        weights: of 1 to 4 linear layers, [out, in], from the kept half's width to twice the moved half's.
        biases: [out] or None, one per linear layer.
        layout: of the conditioner's output: "halves", [shift | raw], or "interleaved", shift_i, raw_i alternating.
        map: an affine map over all features after the coupling, or None.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    layout: str = "halves"
    map: AffineMap | None = None


@dataclass(frozen=True)
class CouplingStack:
    """A network g: the arguments of ``coupling_stack`` that describe it."""

    layers: Sequence[CouplingLayer]
    activation: str
    scale_map: ScaleMap
    order: str = "shift_first"
    moves: str = "first"
    head: AffineMap | None = None

    def with_maps(self, log_det: Tensor, inverse: bool) -> Tensor:
        """log|det| of the whole stack, from ``log_det`` [B] of its couplings."""
        maps = [entry for entry in (self.head, *[layer.map for layer in self.layers]) if entry is not None]
        if not maps:
            return log_det
        of_maps = torch.stack([entry.log_abs_det() for entry in maps]).sum()
        return log_det - of_maps if inverse else log_det + of_maps


@dataclass(frozen=True)
class PackedStack:
    """A stack's weights as the kernel reads them.

    Args:
        weights: [rows, row_size] fp32; gradients flow through this tensor alone.
        operands: [parts, rows, matrix_size], the conditioners' matrices, rounded for the products.
        map_operands: [parts, rows, 4 P^2], the dense maps, rounded likewise; empty where there are none.
        layout: sizes and offsets.
    """

    weights: Tensor
    operands: Tensor
    map_operands: Tensor
    layout: StackLayout

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The raw op's arguments after x."""
        return self.weights, self.operands, self.map_operands


class StackWeights:
    """The weights to pack as one stack, and their layout.

    Args:
        layers: the couplings; empty for a map alone, which is then the head.
        features: D.
        head: a map before the first layer.
        inverse: pack the maps' inverses.
        shift: a number to add to the diagonal of the head's matrix [D, D]; only for a map alone.
    """

    def __init__(
        self, layers: Sequence[CouplingLayer], features: int, head: AffineMap | None = None, inverse: bool = False,
        shift: float = 0.0,
    ) -> None:  # fmt: skip
        self.rows = [*([] if head is None else [CouplingLayer((), (), map=head)]), *layers]
        self.inverse, self.shift = inverse, shift
        hidden, kind = 1, NO_MAPS  # the widest hidden layer, the densest map
        for layer in self.rows:
            for weight in layer.weights[:-1]:
                hidden = max(hidden, weight.shape[0])
            if layer.map is not None:
                kind = max(kind, DENSE if layer.map.weight.ndim == 2 else DIAGONAL)
        n_linear = len(layers[0].weights) if layers else 0
        self.layout = StackLayout(features, n_linear, padded_hidden(hidden), kind, head is not None)

    def describe(self, tensors: list[Tensor], numbers: list[int]) -> None:
        """Append the tensors to flatten, and their shapes in the format of linfast.kernels.pack_table."""
        layout = self.layout
        numbers += (layout.features, layout.n_linear, layout.hidden, layout.maps, layout.head, len(self.rows))
        for weights, biases, order, entry in self.rows:
            tensors += weights
            if weights:
                numbers.append(weights[0].shape[1])
            for weight in weights:
                numbers.append(weight.shape[0])
            for bias in biases:
                numbers.append(bias is not None)
                if bias is not None:
                    tensors.append(bias)
            if weights:
                numbers.append(order == "interleaved")
            if entry is None:
                numbers += (NO_MAPS, False)
                continue
            weight, bias = entry.inverted() if self.inverse else (entry.weight, entry.bias)
            tensors += [weight] if bias is None else [weight, bias]
            numbers += (SHIFTED if self.shift else weight.ndim, bias is not None)


def pack_stack(
    layers: Sequence[CouplingLayer],
    features: int,
    *,
    inverse: bool,
    precision: str,
    dtype: torch.dtype,
    head: AffineMap | None = None,
) -> PackedStack:
    """The layers' weights, packed for one launch; with the maps' inverses if ``inverse``.

    ``precision`` is one of linfast.precision.PRECISIONS, ``dtype`` that of the parts (``half_dtype``).
    """
    return pack_stacks([StackWeights(layers, features, head, inverse)], precision, dtype)[0]


def pack_stacks(stacks: Sequence[StackWeights], precision: str, dtype: torch.dtype) -> list[PackedStack]:
    """Several stacks, packed in the same two launches; ``precision`` and ``dtype`` are those of ``pack_stack``.

    At most one of the stacks may have a shift.
    """
    tensors: list[Tensor] = []
    numbers: list[int] = []
    for stack in stacks:
        stack.describe(tensors, numbers)
    first = tensors[0]
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.to(_wide(first)) for tensor in tensors]
    flat = without_autocast(first.device.type, torch.cat, [tensor.reshape(-1) for tensor in tensors])
    pack = _reference if flat.dtype == torch.float64 else _stack_pack
    values, operands, map_operands = pack(flat, numbers, sum([s.shift for s in stacks]), precision, dtype)
    operands, map_operands = operands.detach(), map_operands.detach()
    sizes = [len(stack.rows) * stack.layout.row_size for stack in stacks]
    packed, at, map_at = [], 0, 0
    for stack, part in zip(stacks, values.split(sizes) if len(sizes) > 1 else [values], strict=True):
        layout, count = stack.layout, len(stack.rows)
        size, map_size = count * layout.matrix_size, count * layout.map_size if layout.maps == DENSE else 0
        of_matrices = operands[:, at : at + size].view(len(operands), count, layout.matrix_size)
        if map_size:
            of_maps = map_operands[:, map_at : map_at + map_size].view(-1, count, layout.map_size)
        else:
            of_maps = map_operands.new_empty(0)
        packed.append(PackedStack(part.view(count, layout.row_size), of_matrices, of_maps, layout))
        at, map_at = at + size, map_at + map_size
    return packed


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _reference(
    flat: Tensor, rows: list[int], shift: float, precision: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op in plain torch; float64 stays float64."""
    table = pack_table(rows, flat.device)
    found = flat.to(_wide(flat)).index_select(0, table.source.clamp(min=0) % SHIFT)
    added = torch.where(table.source >= SHIFT, shift, (table.source == ONE).to(found.dtype))
    values = torch.where(table.source >= 0, found, 0) + added
    of_matrices, of_maps = operand_dtypes(precision, dtype)
    scaled, inverses = _scaled(values.detach(), table, STACK_PARTS[precision], of_matrices, of_maps)
    matrices = _placed(scaled, table.target, table.n_operands)
    maps = _placed(scaled, -2 - table.target, table.n_map_operands)
    operands = (
        _tf32(matrices)[None] if precision == "tf32" else _parts(matrices, STACK_PARTS[precision], of_matrices)
    )
    return values + inverses, operands, _parts(maps, MAP_PARTS, of_maps) if len(maps) else maps.to(of_maps)


def _scaled(
    values: Tensor, table: PackTable, parts: int, of_matrices: torch.dtype, of_maps: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(the values times their scales s, 2^14 / s in the scales' places), both [N]; see kernels/mlp.py."""
    if values.dtype == torch.float64:  # no kernel reads them
        return values, torch.zeros_like(values)
    begin, length, place = table.runs.long().unbind(1)
    run = torch.arange(len(begin), device=values.device).repeat_interleave(length)
    p = torch.arange(len(run), device=values.device) + (begin - length.cumsum(0) + length)[run]
    largest = values.new_zeros(len(begin)).scatter_reduce(0, run, values[p].abs(), "amax")
    exponent = torch.where(largest.isfinite(), largest.frexp().exponent, 129).clamp(min=-97)
    exponent = torch.where(largest == 0, -97, exponent)
    used = torch.where(table.target[begin] < -1, is_scaled(MAP_PARTS, of_maps), is_scaled(parts, of_matrices))
    scale = torch.where(used & (place >= 0), torch.ldexp(torch.ones_like(largest), 15 - exponent), 1)
    scaled, inverses, has_place = values.clone(), torch.zeros_like(values), place >= 0
    scaled[p] *= scale[run]
    inverses[place[has_place]] = torch.where(used, 2.0**14 / scale, 1)[has_place]
    return scaled, inverses


def _placed(values: Tensor, target: Tensor, count: int) -> Tensor:
    """The values at their targets, [count]; those without a target go to one more place, which is cut off."""
    at = torch.where(target >= 0, target, count).long()
    return values.new_zeros(count + 1).index_copy(0, at, values)[:count]


def rounded(matrices: Tensor, precision: str, dtype: torch.dtype) -> Tensor:
    """[parts, *shape]: the operands of a mode's products, parts of ``dtype`` or tf32 numbers."""
    return _tf32(matrices)[None] if precision == "tf32" else _parts(matrices, N_PARTS[precision], dtype, 1.0)


def _tf32(tensor: Tensor) -> Tensor:
    """fp32 rounded to the nearest tf32 number, ties away from zero; NaN and other dtypes are unchanged."""
    if tensor.dtype != torch.float32:
        return tensor
    nearest = (tensor.view(torch.int32) + 0x1000) & -0x2000
    return torch.where(tensor.isnan(), tensor, nearest.view(torch.float32))


def _parts(tensor: Tensor, count: int, dtype: torch.dtype, low: float | None = None) -> Tensor:
    """[count, *shape]: the tensor rounded to ``dtype``, then the remainder times ``low`` rounded, and so on."""
    if low is None:
        low = LOW if is_scaled(count, dtype) else 1.0
    parts, rest = [tensor.to(dtype)], tensor
    for _ in range(count - 1):
        rest = (rest - parts[-1].to(rest.dtype)) * low
        parts.append(rest.to(dtype))
    return without_autocast(tensor.device.type, torch.stack, parts)


def _fake(
    flat: Tensor, rows: list[int], shift: float, precision: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    n_values = n_operands = n_map_operands = 0
    for layout, count, _ in layouts_of(rows):
        n_values += count * layout.row_size
        n_operands += count * layout.matrix_size
        n_map_operands += count * layout.map_size if layout.maps == DENSE else 0
    shape = (MAP_PARTS, n_map_operands) if n_map_operands else (0,)
    of_matrices, of_maps = operand_dtypes(precision, dtype)
    return (
        flat.new_empty(n_values, dtype=_wide(flat)),
        flat.new_empty(STACK_PARTS[precision], n_operands, dtype=of_matrices),
        flat.new_empty(shape, dtype=of_maps),
    )


_stack_pack = define_op(
    "stack_pack(Tensor flat, int[] rows, float shift, str precision, ScalarType dtype) "
    "-> (Tensor values, Tensor operands, Tensor map_operands)",
    _fake,
    _reference,
    saves="flat",
    backward=packing_gradient,
    backward_launch="pack_table:packing_gradient",
    has_needs=False,
)
