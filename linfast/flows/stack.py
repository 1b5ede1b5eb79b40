"""Coupling stacks: affine couplings with MLP conditioners and channel-linear layers between them.

    row_0, (coupling, row)_1, ..., (coupling, row)_L        each row channel-linear layers, or none

on vectors x [B, D], where the halves move in turn, the couplings share scale map and order, and their MLPs share
activation and depth. Only the classes' own code may be replaced: no hook, no parametrization, no subclass, no
sharded weight. A constant time is folded into the first biases: W [k | e(t)] + b = W_k k + b'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.stack_layout import DENSE, DIAGONAL, NO_MAPS
from ..nets import MLP
from ..ops.affine_coupling import HALVES
from ..ops.linearizer_stack import CouplingStack
from ..ops.stack_weights import AffineMap, CouplingLayer
from .actnorm import ActNorm
from .couplings import AffineCoupling
from .mix import Householder, Mix, Permute
from .segments import fold

__all__ = ["PRODUCTS", "WHOLE_WEIGHTS", "FlowStack", "are_plain", "is_linear", "is_plain", "leading", "stack_of"]

PRODUCTS = (Mix, Householder)
WHOLE_WEIGHTS = (torch.Tensor, nn.Parameter)
_LINEAR = (*PRODUCTS, Permute, ActNorm)
_MOST_LINEAR = 4  # layers of a conditioner that the kernel knows


def is_plain(layer: Any, kinds: tuple[type, ...]) -> bool:
    """Whether nothing but the class's own code would run; parametrizations make a class of their own."""
    return are_plain((layer,), kinds)


def are_plain(layers: Iterable[Any], kinds: tuple[type, ...]) -> bool:
    """``is_plain`` of each of these layers."""
    for layer in layers:
        if (
            type(layer) not in kinds
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in vars(layer)
        ):
            return False
    return True


def is_linear(layer: Any) -> bool:
    return is_plain(layer, _LINEAR) and not (isinstance(layer, ActNorm) and layer.waits_for_data())


def leading(layers: list[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """The channel-linear layers in front, and the rest."""
    count = next((i for i, layer in enumerate(layers) if not is_linear(layer)), len(layers))
    return tuple(layers[:count]), layers[count:]


@dataclass(frozen=True)
class FlowStack:
    """A flow's layers as a coupling stack has them; their weights are read when they are asked for.

    Args:
        owner: the module that holds the layers.
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
        """The densest kind of map between its layers (linfast.kernels.stack_layout)."""
        linear = [layer for row in (self.head, *self.rows) for layer in row]
        if not linear:
            return NO_MAPS
        return DIAGONAL if all(type(layer) is ActNorm for layer in linear) else DENSE

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


def stack_of(layers: nn.ModuleList, context: Mapping[str, Any]) -> FlowStack | str:
    """These layers as a stack, whatever will run it; or why they are none."""
    head, rest = leading(list(layers))
    couplings: list[Any] = []
    rows: list[tuple[Any, ...]] = []
    while rest:
        reason = _why_not(rest[0], context)
        if reason is not None:
            return f"layer {list(layers).index(rest[0])}: {reason}"
        couplings.append(rest[0])
        row, rest = leading(rest[1:])
        rows.append(row)
    if not couplings:
        return "no couplings"
    stack = FlowStack(layers, head, tuple(couplings), tuple(rows), context)
    return stack if _is_uniform(stack) else "its couplings differ in more than the half that moves, in turn"


def _why_not(coupling: Any, context: Mapping[str, Any]) -> str | None:
    """Why this is no affine coupling whose MLP has, in this context, no input but the kept half."""
    kind = type(coupling).__name__
    if not is_plain(coupling, (AffineCoupling,)):
        what = {AffineCoupling: "has hooks", ActNorm: "is not initialised or has hooks"}
        return f"{kind} {what.get(type(coupling), 'is not an AffineCoupling')}"
    mlp, t = coupling.conditioner, context.get("t")
    if not is_plain(mlp, (MLP,)) or not are_plain(mlp.layers, (nn.Linear,)):
        return f"its conditioner, {type(mlp).__name__}, is not a plain MLP"
    if not all(type(layer.weight) in WHOLE_WEIGHTS for layer in mlp.layers):
        return f"its conditioner's weights are {type(mlp.layers[0].weight).__name__}"
    if len(mlp.layers) > _MOST_LINEAR:
        return f"its conditioner has {len(mlp.layers)} linear layers; at most {_MOST_LINEAR} run in one launch"
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
