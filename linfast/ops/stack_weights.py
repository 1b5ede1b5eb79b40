"""Packing a coupling stack's weights for its kernel, in two launches: one torch.cat, and one gather that splits.

All weights, biases and maps of a stack, or of a Linearizer's two stacks and its A, are flattened one after another
and gathered into rows (linfast.kernels.stack_spec). Beside these fp32 weights, to which the gradients belong, go
the operands of the products: copies rounded to parts or to tf32 (linfast.kernels.mlp), which have no gradient.
Packing happens at every call, in the graph, so that gradients reach the layers' own tensors; ``pack_stacks`` is
separate so that frozen weights are packed once.

A map between layers moves the state itself, and W and W^-1 rounded separately are no longer inverses: its operands
have two parts at least, whatever the mode (three in "exact"). Maps whose inverse is wanted are inverted beforehand
by torch's own launches: a reciprocal per diagonal, a matrix inverse per dense map that comes without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import inverse_or_nan, without_autocast
from ..kernels.pack_table import ONE, SHIFT, SHIFTED, layouts_of, pack_table, packing_gradient
from ..kernels.stack_spec import DENSE, DIAGONAL, N_PARTS, NO_MAPS, StackLayout, map_parts, padded_hidden
from ..scale_maps import ScaleMap
from .register import define_op


class AffineMap(NamedTuple):
    """x -> W x + c on all features.

    Args:
        weight: W [D, D], or its diagonal [D].
        bias: c [D], or None for 0.
        inverse: W^-1 [D, D] where the caller has it; by default computed where it is needed.
        log_det: log|det W|, 0-d, likewise.
        inverse_bias: d [D] with x = W^-1 y + d, beside ``inverse``, likewise.
    """

    weight: Tensor
    bias: Tensor | None = None
    inverse: Tensor | None = None
    log_det: Tensor | None = None
    inverse_bias: Tensor | None = None

    def inverted(self) -> tuple[Tensor, Tensor | None]:
        """(V, d) with V y + d = W^-1 (y - c), outside autocast; NaN where W is singular."""
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
    """One affine coupling with an MLP conditioner, and what follows it.

    Args:
        weights: of 1 to 4 linear layers, [out, in]: the kept half's width in, twice the moved half's out.
        biases: [out] or None, one per linear layer.
        layout: of the output: "halves" [shift | raw] or "interleaved".
        map: an affine map over all features after the coupling, or None.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    layout: str = "halves"
    map: AffineMap | None = None


@dataclass(frozen=True)
class CouplingStack:
    """``coupling_stack``'s arguments for one network g."""

    layers: Sequence[CouplingLayer]
    activation: str
    scale_map: ScaleMap
    order: str = "shift_first"
    moves: str = "first"
    head: AffineMap | None = None

    def with_maps(self, log_det: Tensor, inverse: bool) -> Tensor:
        """log|det| of the couplings [B], and of the maps between them."""
        maps = [entry for entry in (self.head, *[layer.map for layer in self.layers]) if entry is not None]
        if not maps:
            return log_det
        of_maps = torch.stack([entry.log_abs_det() for entry in maps]).sum()
        return log_det - of_maps if inverse else log_det + of_maps


@dataclass(frozen=True)
class PackedStack:
    """A stack's weights as the kernel reads them.

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

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The raw op's arguments after x."""
        return self.weights, self.operands, self.map_operands


class StackWeights:
    """Weights that are packed as one stack, and their common layout.

    Args:
        layers: of couplings; none for a map alone, which is the head.
        features: D.
        head: a map before the first layer.
        inverse: pack the maps' inverses.
        shift: a number that is added to the diagonal of the head's matrix [D, D]; for a map alone.
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
        """Append the tensors as they are flattened, and their shapes as linfast.kernels.pack_table reads them."""
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
    """The layers' weights as one launch reads them; the maps' inverses where ``inverse``.

    ``precision`` is one of linfast.precision.PRECISIONS, ``dtype`` what parts are rounded to (``half_dtype``).
    """
    return pack_stacks([StackWeights(layers, features, head, inverse)], precision, dtype)[0]


def pack_stacks(stacks: Sequence[StackWeights], precision: str, dtype: torch.dtype) -> list[PackedStack]:
    """Several stacks in the same two launches; ``precision`` and ``dtype`` as ``pack_stack`` has them.

    At most one of them has a shift.
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
    matrices = _placed(values, table.target, table.n_operands)
    maps = _placed(values, -2 - table.target, table.n_map_operands)
    operands = _tf32(matrices)[None] if precision == "tf32" else _parts(matrices, N_PARTS[precision], dtype)
    return values, operands, _parts(maps, map_parts(precision), dtype) if len(maps) else maps.to(dtype)


def _placed(values: Tensor, target: Tensor, count: int) -> Tensor:
    """[count]: the values at their targets; those without one share a last place, which is cut off."""
    at = torch.where(target >= 0, target, count).long()
    return values.detach().new_zeros(count + 1).index_copy(0, at, values.detach())[:count]


def _tf32(tensor: Tensor) -> Tensor:
    """To the nearest tf32, ties away from zero, in fp32; NaN and float64 as they are."""
    if tensor.dtype != torch.float32:
        return tensor
    nearest = (tensor.view(torch.int32) + 0x1000) & -0x2000
    return torch.where(tensor.isnan(), tensor, nearest.view(torch.float32))


def _parts(tensor: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[count, *shape]: the rounding of the tensor, then of what is left over."""
    parts, rest = [tensor.to(dtype)], tensor
    for _ in range(count - 1):
        rest = rest - parts[-1].to(rest.dtype)
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
    shape = (map_parts(precision), n_map_operands) if n_map_operands else (0,)
    return (
        flat.new_empty(n_values, dtype=_wide(flat)),
        flat.new_empty(N_PARTS[precision], n_operands, dtype=torch.float32 if precision == "tf32" else dtype),
        flat.new_empty(shape, dtype=dtype),
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
