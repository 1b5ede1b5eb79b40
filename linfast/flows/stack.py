"""Which flows run as one coupling stack: affine couplings with MLP conditioners, and linear layers between them.

    row_0, (coupling, row)_1, ..., (coupling, row)_L        each row channel-linear layers, or none

on vectors x [B, D], where the halves move in turn, the couplings share scale map and order, the MLPs
activation and depth, and nothing but the classes' own code would run: no hook, no parametrization, no
subclass, no sharded weight. A constant time is folded into the first biases: W [k | e(t)] + b = W_k k + b'.
Weights are packed in the graph at every call, or once inside ``linfast.freeze``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import chosen_backend, uses_triton, why_reference
from ..freeze import derived, is_kept
from ..kernels.stack_configs import StackConfig, config_for, mode_on, target_of
from ..kernels.stack_spec import DENSE, DIAGONAL, NO_MAPS
from ..ops.affine_coupling import HALVES
from ..ops.coupling_stack import coupling_stack
from ..ops.linearizer_stack import CouplingStack
from ..ops.stack_weights import AffineMap, CouplingLayer, PackedStack, pack_stack
from ..precision import half_dtype, resolve_precision
from .actnorm import ActNorm
from .conditioners import MLP
from .couplings import AffineCoupling
from .fusion import fold, is_linear, is_plain

__all__ = [
    *("FlowStack", "find_stack", "kind_of", "mode_for", "planned_stack", "run_stack", "stack_of", "widths"),
]

_MAX_LINEAR = 4  # layers of a conditioner that the kernel knows
_WHOLE_WEIGHTS = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class FlowStack:
    """A flow's layers as a coupling stack has them; their weights are read when they are asked for.

    Args:
        owner: the module that holds the layers; what is derived is kept under its name.
        head: the row before the first coupling.
        couplings: L of them, with MLPs.
        rows: the row after each.
        context: what the conditioners are given.
    """

    owner: nn.Module
    head: tuple[Any, ...]
    couplings: tuple[Any, ...]
    rows: tuple[tuple[Any, ...], ...]
    context: Mapping[str, Any]

    @property
    def features(self) -> int:
        return self.couplings[0].features

    @property
    def hidden(self) -> int:
        """The widest hidden layer; 1 where there is none."""
        return max([1, *[width for coupling in self.couplings for width in coupling.conditioner.hidden]])

    @property
    def n_linear(self) -> int:
        """Linear layers of a conditioner."""
        return len(self.couplings[0].conditioner.layers)

    @property
    def maps(self) -> int:
        """The densest kind of map between its layers (linfast.kernels.stack_spec)."""
        linear = [layer for row in (self.head, *self.rows) for layer in row]
        if not linear:
            return NO_MAPS
        return DIAGONAL if all(type(layer) is ActNorm for layer in linear) else DENSE

    def config(self, x: Tensor, linearizer: bool = False) -> StackConfig | None:
        """The tile of its launch, or of a Linearizer's, for x's device and mode; None where there is none."""
        sizes = self.features, self.hidden, self.n_linear
        return config_for(*sizes, mode_for(x), target_of(x), self.maps, linearizer)

    def weights(self, inverse: bool, log_det: bool = False) -> CouplingStack:
        """The layers' weights as ``coupling_stack`` takes them; maps' inverses and log-dets where asked for."""
        first = self.couplings[0]
        layers = [
            CouplingLayer(weights, biases, coupling.layout, self._map(row, inverse, log_det))
            for coupling, row in zip(self.couplings, self.rows, strict=True)
            for weights, biases in [coupling.conditioner.folded(self.context.get("t"))]
        ]
        head = self._map(self.head, inverse, log_det)
        return CouplingStack(layers, first.conditioner.activation, first.scale_map, first.order, first.moves, head)

    def _map(self, row: tuple[Any, ...], inverse: bool, log_det: bool) -> AffineMap | None:
        if not row:
            return None
        weight, bias = fold(self.owner, row, False)
        undo = fold(self.owner, row[::-1], True)[0] if inverse else None
        if all(type(layer) is ActNorm for layer in row):
            weight, undo = weight.diagonal(), None if undo is None else undo.diagonal()
        return AffineMap(weight, bias, undo, sum(layer.log_abs_det() for layer in row) if log_det else None)

    def key(self, x: Tensor, *what: Hashable) -> Hashable | None:
        """What derived weights are kept under; None where the context is no constant."""
        if any(isinstance(value, Tensor) for value in self.context.values()):
            return None
        return (*what, *sorted(self.context.items()), mode_for(x), half_dtype(x))


def find_stack(bijections: nn.ModuleList, x: Tensor, context: Mapping[str, Any]) -> FlowStack | str:
    """These layers as one launch for x, or why not: they are no stack, or x's size or device has no launch."""
    if x.ndim != 2 or not uses_triton(x):
        # No shape in the reason: Dynamo of torch 2.11 cannot follow a tuple that was formatted.
        return why_reference(x) or f"x has {x.ndim} dimensions: no vectors"
    stack = stack_of(bijections, context)
    if not isinstance(stack, FlowStack) or stack.config(x) is not None:
        return stack
    return f"D = {stack.features}, H = {stack.hidden} in {mode_for(x)!r} fit no tile on {target_of(x)}"


def planned_stack(bijections: nn.ModuleList, x: Tensor, context: Mapping[str, Any]) -> FlowStack | str:
    """``find_stack``; while the layers are frozen, asked once for inputs of one kind."""
    key = kind_of(x, context, "which path") if is_kept(bijections) else None

    def find() -> FlowStack | None:
        found = find_stack(bijections, x, context)
        return found if isinstance(found, FlowStack) else None

    kept = None if key is None else derived(bijections, key, find)
    return find_stack(bijections, x, context) if kept is None else kept


def kind_of(x: Tensor, context: Mapping[str, Any], *what: Hashable) -> Hashable | None:
    """What the path of inputs such as x is kept under: all that it depends on beside the layers; None: not kept."""
    if nn.modules.module._has_any_global_hook() or any(isinstance(value, Tensor) for value in context.values()):
        return None
    settings = (mode_for(x), half_dtype(x), chosen_backend())
    return (*what, *sorted(context.items()), x.shape[1:], x.dtype, x.device, *settings)


def mode_for(x: Tensor) -> str:
    """The precision that products on x run in, as torch's settings and x's device have it."""
    return mode_on(target_of(x), resolve_precision(x))


def stack_of(bijections: nn.ModuleList, context: Mapping[str, Any]) -> FlowStack | str:
    """These layers as a stack, whatever will run it; or why they are none."""
    if nn.modules.module._has_any_global_hook():
        return "a global module hook is set"
    head, layers = _leading(list(bijections))
    couplings: list[Any] = []
    rows: list[tuple[Any, ...]] = []
    while layers:
        reason = _why_not(layers[0], context)
        if reason is not None:
            return f"layer {list(bijections).index(layers[0])}: {reason}"
        couplings.append(layers[0])
        row, layers = _leading(layers[1:])
        rows.append(row)
    if not couplings:
        return "no couplings"
    stack = FlowStack(bijections, head, tuple(couplings), tuple(rows), context)
    return stack if _is_uniform(stack) else "its couplings differ in more than the half that moves, in turn"


def widths(bijections: nn.ModuleList, context: Mapping[str, Any]) -> list[int | None]:
    """How wide each layer is of a chain that takes rows one by one; [None] where that is not known."""
    stack = stack_of(bijections, context)
    return [stack.features, stack.hidden] if isinstance(stack, FlowStack) else [None]


def run_stack(stack: FlowStack, x: Tensor, inverse: bool, log_det: bool) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| [B] or None) of the stack, or of its inverse, in one launch."""
    precision, key = mode_for(x), stack.key(x, "stack", inverse)

    def weights() -> CouplingStack:
        return stack.weights(inverse, log_det)

    g = weights() if key is None else derived(stack.owner, ("weights", log_det, key), weights)

    def pack() -> PackedStack:
        return pack_stack(
            g.layers, x.shape[1], inverse=inverse, precision=precision, dtype=half_dtype(x), head=g.head
        )

    return coupling_stack(
        x, g.layers, activation=g.activation, scale_map=g.scale_map, order=g.order, moves=g.moves, head=g.head,
        inverse=inverse, log_det=log_det, precision=precision,
        packed=pack() if key is None else derived(stack.owner, key, pack),
    )  # fmt: skip


def _leading(layers: list[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """The channel-linear layers in front, and the rest."""
    count = next((i for i, layer in enumerate(layers) if not is_linear(layer)), len(layers))
    return tuple(layers[:count]), layers[count:]


def _why_not(coupling: Any, context: Mapping[str, Any]) -> str | None:
    """Why this is no affine coupling whose MLP has, in this context, no input but the kept half."""
    kind = type(coupling).__name__
    if not is_plain(coupling, (AffineCoupling,)):
        what = {AffineCoupling: "has hooks", ActNorm: "is not initialised or has hooks"}
        return f"{kind} {what.get(type(coupling), 'is not an AffineCoupling')}"
    mlp, t = coupling.conditioner, context.get("t")
    if not is_plain(mlp, (MLP,)) or not all(is_plain(layer, (nn.Linear,)) for layer in mlp.layers):
        return f"its conditioner, {type(mlp).__name__}, is not a plain MLP"
    if not all(type(layer.weight) in _WHOLE_WEIGHTS for layer in mlp.layers):
        return f"its conditioner's weights are {type(mlp.layers[0].weight).__name__}"
    if len(mlp.layers) > _MAX_LINEAR:
        return f"its conditioner has {len(mlp.layers)} linear layers; at most {_MAX_LINEAR} run in one launch"
    constant = isinstance(t, (int, float)) or (isinstance(t, Tensor) and t.ndim == 0)
    if (
        mlp.context_features
        or context.get("context") is not None
        or not (constant if mlp.time_features else t is None)
    ):
        return "its conditioner has an input of its own for each sample"
    return None


def _is_uniform(stack: FlowStack) -> bool:
    """Whether one launch runs all couplings: the halves move in turn, all else is the same."""
    kinds = {
        (c.features, c.scale_map, c.order, c.conditioner.activation, len(c.conditioner.layers))
        for c in stack.couplings
    }
    first = HALVES.index(stack.couplings[0].moves)
    in_turn = all(c.moves == HALVES[(first + i) % 2] for i, c in enumerate(stack.couplings))
    return len(kinds) == 1 and in_turn
