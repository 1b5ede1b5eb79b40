"""zuko: MaskedAutoregressiveTransform, the layer of MAF, NSF, NCSF, SOSPF and BPF.

    y_i = f(x_i; params_i),  params = hyper(cat(x, c)), of which params_i reads only c and features before i
    affine: params_i = (t, raw), y = x e^s + t, s = raw / (1 + |raw / ln slope|)
    module(c) -> a Transform on x [..., D]

Only the inverse is replaced, and its log-determinant; of rational-quadratic splines the evaluation too
(``zuko_spline.py``). The context enters the first layer alone, by a term that is computed for the
rows of c as they are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.distributions import Transform

from ...dispatch import is_traced
from ...ops.masked_autoregressive import MASKED_ACTIVATIONS, Extras
from ...rows import checks_all_lengths
from ..adapter import Adapter, Draw, Unfit
from ..identity import PLAN, changed_method, defined_as, find_class, is_hooked, is_own_method, original_class
from ..masked import (
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
from ..mlp import activation_of, name_of_activation
from .zuko import Inverse, univariate_of
from .zuko_spline import find_spline, meta, methods_of_splines

# Rows of a batch on a CPU; with fewer, zuko's own code runs (measured on an AMD EPYC with one thread).
_FEWEST_TWO_PASSES = 256  # an inverse of at most two passes, without its log-determinant
_FEWEST_LOG_DET = 1024  # the log-determinant alone, where the transform is not affine
_SHORT: Short = {2: (0, 512), 3: (0, 64), 4: (0, 16)}
"""Measured in the same way, for a MAF of three transforms with 64 hidden units."""


@dataclass(frozen=True)
class _Given:
    """What a call needs beside y: c, the shape of the batch, and whether the log-determinant."""

    c: Any
    batch: Size
    log_det: bool


@dataclass(frozen=True, eq=False)
class _Inverse(MaskedInverse):
    """``values`` is the same, with 0 in place of the log-determinant where the walk would compute it."""

    values: MaskedInverse | None = None

    def __call__(self, y: Tensor, context: _Given, precision: str | None = None) -> tuple[Tensor, Tensor] | None:
        if self.values is None or context.log_det:
            return super().__call__(y, context, precision)
        return self.values(y, context, precision)


@dataclass
class _Layers:
    """The linear layers of a MaskedMLP in order, for each what AutoregressiveMasks takes; and the activations."""

    linears: list[Any] = field(default_factory=list)
    activated: list[bool] = field(default_factory=list)
    adds: list[int] = field(default_factory=list)
    activations: list[nn.Module] = field(default_factory=list)

    def add(self, module: Any) -> None:
        """Add a module that runs after those before. Raises Unfit."""
        if defined_as(module, "zuko.nn", "MaskedLinear"):
            self.linears.append(module)
            self.activated.append(False)
            self.adds.append(0)
        elif defined_as(module, "zuko.nn", "Residual") and self.linears and not self.activated[-1]:
            source = len(self.linears)
            for inside in module:
                self.add(inside)
            if len(self.linears) == source or self.activated[-1]:
                raise Unfit("a residual block does not end in a linear layer")
            self.adds[-1] = source
        elif self.linears and not self.activated[-1] and activation_of(module) is not None:
            self.activations.append(module)
            self.activated[-1] = True
        else:
            raise Unfit(f"its network has a {type(module).__name__} in an unknown place")


def _layers_of(net: Any) -> _Layers:
    """Raises Unfit where the network is not zuko's, with one kind of elementwise activation."""
    if not defined_as(net, "zuko.nn", "MaskedMLP"):
        raise Unfit(f"its hyper is a {type(net).__name__}, no MaskedMLP")
    for inside in net.modules():
        kind = type(inside).__name__
        if is_hooked(inside):
            raise Unfit(f"a {kind} of its network has a hook or a parametrization, which would be bypassed")
        if changed_method(inside, ("forward",)) is not None:
            raise Unfit(f"the forward of a {kind} of its network was replaced: not the library's own")
    layers = _Layers()
    for module in net:
        layers.add(module)
    if not layers.linears or layers.activated[-1] or layers.adds[-1]:
        raise Unfit("its network does not end in a linear layer")
    if len({activation_of(module) for module in layers.activations}) > 1:
        raise Unfit("its network has several activations")
    if any(getattr(each, "inplace", False) and name_of_activation(each) is None for each in layers.activations):
        raise Unfit("its activation writes to its input")
    return layers


def _masks_of(lazy: Any) -> list[Tensor]:
    return [inside.mask for inside in lazy.hyper.modules() if isinstance(getattr(inside, "mask", None), Tensor)]


_Elementwise = Affine | InvertFeatures
_AFFINE = ("__init__", "_inverse", "log_abs_det_jacobian")  # zuko's methods that ``Affine`` stands for


def _transforms_of(lazy: Any) -> tuple[str, _Elementwise, _Elementwise, tuple[Any, ...], list[tuple[Any, str]]]:
    """Its description; itself; itself without log-determinant; ``MaskedInverse.assumed``; zuko's methods in it."""
    function, scale_map = univariate_of(lazy)
    if scale_map is not None:
        if not all(is_own_method(function, method) for method in _AFFINE):
            raise Unfit("a method of its univariate was replaced: not the library's own")
        affine = Affine(scale_map.scale_function, scale_map.log_scale_function, scale_map)
        methods = [(function, method) for method in _AFFINE]
        return "affine, smooth", affine, replace(affine, log_scale=None), (), methods
    name = getattr(function, "__name__", type(function).__name__)
    if (spline := find_spline(lazy)) is not None:
        return name, spline.inverse(True), spline.inverse(False), (), methods_of_splines()
    if isinstance(function, nn.Module) or not str(getattr(function, "__module__", "")).startswith("zuko."):
        raise Unfit(f"univariate {name}: only zuko's own that depend on nothing but a feature and its parameters")
    return name, _elementwise(lazy, True), _elementwise(lazy, False), (function,), []


def _elementwise(lazy: Any, log_det: bool) -> InvertFeatures:
    """Inverts some features by zuko's own transform; without ``log_det`` its second result is 0."""
    univariate = lazy.univariate  # not the instance, which holds this function
    shapes = [tuple(shape) for shape in lazy.shapes]
    sizes = [*map(prod, shapes)]

    def invert(y: Tensor, params: Tensor, features: Sequence[int]) -> tuple[Tensor, Tensor]:
        parts = params.contiguous().split(sizes, -1)
        parts = [part.reshape(*y.shape, *shape) for part, shape in zip(parts, shapes, strict=True)]
        inverse = univariate(*parts).inv
        return inverse.call_and_ladj(y) if log_det else (inverse(y), y.new_zeros(()).expand_as(y))

    return invert


def _find(lazy: Any) -> MaskedInverse:
    """What the instance is; raises Unfit."""
    if changed_method(lazy, ("meta",)) is not None:
        raise Unfit("its meta was replaced: not the library's own")
    layers = _layers_of(lazy.hyper)
    what, transform, values, assumed, functions = _transforms_of(lazy)
    used = [linear.mask for linear in layers.linears]
    features = used[-1].shape[0] // lazy.total
    used[0] = used[0][:, :features]
    masks = find_masks(used, per_feature=lazy.total, activated=layers.activated[:-1], adds=layers.adds[:-1])
    if max(masks.degrees[0]) > lazy.passes:
        raise Unfit(f"its inverse takes {max(masks.degrees[0])} passes and it makes {lazy.passes}: it is not exact")
    module = layers.activations[0] if layers.activations else torch.relu
    functions += [(type(inside), "forward") for inside in lazy.hyper.modules()] + [(original_class(lazy), "meta")]
    weights, biases = [linear.weight for linear in layers.linears], [linear.bias for linear in layers.linears]
    found = _Inverse(
        what=f"{what}; {in_words('MaskedMLP', masks, module)}",
        masks=masks,
        weights=lambda: ([weights[0][:, :features], *weights[1:]], biases),
        activation=MASKED_ACTIVATIONS.get(name_of_activation(module) or "", module),
        transform=transform,
        extras=lambda given, rows: _extras_of(given, layers.linears[0], features, len(weights) - 1),
        evidence=Unchanged(lazy, functions, _masks_of(lazy)),
        assumed=assumed,
        short=_SHORT,
    )
    return replace(found, values=replace(found, transform=values))


def _extras_of(given: _Given, first: Any, features: int, hidden: int) -> Extras | None:
    """The context's term of the first layer; None where zuko's own code is to run, which may raise an error."""
    nothing, c, weight = (None, None), given.c, first.weight
    width = weight.shape[1] - features
    if c is None:
        return None if width else (nothing,) * hidden
    if width == 0 or type(c) not in (Tensor, nn.Parameter) or c.shape[-1:] != (width,) or c.dtype != weight.dtype:
        return None
    term = F.linear(c, weight[:, features:] * first.mask[:, features:])
    if c.numel() > width:
        term = term.expand(*given.batch, -1)
    return ((term.reshape(-1, term.shape[-1]), None), *(nothing,) * (hidden - 1))


def _forward(lazy: Any, c: Tensor | None = None) -> Transform:
    """The transform for c, whose inverse walks over the degrees."""
    if is_traced():
        return original_class(lazy).forward(lazy, c)  # type: ignore[attr-defined]
    return _transform_class()(lazy, c)


@functools.cache
def _transform_class() -> Callable[[Any, Any], Transform]:
    """The class of the transforms, a subclass of zuko's AutoregressiveTransform; zuko must be imported."""
    base: Any = find_class("zuko.transforms", "AutoregressiveTransform")

    class AutoregressiveTransform(base):
        """zuko's own, but for the inverse and the evaluation of splines."""

        def __init__(self, lazy: Any, c: Any) -> None:
            super().__init__(functools.partial(meta, lazy, c), lazy.passes)
            self._lazy, self._c = lazy, c

        @property
        def inv(self) -> Transform:
            return Inverse(self)

        def __reduce__(self) -> Any:
            """As the library's own, which a process without linfast can load."""
            return base, (functools.partial(self._lazy.meta, self._c), self.passes)

        def _inverse(self, y: Tensor) -> Tensor:
            found = self._walk(y, False)
            return super()._inverse(y) if found is None else found[0]

        def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
            """(x, log|dx / dy|)."""
            found = self._walk(y, True)
            x = self._inverse(y) if found is None else found[0]
            return found or (x, -self.log_abs_det_jacobian(x, y))

        def _walk(self, y: Any, log_det: bool) -> tuple[Tensor, Tensor] | None:
            """(x, log|dx / dy|) of y [..., D]; None where zuko's own code is to run."""
            c, plan = self._c, vars(self._lazy).get(PLAN)
            if not isinstance(y, Tensor) or y.ndim == 0 or not isinstance(c, (Tensor, type(None))) or plan is None:
                return None
            batch = y.shape[:-1]
            if c is not None and c.ndim > 1:
                batch = torch.broadcast_shapes(batch, c.shape[:-1])
            fewest = _FEWEST_LOG_DET if log_det else _FEWEST_TWO_PASSES
            own_is_fast = not isinstance(plan.layout.transform, Affine) if log_det else self.passes <= 2
            if own_is_fast and y.is_cpu and batch.numel() < fewest and not checks_all_lengths():
                return None
            rows = y.expand(*batch, -1).reshape(-1, y.shape[-1])
            found = masked_inverse(self._lazy, _find, rows, _Given(c, batch, log_det))
            return None if found is None else (found[0].reshape(*batch, y.shape[-1]), found[1].reshape(batch))

    return AutoregressiveTransform


def _probe(lazy: Any, draw: Draw) -> list[Tensor]:
    """The inverse for a context of one row and of many, and for many with a gradient too where it is ours."""
    redraw(lazy)
    found, outputs = _find(lazy), []
    features = found.masks.features
    width = lazy.hyper[0].weight.shape[1] - features
    for batch, differentiable in (((2, 3), False), ((3,), False), ((3,), True))[: 2 + found.has_gradient]:
        c = draw(*batch[: 2 - len(batch)], width) if width else None
        y = draw(*batch, features)
        with torch.set_grad_enabled(differentiable):
            inverse = lazy.forward(c).inv
            outputs += inverse.call_and_ladj(y)
            if len(batch) > 1:
                outputs.append(inverse(y))
    return outputs


ADAPTERS = (
    Adapter(
        library="zuko",
        where="zuko.flows.autoregressive",
        name="MaskedAutoregressiveTransform",
        methods={"forward": _forward},
        plan=lambda lazy, options: plan_masked(lazy, _find),
        probe=_probe,
        masks=_masks_of,
        assumes=("meta",),
        inner=lambda lazy: lazy.hyper.modules(),
        decides=True,
        many_steps=True,
    ),
)
