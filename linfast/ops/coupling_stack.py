"""A stack of affine couplings with MLP conditioners, and affine maps between them, as one op.

x = [first | second]. A layer l moves one half, m, and keeps the other, k; m alternates from layer to layer:

    (t, r) = MLP_l(k)    m <- (m + t) exp(log_s(r))  or  m exp(log_s(r)) + t    x <- W_l x + c_l
    log|det| = sum over layers of sum(log_s) + log|det W_l|

| runs      | where                                                                                 |
|-----------|---------------------------------------------------------------------------------------|
| reference | a CPU, float64: plain torch, layer by layer                                           |
| stack     | a GPU, sizes that fit on chip: one launch, linfast.kernels.coupling_stack             |
| layers    | a GPU, larger sizes without maps: one launch for each linear layer, with its          |
|           | activation or the coupling, linfast.kernels.coupling_layers                           |
| library   | a GPU, otherwise: torch's products (in torch's precision; for "fast" in half          |
|           | precision), and one kernel per layer for its coupling                                 |

The backward of "stack" and "layers" saves x and the weights, and recomputes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_factor, check_flag, check_kind, check_tensor
from ..dispatch import autocast_dtype, records_gradients, uses_triton, without_autocast
from ..kernels.stack_configs import mode_on, target_of, tiles_for
from ..kernels.stack_spec import DENSE, StackLayout, StackSpec, schema_of
from ..precision import half_dtype, resolve_precision
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap
from .activations import ACTIVATION_NAMES, ACTIVATIONS
from .affine_coupling import HALVES, LAYOUTS, ORDERS, affine_coupling, couple, split_sizes
from .register import define_op
from .stack_weights import AffineMap, CouplingLayer, CouplingStack, PackedStack, StackWeights, pack_stacks

_SEQUENCES = (list, tuple, Sequence, nn.ParameterList)


def coupling_stack(
    x: Tensor,
    layers: Sequence[CouplingLayer],
    *,
    activation: str,
    scale_map: ScaleMap,
    order: str = "shift_first",
    moves: str = "first",
    inverse: bool = False,
    log_det: bool = False,
    precision: str | None = None,
    head: AffineMap | None = None,
    packed: PackedStack | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| or None): the layers applied to x, first to last, or their inverses, last to first.

    Args:
        x: [B, D], D >= 2, any strides.
        layers: at least one; all conditioners have the same number of linear layers.
        activation: "relu", "silu", "tanh" or "gelu"; kernels err by less than tf32 in "tf32" and "fast".
        scale_map: maps the conditioners' raw outputs to log-scales s.
        order: "shift_first" (m + t) e^s or "scale_first" m e^s + t.
        moves: the half that layer 0 moves; layer 1 moves the other, and so on.
        inverse: apply the inverse of the stack.
        log_det: also return log|det| of the map that is applied, [B], in fp32 or wider.
        precision: "exact", "high", "tf32" or "fast"; None: as torch is set (``resolve_precision``).
        head: an affine map before the first layer.
        packed: the result of ``pack_stack`` for these layers, to which no gradient then flows.

    The state between layers, shift, scale and sums are fp32 or wider; y has x's dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown, or a shape does not fit.
    """
    g = CouplingStack(layers, activation, scale_map, order, moves, head)
    check(x, g, packed)
    check_flag("inverse", inverse)
    check_flag("log_det", log_det)
    target = target_of(x)
    precision = mode_on(target, resolve_precision(x, precision))
    if uses_triton(x, *layers[0].weights):
        weights = StackWeights(layers, x.shape[1], head, inverse)
        tensors = [t for layer in layers for t in (*layer.weights, *layer.biases)]
        layout, gradients = weights.layout, records_gradients(x, *tensors)
        if tiles_for(x.shape[1], layout.hidden, layout.n_linear, precision, target, layout.maps, gradients) is None:
            packed = None
        elif packed is None:
            (packed,) = pack_stacks([weights], precision, half_dtype(x))
    else:
        packed = None
    if packed is None:
        y, total = _by_layers(x, g, inverse, log_det, precision)
    else:
        y, total = run_packed(x, packed, stack_spec(g, packed.layout, inverse, log_det, precision))
    return y, None if total is None else g.with_maps(total, inverse)


def mlp_coupling(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    activation: str,
    scale_map: ScaleMap,
    order: str = "shift_first",
    layout: str = "halves",
    moves: str = "first",
    inverse: bool = False,
    log_det: bool = False,
    precision: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``coupling_stack`` of one layer, ``CouplingLayer(weights, biases, layout)``; other options are the same."""
    check_kind("weights", weights, _SEQUENCES, "a sequence of tensors")
    check_kind("biases", biases, _SEQUENCES, "a sequence of tensors or None")
    check_choice("layout", layout, LAYOUTS)
    return coupling_stack(
        x, [CouplingLayer(weights, biases, layout)], activation=activation, scale_map=scale_map, order=order,
        moves=moves, inverse=inverse, log_det=log_det, precision=precision,
    )  # fmt: skip


def stack_spec(g: CouplingStack, layout: StackLayout, inverse: bool, log_det: bool, precision: str) -> StackSpec:
    """The raw op's constants for g, whose weights were packed in this layout."""
    bound, floor = g.scale_map.constants
    return StackSpec(
        layout.features, layout.n_linear, layout.hidden, layout.maps, layout.head,
        ACTIVATION_NAMES.index(g.activation), g.scale_map.constexpr_id, bound, floor,
        g.order == "scale_first", g.moves == "second", inverse, log_det, precision,
    )  # fmt: skip


def run_packed(x: Tensor, packed: PackedStack, spec: StackSpec) -> tuple[Tensor, Tensor | None]:
    """Run the fused kernels: (y, log|det| of the couplings without the maps, or None)."""
    y, total = _coupling_stack(x, *packed.tensors, *spec.constants)
    return y, total if spec.log_det else None


def _by_layers(
    x: Tensor, g: CouplingStack, inverse: bool, log_det: bool, precision: str
) -> tuple[Tensor, Tensor | None]:
    """Layer by layer in plain torch, in the wider of x's dtype and the weights'; couplings run affine_coupling."""
    total: Tensor | None = None
    dtype, half = x.dtype, half_dtype(x) if precision == "fast" else None
    x = x.to(torch.promote_types(dtype, g.layers[0].weights[0].dtype))
    steps: list[tuple[int | None, AffineMap | None]] = [(None, g.head)]
    for i, layer in enumerate(g.layers):
        steps += [(i, None), (None, layer.map)]
    for index, entry in steps[::-1] if inverse else steps:
        if index is None:
            x = x if entry is None else _apply_map(x, entry, inverse)
            continue
        layer, moved = g.layers[index], (HALVES.index(g.moves) + index) % 2
        kept = x.split(split_sizes(x.shape[1]), dim=1)[1 - moved]
        params = _condition(kept, layer, ACTIVATIONS[g.activation], half)
        x, part = affine_coupling(
            x, params, g.scale_map, order=g.order, layout=layer.layout, moves=HALVES[moved], inverse=inverse,
            log_det=log_det,
        )  # fmt: skip
        if part is not None:
            total = part if total is None else total + part
    return x.to(dtype), total


def _condition(h: Tensor, layer: CouplingLayer, activate: Any, half: torch.dtype | None) -> Tensor:
    for i, (weight, bias) in enumerate(zip(layer.weights, layer.biases, strict=True)):
        h = _linear(activate(h) if i else h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype), half)
    return h


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, half: torch.dtype | None) -> Tensor:
    """x W^T + b; operands are rounded to ``half`` unless it is None, and on a GPU multiplied in that dtype."""
    if half is None or x.dtype == torch.float64 or autocast_dtype(x.device.type) is not None:
        return F.linear(x, weight, bias)
    if x.is_cuda:
        return F.linear(x.to(half), weight.to(half), None if bias is None else bias.to(half))
    return F.linear(x.to(half).to(x.dtype), weight.to(half).to(weight.dtype), bias)


def _apply_map(x: Tensor, entry: AffineMap, inverse: bool) -> Tensor:
    """The map or its inverse, outside autocast: W and W^-1 rounded separately are not inverses."""
    weight, bias = entry.inverted() if inverse else (entry.weight, entry.bias)
    if weight.ndim == 1:
        return (x * weight if bias is None else x * weight + bias).to(x.dtype)
    return without_autocast(x.device.type, F.linear, x.to(weight.dtype), weight, bias).to(x.dtype)


def raw_forward(
    x: Tensor, weights: Tensor, operands: Tensor, _map_operands: Tensor, *constants: Any
) -> tuple[Tensor, Tensor]:
    """The raw op in plain, differentiable torch: (y in x's dtype, log|det| of the couplings; [0] if not requested).

    x [B, D] is padded to z [B, 2 P], each half with zeros. In "fast" the operands of the conditioner's products are
    rounded as the kernel rounds them, and gradients pass through the rounding unchanged. The rounding of other
    modes is not reproduced; tests allow for it.
    """
    spec = StackSpec(*constants)
    z = spec.pad(x.to(weights.dtype))
    scale_map = ScaleMap(SCALE_MAP_KINDS[spec.kind], spec.bound, spec.floor)
    activation = ACTIVATIONS[ACTIVATION_NAMES[spec.activation]]
    total = z.new_zeros(z.shape[0] if spec.log_det else 0)
    for layer, row in spec.steps(weights):
        matrices, biases, matrix, bias = spec.unpack(weights[row])
        if layer is None:
            z = (z @ matrix.mT if spec.maps == DENSE else z * matrix) + bias
            continue
        kept, moved = spec.halves(z, layer)
        h = kept
        for i, (W, b) in enumerate(zip(matrices, biases, strict=True)):
            h = activation(h) if i else h
            h = F.linear(_rounded(h, operands.dtype, spec), _rounded(W, operands.dtype, spec), b)
        shift, raw = h.unflatten(1, (-1, 2)).unbind(2)
        log_s = scale_map.log_scale(raw)
        moved = couple(moved, shift, log_s, ORDERS[spec.scale_first], spec.inverse)
        z = torch.cat((moved, kept) if spec.moves_first(layer) else (kept, moved), dim=1)
        if spec.log_det:
            part = log_s[:, : spec.moved_size(layer)].sum(1)
            total = total - part if spec.inverse else total + part
    return spec.unpad(z).to(x.dtype), total


def _rounded(tensor: Tensor, half: torch.dtype, spec: StackSpec) -> Tensor:
    if spec.precision != "fast":
        return tensor
    return tensor + (tensor.to(half).to(tensor.dtype) - tensor).detach()


def _fake(x: Tensor, weights: Tensor, operands: Tensor, map_operands: Tensor, *constants: Any) -> Any:
    n = x.shape[0] if StackSpec(*constants).log_det else 0
    return x.new_empty(x.shape), x.new_empty(n, dtype=torch.float32)


_coupling_stack = define_op(
    f"coupling_stack(Tensor x, Tensor weights, Tensor operands, Tensor map_operands, {schema_of()}) "
    "-> (Tensor y, Tensor log_det)",
    _fake,
    raw_forward,
    saves="x weights operands map_operands",
    backward_launch="coupling_stack_backward:launch_coupling_stack_backward",
)


def check(x: Tensor, g: CouplingStack, packed: PackedStack | None = None) -> None:
    """Raise TypeError or ValueError unless types, options and shapes fit; of packed layers only the width."""
    check_tensor("x", x)
    check_kind("layers", g.layers, _SEQUENCES, "a sequence of CouplingLayers")
    for name, choices in (("activation", ACTIVATION_NAMES), ("order", ORDERS), ("moves", HALVES)):
        check_choice(name, getattr(g, name), choices)
    check_kind("scale_map", g.scale_map, ScaleMap)
    check_kind("head", g.head, (AffineMap, NoneType))
    check_kind("packed", packed, (PackedStack, NoneType))
    if x.ndim != 2 or x.shape[1] < 2:
        raise ValueError(f"x must be [B, D] with D >= 2; got {tuple(x.shape)}")
    if not g.layers:
        raise ValueError("layers must hold at least one CouplingLayer")
    if packed is not None:
        if packed.layout.features != x.shape[1]:
            raise ValueError(f"packed has {packed.layout.features} features and x is {tuple(x.shape)}")
        return
    sizes, first = split_sizes(x.shape[1]), HALVES.index(g.moves)
    if g.head is not None:
        _check_map("head", g.head, x)
    for i, layer in enumerate(g.layers):
        name, moved = f"layers[{i}]", (first + i) % 2
        check_kind(name, layer, CouplingLayer)
        for part in ("weights", "biases"):
            check_kind(f"{name}.{part}", getattr(layer, part), _SEQUENCES, "a sequence of tensors")
        _check_layer(name, layer, len(g.layers[0].weights), sizes[1 - moved], 2 * sizes[moved], x)
        if layer.map is not None:
            _check_map(f"{name}.map", layer.map, x)


def _check_map(name: str, entry: AffineMap, x: Tensor) -> None:
    check_kind(name, entry, AffineMap)
    D = x.shape[1]
    for field, tensor in entry._asdict().items():
        if field == "log_det" or (tensor is None and field != "weight"):
            continue
        check_tensor(f"{name}.{field}", tensor, x)
        shapes: list[tuple[int, ...]] = [(D,), (D, D)] if field == "weight" else [(D,)]
        if field == "inverse":
            shapes = [tuple(entry.weight.shape)]
        if tensor.shape not in shapes:
            raise ValueError(
                f"{name}.{field} must be {' or '.join(map(str, shapes))} for x {tuple(x.shape)}; "
                f"got {tuple(tensor.shape)}"
            )
    if entry.log_det is not None:
        check_factor(f"{name}.log_det", entry.log_det, x)


def _check_layer(name: str, layer: CouplingLayer, n_linear: int, n_in: int, n_out: int, x: Tensor) -> None:
    check_choice(f"{name}.layout", layer.layout, LAYOUTS)
    if not 1 <= len(layer.weights) <= 4 or len(layer.weights) != n_linear or len(layer.biases) != n_linear:
        raise ValueError(
            f"{name} must have as many weights and biases as layer 0 has weights, 1 to 4; "
            f"got {len(layer.weights)} and {len(layer.biases)} for {n_linear}"
        )
    width = n_in
    for weight, bias in zip(layer.weights, layer.biases, strict=True):
        check_tensor(f"{name}.weights", weight, x)
        if bias is not None:
            check_tensor(f"{name}.biases", bias, x)
        if weight.ndim != 2 or weight.shape[1] != width:
            raise ValueError(f"{name}.weights: each must be [out, {width}]; got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}.biases: each must be [{weight.shape[0]}]; got {tuple(bias.shape)}")
        width = weight.shape[0]
    if width != n_out:
        raise ValueError(f"{name}.weights: the last must have {n_out} rows for x {tuple(x.shape)}; got {width}")
