"""The masked autoregressive transforms of nflows, glasflow and normflows, whose network is a MADE (``made.py``)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Unfit
from .identity import changed_method, original_class
from .made import find_made, is_random, masks_of
from .masked import (
    Affine,
    InvertFeatures,
    MaskedInverse,
    Short,
    Unchanged,
    find_masks,
    in_words,
    masked_inverse,
    plan_masked,
    redraw,
)
from .mlp import name_of_activation

_ROWS = 3  # of a batch in the check
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
_WORDS = {
    "Linear": "linear",
    "Quadratic": "quadratic",
    "Cubic": "cubic",
    "RationalQuadratic": "rational-quadratic",
}

Read = Callable[[Any], tuple[str, Affine | InvertFeatures, tuple[Any, ...]]]
"""instance -> its elementwise transform: its description, itself, and what of it is ``MaskedInverse.assumed``."""


def made_adapter(
    library: str,
    where: str,
    name: str,
    made: str,
    read: Read,
    methods: tuple[str, ...],
    domain: Callable[[Any, Tensor], Tensor] = lambda instance, y: y,
) -> Adapter:
    """The adapter of a class with an ``inverse(inputs, context=None)``.

    Args:
        made: the module that defines the MADE that is its ``autoregressive_net``.
        read: finds its elementwise transform.
        methods: those of the class that this transform stands for.
        domain: (instance, y) -> y where the inverse is defined.
    """

    def find(instance: Any) -> MaskedInverse:
        changed = changed_method(instance, methods)
        if changed is not None:
            raise Unfit(f"its {changed} was replaced: not the library's own")
        return _find(instance, made, read, [(original_class(instance), name) for name in methods])

    def inverse(instance: Any, inputs: Tensor, context: Any = None) -> Any:
        outputs = masked_inverse(instance, find, inputs, context)
        return instance._linfast_original.inverse(instance, inputs, context) if outputs is None else outputs

    def probe(instance: Any, draw: Draw) -> list[Tensor]:
        redraw(instance.eval())
        found, outputs, layer = find(instance), [], getattr(instance.autoregressive_net, "context_layer", None)
        contexts: list[Tensor | None] = [None]
        if layer is not None:
            size = layer.in_features
            contexts += [draw(_ROWS, size), draw(1, size).expand(_ROWS, -1)]
        for context in contexts:
            y = domain(instance, draw(_ROWS, found.masks.features))
            with torch.no_grad():
                outputs += instance.inverse(y, context=context)
            if found.has_gradient:
                outputs += instance.inverse(y, context=context)
        return outputs

    return Adapter(
        library=library,
        where=where,
        name=name,
        methods={"inverse": inverse},
        plan=lambda instance, options: plan_masked(instance, find),
        probe=probe,
        masks=lambda instance: masks_of(instance.autoregressive_net),
        assumes=methods,
        inner=lambda instance: [*instance.modules()][1:],
        decides=True,
        many_steps=True,
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
    return made_adapter(library, where, name, made, read, methods, domain)


def _spline_of(instance: Any) -> InvertFeatures:
    """The library's own formula on some features, by an instance that shares all else with this one."""
    kind, whole = original_class(instance), weakref.ref(instance)  # which holds this function

    def invert(y: Tensor, params: Tensor, features: list[int]) -> tuple[Tensor, Tensor]:
        of_features: Any = object.__new__(kind)
        vars(of_features).update(vars(whole()), features=len(features))
        x, log_det = of_features._elementwise_inverse(y, params.reshape(len(y), -1))
        return x, log_det.unsqueeze(1)

    return invert


def _find(instance: Any, made: str, read: Read, functions: list[tuple[type, str]]) -> MaskedInverse:
    """What the instance is, where these functions are the library's; raises Unfit."""
    net = instance.autoregressive_net
    found = find_made(net, made)
    text, transform, assumed = read(instance)
    adds = [layer.adds for layer in found.hidden]
    masks = find_masks(
        masks_of(net),
        per_feature=instance._output_dim_multiplier(),
        activated=[layer.activated for layer in found.hidden],
        adds=adds,
        raw_first=isinstance(transform, Affine),
    )
    if masks.features == 1:
        raise Unfit("it has one feature: its own inverse is one evaluation of the network")
    norm = any(layer.norm is not None or layer.folded is not None for layer in found.hidden)
    return MaskedInverse(
        what=f"{text}; {in_words('MADE', masks, found.activation)}{', batch norm' * norm}",
        masks=masks,
        weights=found.weights(),
        activation=found.activation,
        transform=transform,
        extras=found.extras(),
        evidence=Unchanged(
            instance, [(type(module), "forward") for module in net.modules()] + functions, masks_of(net)
        ),
        norms=found.norms(),
        ready=not any(map(is_random, net.modules())),
        assumed=(*assumed, *([] if name_of_activation(found.activation) else [found.activation])),
        short=_SHORT,
    )
