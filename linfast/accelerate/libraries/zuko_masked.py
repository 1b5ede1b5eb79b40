"""zuko: MaskedAutoregressiveTransform, the layer of MAF, NSF, NCSF, SOSPF and BPF.

    y_i = f(x_i; params_i),  params = hyper(cat(x, c)), [P D] of which params_i reads only features before i
    affine: params (t, raw), y = x e^s + t, s = raw / (1 + |raw / ln slope|);  module(c) -> a Transform on x [..., D]

Only the inverse is replaced: zuko evaluates the network ``passes`` times, this walks once over the degrees
(accelerate.masked). Its log-determinant comes from the same walk. The context enters the first layer alone, by a
term that is computed once, for the rows of c as they are given.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from ...dispatch import has_global_hook
from ...flows.remembered import Evidence
from ...ops.autoregressive_masks import AutoregressiveMasks
from ...ops.masked_autoregressive import MASKED_ACTIVATIONS, Extras
from ...scale_maps import log_scale_function, scale_function
from ..adapter import Adapter, Draw, Options, Plan, Unfit
from ..identity import PLAN, changed_method, defined_as, find_class, is_hooked, is_patched, original_class
from ..masked import Affine, InvertFeatures, MaskedInverse
from ..mlp import activation_of, name_of_activation
from ..swap import plan_of
from .zuko import Inverse, is_traced, univariate_of


@dataclass(frozen=True, eq=False)
class _Walks:
    """The inverse of one instance.

    Args:
        children: the instance's submodules by name, the dictionary itself: another one in a replica.
        whole: returns x and log|dx / dy|.
        values: returns x, and anything in place of the second.
    """

    children: dict[str, Any]
    whole: MaskedInverse
    values: MaskedInverse


@dataclass
class _Layers:
    """The linear layers of a MaskedMLP; ``activated`` and ``adds`` as in AutoregressiveMasks, but for all layers."""

    linear: list[Any]
    activation: list[Any]
    activated: list[bool]
    adds: list[int]

    def add(self, module: Any) -> None:
        """Append a layer, or what follows the last one."""
        if defined_as(module, "zuko.nn", "MaskedLinear"):
            if module.mask.dtype is not torch.bool:
                raise Unfit(f"a mask is {module.mask.dtype}, not torch.bool")
            self.linear.append(module)
            self.activated.append(False)
            self.adds.append(0)
        elif defined_as(module, "zuko.nn", "Residual"):
            source = len(self.linear)
            if not source or self.activated[-1] or len(module) != 3:
                raise Unfit("a residual block is not built as zuko's")
            for inside in module:
                self.add(inside)
            self.adds[-1] = source
        elif self.linear and not self.activated[-1] and activation_of(module) is not None:
            self.activation.append(module)
            self.activated[-1] = True
        else:
            raise Unfit(f"its network contains {type(module).__name__}")


def _layers_of(net: Any) -> _Layers:
    """Raises Unfit where the network is not zuko's, with one kind of elementwise activation."""
    if not defined_as(net, "zuko.nn", "MaskedMLP"):
        raise Unfit(f"its network is {type(net).__name__}, not zuko's MaskedMLP")
    for inside in net.modules():
        if is_hooked(inside):
            raise Unfit("a module inside has a hook or a parametrization, which would be bypassed")
        if changed_method(inside, ("forward",)) is not None:
            raise Unfit(f"the forward of its {type(inside).__name__} was replaced: not the library's own")
    layers = _Layers([], [], [], [])
    for module in net:
        layers.add(module)
    kinds = {activation_of(module) for module in layers.activation}
    if len(layers.linear) < 2 or layers.activated[-1] or layers.adds[-1]:
        raise Unfit("its network does not end in a linear layer after a hidden one")
    if len(kinds) > 1:
        raise Unfit("its network has more than one kind of activation")
    return layers


def _masks_of(lazy: Any, layers: _Layers) -> AutoregressiveMasks:
    """The masks of the features, without the context's columns; raises Unfit where zuko's inverse is not exact."""
    masks = [layer.mask for layer in layers.linear]
    features = masks[-1].shape[0] // lazy.total
    try:
        found = AutoregressiveMasks(
            [masks[0][:, :features], *masks[1:]], lazy.total, layers.activated[:-1], layers.adds[:-1]
        )
    except ValueError as error:
        raise Unfit(str(error)) from error
    if max(found.degrees[0]) > lazy.passes:
        raise Unfit(f"its inverse needs {max(found.degrees[0])} passes and makes {lazy.passes}")
    return found


def _elementwise(lazy: Any, log_det: bool) -> InvertFeatures:
    """Inverts the features of one degree by zuko's own transform; without ``log_det`` its second result is 0."""
    shapes = [tuple(shape) for shape in lazy.shapes]

    def invert(y: Tensor, params: Tensor, features: Sequence[int]) -> tuple[Tensor, Tensor]:
        parts = params.contiguous().split([*map(prod, shapes)], -1)
        transform = lazy.univariate(*(p.reshape(*y.shape, *shape) for p, shape in zip(parts, shapes, strict=True)))
        if log_det:
            return transform.inv.call_and_ladj(y)
        x = transform.inv(y)
        return x, x.new_zeros(()).expand_as(x)

    return invert


def _find(lazy: Any) -> tuple[str, _Walks]:
    """(description for the report, the inverse); raises Unfit."""
    layers = _layers_of(lazy.hyper)
    masks, linear = _masks_of(lazy, layers), layers.linear
    features = masks.features
    function, scale_map = univariate_of(lazy)
    text = "affine, smooth"
    transforms: list[Affine | InvertFeatures]
    if scale_map is not None:
        transforms = [Affine(scale_function(scale_map), log_scale_function(scale_map), scale_map)] * 2
    else:
        text = getattr(function, "__name__", type(function).__name__)
        if isinstance(function, nn.Module) or not str(getattr(function, "__module__", "")).startswith("zuko."):
            raise Unfit(f"univariate {text}: only those of zuko that are formulas of the parameters alone")
        transforms = [_elementwise(lazy, True), _elementwise(lazy, False)]

    def weights() -> tuple[list[Tensor], list[Tensor | None]]:
        first, *others = [layer.weight for layer in linear]
        return [first[:, :features], *others], [layer.bias for layer in linear]

    def extras(given: tuple[Tensor, tuple[int, ...]] | None) -> Extras:
        """From (c, the shape of the batch)."""
        rest = ((None, None),) * (len(linear) - 2)
        if given is None:
            return ((None, None), *rest)
        c, batch = given
        term = c @ (linear[0].weight * linear[0].mask)[:, features:].t()
        alone = c.numel() == c.shape[-1]
        term = term.reshape(1, -1) if alone else term.expand(*batch, -1).reshape(-1, term.shape[-1])
        return ((term, None), *rest)

    names = ("meta", "forward"), ("forward",), ("__init__", "_inverse", "log_abs_det_jacobian")
    classes = original_class(lazy), find_class("zuko.nn", "MaskedLinear"), function if scale_map is not None else None
    watched = [(cls, name) for cls, of in zip(classes, names, strict=True) if cls is not None for name in of]
    evidence = Evidence([lazy], [lazy.hyper], watched, [layer.mask for layer in linear])
    module = layers.activation[0] if layers.activation else torch.relu
    activation = MASKED_ACTIVATIONS.get(name_of_activation(module) or "", module)
    whole, values = (
        MaskedInverse(masks, weights, activation, transform, extras, None, evidence) for transform in transforms
    )
    return f"inverse of masked autoregressive {text}: one walk", _Walks(lazy._modules, whole, values)


def _plan(lazy: Any, options: Options) -> Plan:
    text, walks = _find(lazy)
    return Plan(text, layout=walks)


def _walks_of(lazy: Any) -> _Walks | None:
    """The current walks; None where zuko's own inverse is to run."""
    if PLAN not in vars(lazy) or has_global_hook() or is_patched(lazy):
        return None
    plan = plan_of(lazy)
    walks: _Walks = plan.layout
    same = walks.children is lazy._modules and plan.settings == MASKED.settings_of(lazy)
    if same and walks.whole.evidence.holds():
        return walks
    try:
        vars(lazy)[PLAN] = plan = MASKED.plan_for(lazy, plan.options)
    except (Unfit, RuntimeError):  # RuntimeError: there are no values to read
        return None
    return plan.layout


def _forward(lazy: Any, c: Tensor | None = None) -> Transform:
    """The transform for c, whose inverse walks over the degrees."""
    if is_traced():
        original: Transform = original_class(lazy).forward(lazy, c)  # type: ignore[attr-defined]
        return original
    made: Transform = _transform_class()(lazy, c)
    return made


@functools.cache
def _transform_class() -> type:
    """The class of the transforms, a subclass of zuko's AutoregressiveTransform; zuko must be imported."""
    base: Any = find_class("zuko.transforms", "AutoregressiveTransform")

    class AutoregressiveTransform(base):
        """zuko's own, but for the inverse."""

        def __init__(self, lazy: Any, c: Any) -> None:
            super().__init__(functools.partial(lazy.meta, c), lazy.passes)
            self._lazy, self._c = lazy, c

        @property
        def inv(self) -> Transform:
            return Inverse(self)

        def __reduce__(self) -> Any:
            """As the library's own, which a process without linfast can load."""
            return base, (self.meta, self.passes)

        def _inverse(self, y: Tensor) -> Tensor:
            found = self._walk(y, False)
            return super()._inverse(y) if found is None else found[0]

        def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
            """(x, log|dx / dy|); zuko would evaluate its network once more."""
            found = self._walk(y, True)
            if found is None:
                x = super()._inverse(y)
                return x, -self.log_abs_det_jacobian(x, y)
            return found

        def _walk(self, y: Any, log_det: bool) -> tuple[Tensor, Tensor] | None:
            """(x, log|dx / dy|) of y [..., D]; None where zuko's own code is to run."""
            c: Any = self._c
            if type(y) not in (Tensor, nn.Parameter) or y.ndim == 0 or _is_transformed():
                return None
            walks = _walks_of(self._lazy)
            if walks is None or not _fits(self._lazy, c, y.shape[-1]):
                return None
            batch = y.shape[:-1]
            if c is not None and c.ndim > 1:
                batch = torch.broadcast_shapes(batch, c.shape[:-1])
            rows = y.expand(*batch, -1).reshape(-1, y.shape[-1])
            found = (walks.whole if log_det else walks.values)(rows, None if c is None else (c, batch))
            return None if found is None else (found[0].reshape(*batch, -1), found[1].reshape(batch))

    return AutoregressiveTransform


def _is_transformed() -> bool:
    """Whether the call is traced, or differentiated or batched by other means than a graph."""
    if is_traced() or torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad._current_level >= 0


def _fits(lazy: Any, c: Any, features: int) -> bool:
    """Whether the network takes this context beside x."""
    weight = lazy.hyper[0].weight
    width = weight.shape[1] - features
    if c is None:
        return width == 0
    return width > 0 and type(c) in (Tensor, nn.Parameter) and c.shape[-1:] == (width,) and c.dtype == weight.dtype


def _probe(lazy: Any, draw: Draw) -> list[Tensor]:
    """The inverse with and without gradients, for contexts of one row and of many, with random weights."""
    layers = _layers_of(lazy.hyper).linear
    with torch.no_grad():
        for layer in layers:
            read = layer.mask.sum(1, keepdim=True).clamp(min=1)
            layer.weight.copy_(draw(*layer.weight.shape).detach() / read.sqrt())
            if layer.bias is not None:
                layer.bias.copy_(draw(*layer.bias.shape).detach() / 2)
        layers[-1].weight.div_(2)
    features = layers[-1].mask.shape[0] // lazy.total
    extra = layers[0].mask.shape[1] - features
    outputs: list[Tensor] = []
    for shape, differentiable in (((3,), True), ((2, 3), False)):
        with torch.set_grad_enabled(differentiable):
            c = draw(*shape[:1] * differentiable, extra) if extra else None
            transform, y = lazy.forward(c), draw(*shape, features)
            outputs += [*transform.inv.call_and_ladj(y), transform.inv(y)]
    return outputs


def _inside(lazy: Any) -> Iterable[nn.Module]:
    return lazy.hyper.modules()


def _inner_masks(lazy: Any) -> list[Tensor]:
    return [inside.mask for inside in lazy.hyper.modules() if isinstance(getattr(inside, "mask", None), Tensor)]


MASKED = Adapter(
    library="zuko",
    where="zuko.flows.autoregressive",
    name="MaskedAutoregressiveTransform",
    methods={"forward": _forward},
    plan=_plan,
    probe=_probe,
    masks=_inner_masks,
    settings=("univariate", "shapes", "total", "passes"),
    assumes=("meta",),
    inner=_inside,
    decides=True,
)

ADAPTERS = (MASKED,)
