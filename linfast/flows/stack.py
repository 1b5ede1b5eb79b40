"""Coupling stacks: affine couplings with MLP conditioners and channel-linear layers between them.

    row_0, (coupling, row)_1, ..., (coupling, row)_L        a row is zero or more channel-linear layers

on vectors x [B, D], where the halves move in turn, the couplings share scale map and order, and their MLPs share
activation and depth. Only unmodified layers may be replaced: no hook, no parametrization, no subclass, no sharded
weight. A constant time, and a context of one row, are folded into the first biases: W [k | e(t)] + b = W_k k + b'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import are_plain, is_plain
from ..kernels.stack_spec import DENSE, DIAGONAL, NO_MAPS
from ..nets import MLP
from ..ops.affine_coupling import HALVES
from ..ops.stack_weights import AffineMap, CouplingLayer, CouplingStack
from ..rows import one_row
from .actnorm import ActNorm
from .couplings import AffineCoupling
from .mix import Householder, Mix, Permute
from .segments import fold
from .undo import Context

PRODUCTS = (Mix, Householder)
_LINEAR = (*PRODUCTS, Permute, ActNorm)
_MOST_LINEAR = 4  # linear layers of a conditioner that the kernel supports
_WHOLE_WEIGHTS = (torch.Tensor, nn.Parameter)
_OWN_INPUT = "its conditioner has a separate input per sample"


def is_linear(layer: Any) -> bool:
    """Whether the layer is one affine map of the channels and nothing else."""
    return is_plain(layer, _LINEAR) and not (isinstance(layer, ActNorm) and layer.waits_for_data())


class Known(NamedTuple):
    """An affine coupling whose conditioner is an MLP with supported inputs.

    Args:
        layer: the coupling.
        activation: the MLP's activation.
        weights, biases: those of its linear layers, a constant time folded in.
        context: size of the context per sample that the MLP takes; 0 for none.
    """

    layer: Any
    activation: str
    weights: list[Tensor]
    biases: list[Tensor | None]
    context: int


def recognise(layer: Any, x: Tensor, context: Context, folds: bool = False) -> Known | str:
    """The coupling's current weights, for inputs such as x [B, D] in this context; or why it is not recognised.

    ``folds``: a context of one row is folded into the first bias, as a constant time always is.

    It runs at every call. Submodules and parameters are read from the modules' own dicts: ``nn.Module.__getattr__``
    takes a microsecond for each, which is a fifth of a coupling's time at batch 1.
    """
    if not are_plain((layer,), (AffineCoupling,)):
        what = {AffineCoupling: "has hooks", ActNorm: "is not initialised or has hooks"}
        return f"{type(layer).__name__} {what.get(type(layer), 'is not an AffineCoupling')}"
    mlp: Any = layer._modules["conditioner"]
    linears: list[Any] = list(mlp._modules["layers"]) if are_plain((mlp,), (MLP,)) else []
    if not linears or not are_plain(linears, (nn.Linear,)):
        return f"its conditioner, {type(mlp).__name__}, is not a plain MLP"
    given, t = context.get("context"), context.get("t")
    joined = 0 if given is None else given.shape[1]
    per_sample = isinstance(t, Tensor) and t.ndim > 0
    if mlp.context_features != joined or bool(mlp.time_features) != (t is not None) or per_sample:
        return _OWN_INPUT
    folds = folds and given is not None and given.dtype == x.dtype and one_row(given).shape[0] == 1
    if mlp.time_features and joined and not folds:  # W [k | e(t) | context]: the time is in the middle
        return _OWN_INPUT
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for linear in linears:
        own = linear._parameters
        if "weight" not in own or "bias" not in own or own["weight"] is None:
            # Plain attributes, as nn.DataParallel's replicas have.
            own = {"weight": linear.weight, "bias": linear.bias}
        weight = own["weight"]
        if type(weight) not in _WHOLE_WEIGHTS:
            return f"its conditioner's weights are {type(weight).__name__}"
        if weight.device != x.device or (weights and weight.dtype != weights[0].dtype):
            return "its conditioner's weights are of several dtypes or on another device than x"
        weights.append(weight)
        biases.append(own["bias"])
    moved = (layer.features + 1 - HALVES.index(layer.moves)) // 2
    n_in = layer.features - moved + mlp.time_features + joined
    if weights[0].shape[1] != n_in or weights[-1].shape[0] != 2 * moved:
        return "its conditioner does not fit the halves"
    if t is not None or folds:
        weights, biases = mlp.folded(t, one_row(given) if folds and given is not None else None)
    return Known(layer, mlp.activation, weights, biases, 0 if folds else joined)


@dataclass(frozen=True)
class FlowStack:
    """A flow's layers as a coupling stack.

    Args:
        owner: the module that holds the layers.
        couplings: the L couplings.
        rows: the L + 1 rows of channel-linear layers, row_0 to row_L.
    """

    owner: nn.Module
    couplings: Sequence[Known]
    rows: Sequence[Sequence[Any]]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """D, the widest hidden layer (1 where there is none) and the number of linear layers of a conditioner."""
        hidden = [weight.shape[0] for known in self.couplings for weight in known.weights[:-1]]
        first = self.couplings[0]
        return first.layer.features, max([1, *hidden]), len(first.weights)

    @property
    def maps(self) -> int:
        """The densest kind of map between its layers (linfast.kernels.stack_spec)."""
        kinds = [DIAGONAL if type(layer) is ActNorm else DENSE for row in self.rows for layer in row]
        return max([NO_MAPS, *kinds])

    def weights(self, inverse: bool, log_det: bool = False) -> CouplingStack:
        """The weights for ``coupling_stack``, with the maps' inverses and log-determinants where asked for."""
        first, activation, *_ = self.couplings[0]
        head, *maps = self._maps(inverse, log_det)
        layers = [
            CouplingLayer(known.weights, known.biases, known.layer.layout, entry)
            for known, entry in zip(self.couplings, maps, strict=True)
        ]
        return CouplingStack(layers, activation, first.scale_map, first.order, first.moves, head)

    def _maps(self, inverse: bool, log_det: bool) -> list[AffineMap | None]:
        """The maps of the rows. Rows with equal kinds of layers are folded at once: depth adds no launches."""
        alike: dict[Any, list[int]] = {}
        for i, row in enumerate(self.rows):
            kinds = tuple((type(layer), *(tuple(number.shape) for number in layer.numbers())) for layer in row)
            alike.setdefault(kinds, []).append(i)
        maps: list[AffineMap | None] = [None] * len(self.rows)
        for kinds, members in alike.items():
            made = self._maps_of([self.rows[i] for i in members], inverse, log_det) if kinds else []
            for i, entry in zip(members, made, strict=False):
                maps[i] = entry
        return maps

    def _maps_of(self, rows: Sequence[Sequence[Any]], inverse: bool, log_det: bool) -> list[AffineMap]:
        """The maps of rows that have the same classes of layers, with numbers of the same shapes."""
        row: list[tuple[Any, list[Tensor]]] = []
        for layers in zip(*rows, strict=True):
            numbers = zip(*(layer.numbers() for layer in layers), strict=True)
            row.append((layers[0], [torch.stack(of_all) for of_all in numbers]))
        weight, bias = fold(self.owner, row, False)
        undo, undo_bias = fold(self.owner, row[::-1], True) if inverse else (None, None)
        total = (
            sum((a.log_abs_det(of_a) for a, of_a in row), start=weight.new_zeros(len(rows))) if log_det else None
        )
        if all(type(layer) is ActNorm for layer, _ in row):
            weight, undo = weight.diagonal(dim1=1, dim2=2), None if undo is None else undo.diagonal(dim1=1, dim2=2)
        parts = [[None] * len(rows) if t is None else t.unbind() for t in (weight, bias, undo, total, undo_bias)]
        return [AffineMap(*part) for part in zip(*parts, strict=True)]


def stack_of(layers: nn.ModuleList, x: Tensor, context: Context) -> FlowStack | str:
    """These layers as a stack for inputs such as x [B, D], whatever will run it; or why they are not a stack."""
    couplings: list[Known] = []
    rows: list[list[Any]] = [[]]
    for i, layer in enumerate(layers):
        if type(layer) is not AffineCoupling and is_linear(layer):
            rows[-1].append(layer)
            continue
        known = recognise(layer, x, context, folds=True)
        if isinstance(known, str):
            return f"layer {i}: {known}"
        if known.context:
            return f"layer {i}: {_OWN_INPUT}"
        if len(known.weights) > _MOST_LINEAR:
            count = len(known.weights)
            return f"layer {i}: its conditioner has {count} linear layers; one launch runs up to {_MOST_LINEAR}"
        couplings.append(known)
        rows.append([])
    if not couplings:
        return "no couplings"
    if not _is_uniform(couplings):
        return "its couplings differ in more than which half moves, or the halves do not move in turn"
    return FlowStack(layers, couplings, rows)


def _is_uniform(couplings: list[Known]) -> bool:
    """Whether one launch runs all couplings: the halves move in turn, everything else is the same."""
    first, activation, weights, *_ = couplings[0]
    kind = first.features, first.scale_map, first.order, activation, len(weights)
    start = HALVES.index(first.moves)
    for i, (layer, activation, weights, *_) in enumerate(couplings):
        same = (layer.features, layer.scale_map, layer.order, activation, len(weights)) == kind
        if not same or layer.moves != HALVES[(start + i) % 2]:
            return False
    return True
