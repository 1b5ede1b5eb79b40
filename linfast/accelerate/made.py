"""Is a network a MADE of nflows, glasflow or normflows? All three derive from the code of one paper.

    hidden layer 1   value = W x + b + context term          nflows: the activation of a linear layer of the context
    a block          feedforward  value = W a(value) + b     a residual one adds two such layers to its input
    batch norm       feedforward  after the activation: it is multiplied into the next layer
                     residual     before it

With a context, a residual block of nflows adds a linear layer of it between its two layers; one of normflows
multiplies its second layer by a sigmoid of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flows.reversible import DROPOUTS
from ..ops.masked_autoregressive import Extras
from ..scale_maps import ScaleMap
from .adapter import Adapter, Unfit
from .identity import changed_method, defined_as, is_hooked, original_class
from .masked import (
    Affine,
    InvertFeatures,
    Layers,
    MaskedInverse,
    Norms,
    Short,
    Unchanged,
    Weights,
    find_masks,
    masked_adapter,
)
from .mlp import name_of_activation


@dataclass
class _Layers(Layers):
    """The layers of a MADE in order; the lists have one entry per hidden layer, ``linears`` also the last layer.

    Args:
        norms: the batch norm of each layer's value.
        folded: the batch norm that the next layer reads through.
        terms: (linear layer of the context, whether the activation follows) that is added.
        gates: the linear layer of the context whose sigmoid multiplies.
    """

    norms: list[nn.BatchNorm1d | None] = field(default_factory=list)
    folded: list[nn.BatchNorm1d | None] = field(default_factory=list)
    terms: list[tuple[nn.Linear, bool] | None] = field(default_factory=list)
    gates: list[nn.Linear | None] = field(default_factory=list)

    def add(self, linear: Any, activated: bool, adds: int = 0, term: Any = None, gate: Any = None) -> None:
        self.append(linear, activated, adds)
        self.terms.append(term)
        self.gates.append(gate)
        self.norms.append(None)
        self.folded.append(None)


Read = Callable[[Any], tuple[str, Affine | InvertFeatures, tuple[Any, ...]]]
"""instance -> its elementwise transform: its description, itself, and what of it is ``MaskedInverse.assumed``."""


def made_adapter(
    library: str, where: str, name: str, made: str, read: Read, methods: tuple[str, ...], **what: Any
) -> Adapter:
    """The adapter of a class whose ``autoregressive_net`` is the MADE that the module ``made`` defines.

    Args:
        read: finds its elementwise transform.
        methods: those of the class that this transform stands for.
    """
    return masked_adapter(
        library,
        where,
        name,
        find=lambda instance: _find(instance, made, read, methods),
        masks=lambda instance: _masks_of(instance.autoregressive_net),
        context=lambda instance: _context_of(instance.autoregressive_net),
        assumes=methods,
        **what,
    )


def affine_of(scale_map: ScaleMap) -> Affine:
    """The affine transform with this scale, whose logarithm is computed from the scale, as in these libraries."""
    scale = scale_map.scale_function
    return Affine(scale, lambda raw: scale(raw).log(), scale_map)


def spline_adapter(library: str, where: str, name: str, made: str, kind: str) -> Adapter:
    """The adapter of a class whose method ``_elementwise`` inverts a spline."""

    def read(instance: Any) -> tuple[str, InvertFeatures, tuple[Any, ...]]:
        bound = getattr(instance, "tail_bound", None)
        if isinstance(bound, Tensor) and bound.numel() > 1:
            raise Unfit("its features have several tail bounds")
        return f"{_WORDS[kind]} spline", _spline_of(instance), ()

    def domain(instance: Any, y: Tensor) -> Tensor:
        return y if getattr(instance, "tails", None) is not None else y.sigmoid()

    methods = ("_output_dim_multiplier", "_elementwise_inverse", "_elementwise")
    return made_adapter(library, where, name, made, read, methods, domain=domain)


_WORDS = {
    "Linear": "linear",
    "Quadratic": "quadratic",
    "Cubic": "cubic",
    "RationalQuadratic": "rational-quadratic",
}


def _spline_of(instance: Any) -> InvertFeatures:
    """The library's own formula on some features, by an instance that shares all else with this one."""
    kind, whole = original_class(instance), weakref.ref(instance)  # which holds this function

    def invert(y: Tensor, params: Tensor, features: list[int]) -> tuple[Tensor, Tensor]:
        of_features: Any = object.__new__(kind)
        vars(of_features).update(vars(whole()), features=len(features))
        x, log_det = of_features._elementwise_inverse(y, params.reshape(len(y), -1))
        return x, log_det.unsqueeze(1)

    return invert


def _masks_of(net: Any) -> list[Tensor]:
    """The masks of its layers, from the first to the last."""
    inside = [net.initial_layer]
    for block in net.blocks:
        inside += block.linear_layers if hasattr(block, "linear_layers") else [block.linear]
    return [linear.mask for linear in (*inside, net.final_layer)]


def _context_of(net: Any) -> int | None:
    """How many features its contexts have; None where it takes none."""
    return net.context_layer.in_features if hasattr(net, "context_layer") else None


def _find(instance: Any, where: str, read: Read, methods: Sequence[str]) -> MaskedInverse:
    """What the instance is; raises Unfit."""
    net, changed = instance.autoregressive_net, changed_method(instance, methods)
    if changed is not None:
        raise Unfit(f"its {changed} was replaced: not the library's own")
    _check_modules(net, where)
    layers, activation = _layers_of(net, where)
    text, transform, assumed = read(instance)
    per_feature = instance._output_dim_multiplier()
    batch_norms = [norm for norm in (*layers.norms, *layers.folded) if norm is not None]
    masks = find_masks(
        _masks_of(net),
        per_feature=per_feature,
        activated=layers.activated,
        adds=layers.adds,
        raw_first=isinstance(transform, Affine),
    )
    if masks.features == 1:
        raise Unfit("it has one feature: its own inverse is one evaluation of the network")
    functions = [(type(module), "forward") for module in net.modules()]
    functions += [(original_class(instance), name) for name in methods]
    known = name_of_activation(activation)
    sizes = "-".join(map(str, (masks.features, *(out for out, _ in masks.shapes))))
    return MaskedInverse(
        what=f"{text}; MADE {sizes} {known or getattr(activation, '__name__', type(activation).__name__)}"
        + (", residual" if any(layers.adds) else "")
        + (", batch norm" if batch_norms else ""),
        masks=masks,
        weights=_weights_of(layers),
        activation=activation,
        transform=transform,
        extras=_extras_of(layers, activation),
        evidence=Unchanged(instance, functions, _masks_of(net)),
        norms=_norms_of(layers),
        ready=not any(map(_is_random, net.modules())),
        assumed=(*assumed, *([] if known else [activation])),
        short=_SHORT,
    )


_SHORT: Short = {
    2: (256, 2048),
    3: (64, 1024),
    4: (0, 512),
    5: (0, 256),
    6: (0, 128),
    7: (0, 64),
    8: (0, 32),
}
"""Measured for nflows and normflows on an AMD EPYC, with one thread, 50 hidden units and 1 to 1500 rows."""


def _is_random(module: nn.Module) -> bool:
    """Whether each evaluation of the network gives other values, or changes the module."""
    random = isinstance(module, nn.BatchNorm1d) or (isinstance(module, nn.Dropout) and module.p > 0)
    return random and module.training


def _check_modules(net: nn.Module, where: str) -> None:
    """Raise Unfit where the network or a layer is of another class, or its call runs more than its forward."""
    if not defined_as(net, where, "MADE"):
        raise Unfit(f"its autoregressive_net is a {type(net).__name__}, no MADE")
    if not isinstance(getattr(net, "preprocessing", None), (nn.Identity, type(None))):
        raise Unfit(f"it preprocesses its inputs, by a {type(net.preprocessing).__name__}")
    activations = [each for name, each in net.named_modules() if name.rpartition(".")[2] == "activation"]
    for module in net.modules():
        kind, is_activation = type(module).__name__, module in activations
        known = type(module) in _PLAIN or any(defined_as(module, where, name) for name in _OWN)
        if not (known or is_activation):
            raise Unfit(f"its MADE has a {kind}")
        if is_hooked(module):
            raise Unfit(f"a {kind} of its MADE has a hook or a parametrization, which would be bypassed")
        if type(module) is not nn.ModuleList and changed_method(module, ("forward",)) is not None:
            raise Unfit(f"the forward of a {kind} of its MADE was replaced: not the library's own")
        if is_activation and (isinstance(module, _RANDOM) or [*module.parameters(), *module.buffers()]):
            raise Unfit(f"its activation {kind} is random or has tensors")


_OWN = ("MADE", "MaskedLinear", "MaskedFeedforwardBlock", "MaskedResidualBlock")
_RANDOM = (nn.RReLU, *DROPOUTS)
_PLAIN = (nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.ModuleList, nn.Identity)


def _layers_of(net: Any, where: str) -> tuple[_Layers, Callable[[Tensor], Tensor]]:
    """The layers, and the activation between them."""
    found, gated = _Layers(), where in _GATED
    blocks = [*net.blocks]
    residual = all(defined_as(block, where, "MaskedResidualBlock") for block in blocks)
    if not residual and not all(defined_as(block, where, "MaskedFeedforwardBlock") for block in blocks):
        raise Unfit("some of its blocks are residual, some feedforward")
    if not gated:
        residual = net.use_residual_blocks
    owners = [each for each in (net, *blocks) if hasattr(each, "activation")]
    activation = owners[0].activation if owners else torch.relu
    if any(each.activation is not activation for each in owners):
        raise Unfit("its blocks have several activations")
    if residual and getattr(activation, "inplace", False):
        raise Unfit("its activation writes to the input of its residual blocks")
    context = _context_layer(net)
    term = None if context is None else (context, not gated)
    found.add(net.initial_layer, bool(residual and blocks) or not (residual or gated), term=term)
    for i, block in enumerate(blocks):
        if residual:
            _add_residual(found, block, gated, i == len(blocks) - 1)
            continue
        found.folded[-1] = _checked(block.batch_norm)
        found.add(block.linear, True)
    found.linears.append(net.final_layer)
    if not all(defined_as(linear, where, "MaskedLinear") for linear in found.linears):
        raise Unfit("one of its layers is no MaskedLinear")
    return found, activation


_GATED = ("normflows.nets.made",)
"""The MADEs whose residual blocks multiply by a gate of the context, and that have no activation after layer 1."""


def _add_residual(found: _Layers, block: Any, gated: bool, last: bool) -> None:
    first, second = block.linear_layers
    context = _context_layer(block)
    norms = block.batch_norm_layers if block.use_batch_norm else (None, None)
    found.norms[-1] = _checked(norms[0])
    at = len(found.activated)
    found.add(first, True, term=None if gated or context is None else (context, False))
    found.norms[-1] = _checked(norms[1])
    found.add(second, not last, adds=at, gate=context if gated else None)


def _context_layer(owner: Any) -> nn.Linear | None:
    """The layer of the context that a MADE or a block has."""
    layer: nn.Linear | None = getattr(owner, "context_layer", None)
    if layer is not None and type(layer) is not nn.Linear:
        raise Unfit(f"its context_layer is a {type(layer).__name__}, no Linear")
    return layer


def _checked(norm: nn.BatchNorm1d | None) -> nn.BatchNorm1d | None:
    if norm is not None and (type(norm) is not nn.BatchNorm1d or not norm.track_running_stats):
        raise Unfit("its batch norm is of another kind or has no running statistics")
    return norm


def _scale_and_shift(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """(scale, shift) [H] of a batch norm in eval mode."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _norms_of(layers: _Layers) -> Callable[[], Norms] | None:
    norms = layers.norms
    if not any(norm is not None for norm in norms):
        return None
    return lambda: [None if norm is None else _scale_and_shift(norm) for norm in norms]


def _weights_of(layers: _Layers) -> Callable[[], Weights]:
    """A function that returns the current weights and biases, with the folded batch norms."""
    linears, folded = layers.linears, (None, *layers.folded)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    if not any(norm is not None for norm in folded):
        return lambda: (weights, biases)

    def read() -> Weights:
        scaled, shifted = [*weights], [*biases]
        for i, (linear, norm) in enumerate(zip(linears, folded, strict=True)):
            if norm is not None:
                scale, shift = _scale_and_shift(norm)
                scaled[i] = weights[i] * scale
                shifted[i] = F.linear(shift, weights[i] * linear.mask, biases[i])
        return scaled, shifted

    return read


def _extras_of(layers: _Layers, activation: Callable[[Tensor], Tensor]) -> Callable[[Any, int], Extras | None]:
    """(context, B) -> the extras. All rows of a context that is a view of one row are evaluated once."""
    nothing = ((None, None),) * len(layers.activated)
    terms, gates = layers.terms, layers.gates
    size = terms[0][0].in_features if terms[0] is not None else None

    def extras(context: Any, rows: int) -> Extras | None:
        if context is None:
            return nothing
        if type(context) not in (Tensor, nn.Parameter) or context.shape != (rows, size):
            return None
        if rows > 1 and context.stride(0) == 0 and not (context.requires_grad and torch.is_grad_enabled()):
            context = context[:1]
        found = []
        for term, gate in zip(terms, gates, strict=True):
            added = None if term is None else F.linear(context, term[0].weight, term[0].bias)
            if term is not None and term[1] and added is not None:
                added = activation(added)
            found.append((added, None if gate is None else F.linear(context, gate.weight, gate.bias).sigmoid()))
        return found

    return extras
