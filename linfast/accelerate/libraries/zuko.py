"""zuko: GeneralCouplingTransform with the affine univariate transform, and chains of it, such as NICE and RealNVP.

    y = m e^s + t,  s = raw / (1 + |raw / ln slope|)  of the features m whose mask is False
    params (t, raw) computed from (kept, c), interleaved; module(c) -> a Transform on x [..., D]

These transforms evaluate each conditioner once for value and log-determinant, in both directions (zuko's inverse
with log-determinant evaluates it twice). Without a context c, a flow's LazyComposedTransform returns one transform
that runs all couplings together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import ExpTransform, Transform, constraints

from ...checks import check_kind
from ...dispatch import is_traced
from ...rows import checks_all_lengths
from ...scale_maps import ScaleMap
from ..adapter import Draw, Stub, Unfit
from ..chain import chain_adapter, fused_of
from ..coupling import couple, coupling_adapter
from ..fused import Fused
from ..identity import PLAN, find_class, is_patched, original_class
from ..maps import NO_MAPS, listed
from ..sides import Side, Split, Tail, split_of
from ..swap import may_replace, plan_of
from ..unknown import Layers

_SLOPE = 1e-3
_STORED = "zuko makes a new Transform, not a module, at every call"


def _find(lazy: Any) -> tuple[str, tuple[Split, Tail]]:
    function, scale_map = univariate_of(lazy)
    if scale_map is None:
        raise Unfit(f"univariate {getattr(function, '__name__', function)}: only the affine one")
    layout = split_of(lazy.mask), Tail("interleaved", scale_map)
    return f"affine coupling, smooth, mask {layout[0].kind}", layout


def named_options(function: Any) -> tuple[Any, dict[str, Any]]:
    """(the function inside a functools.partial with keywords alone, these keywords); else itself and none."""
    if isinstance(function, functools.partial) and not function.args:
        return function.func, dict(function.keywords)
    return function, {}


def univariate_of(lazy: Any) -> tuple[Any, ScaleMap | None]:
    """(the class or function of the univariate transform, its scale map where it is the affine one)."""
    function, named = named_options(lazy.univariate)
    if function is not find_class("zuko.transforms", "MonotonicAffineTransform") or set(named) - {"slope"}:
        return function, None
    if tuple(map(tuple, lazy.shapes)) != ((), ()):
        raise Unfit(f"shapes {lazy.shapes}: only one shift and one scale per feature")
    slope = named.get("slope", _SLOPE)
    if not isinstance(slope, (float, int)):
        raise Unfit(f"its slope is a {type(slope).__name__}: only a number")
    return function, ScaleMap("smooth", abs(math.log(slope)))


def _side(lazy: Any, layout: tuple[Split, Tail], run: Callable[[Tensor], Tensor] | None = None) -> Side:
    """``run``: kept features -> params, where they depend on a context."""
    return Side(*layout, run or lazy.hyper, () if run else (lazy.hyper,))


def _mask_of(lazy: Any, kept: Any) -> Tensor:
    """The mask of a coupling that keeps these features."""
    mask = torch.zeros_like(lazy.mask)
    mask[kept] = True
    return mask


class Inverse(type(ExpTransform().inv)):  # type: ignore[misc]  # torch has no public name for this class
    """The inverse of a transform that evaluates its network once for value and log-determinant."""

    def __reduce__(self) -> Any:
        return type(self).__base__, (self._inv,)

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._inv.inverse_and_ladj(y)


def _forward(lazy: Any, c: Tensor | None = None) -> Transform:
    """The transform for c, on a CPU in zuko's own arithmetic, with one conditioner evaluation per direction."""
    own = lazy.mask.is_cpu and not checks_all_lengths()
    if is_traced() or not (own or may_replace(lazy, _COUPLING, "forward")):
        return original_class(lazy).forward(lazy, c)  # type: ignore[attr-defined]
    return _transform_class()(lazy, c, plan_of(lazy).layout, own)


@functools.cache
def _transform_class() -> Callable[..., Transform]:
    """The class of one coupling's transform, a subclass of zuko's CouplingTransform; zuko must be imported."""
    base: Any = find_class("zuko.transforms", "CouplingTransform")

    class CouplingTransform(base):
        """y and log|det| from one evaluation, in both directions. ``own``: whether in zuko's arithmetic."""

        def __init__(self, lazy: Any, c: Any, layout: Any, own: bool, mask: Any = None) -> None:
            meta = functools.partial(lazy.meta, c)
            if own:
                super().__init__(meta, lazy.mask if mask is None else mask)
            else:  # without the features' indices, which would wait for the GPU
                Transform.__init__(self)
                self.meta = meta
            self._lazy, self._c, self._layout, self._own = lazy, c, layout, own

        @functools.cached_property
        def idx_a(self) -> Tensor:
            return self._lazy.mask.nonzero().squeeze(-1)

        @functools.cached_property
        def idx_b(self) -> Tensor:
            return (~self._lazy.mask).nonzero().squeeze(-1)

        @property
        def inv(self) -> Transform:
            return Inverse(self)

        def __reduce__(self) -> Any:
            """As the library's own, which a process without linfast can load."""
            return base, (self.meta, _mask_of(self._lazy, self.idx_a))

        def _call(self, x: Tensor) -> Tensor:
            return super()._call(x) if self._own else self.call_and_ladj(x)[0]

        def _inverse(self, y: Tensor) -> Tensor:
            return super()._inverse(y) if self._own else self.inverse_and_ladj(y)[0]

        def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self._run(x, False, super().call_and_ladj)

        def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
            """(x, log|dx / dy|); zuko would evaluate its conditioner twice."""

            def own(y: Tensor) -> tuple[Tensor, Tensor]:
                kept, moved = self.split(y)
                moved, ladj = self.meta(kept).inv.call_and_ladj(moved)
                return self.merge(kept, moved, y.shape), ladj

            return self._run(y, True, own)

        def _run(self, x: Tensor, inverse: bool, own: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
            """(y, log|det|) of x [..., D], or of the inverse."""
            check_kind("x", x, Tensor)
            c: Any = self._c
            if x.ndim == 0 or (self._own and (self._layout is None or c is not None or x.ndim != 2)):
                return own(x)

            def whole(rows: Tensor) -> tuple[Tensor, Tensor]:
                y, log_det = own(x)
                return y.reshape(rows.shape), log_det.reshape(-1)

            def params(kept: Tensor) -> Tensor:
                """[rows, 2 n] of kept [rows, n] and c [..., n_c], which is broadcast to the batch."""
                kept = kept.reshape(*x.shape[:-1], kept.shape[-1])
                given = self._lazy.hyper(torch.cat((kept, c.expand(*kept.shape[:-1], -1)), -1))
                return given.reshape(-1, given.shape[-1])

            side = _side(self._lazy, self._layout, None if c is None else params)
            rows = x.reshape(-1, x.shape[-1])
            y, log_det = couple(self._lazy, [side], rows, inverse, own if self._own else whole)
            return y.reshape(x.shape), log_det.reshape(x.shape[:-1])

    return CouplingTransform


def _extra(lazy: Any) -> int:
    """The number of features of the context."""
    width: int = lazy.hyper.weight.shape[1] if isinstance(lazy.hyper, Stub) else lazy.hyper.in_features
    return width - int(lazy.mask.sum())


class _LastDim(Stub):
    def forward(self, x: Tensor, *context: Any, **named: Any) -> Tensor:
        y = super().forward(x.movedim(-1, 1) if x.ndim > 1 else x[None])
        return y.movedim(1, -1).reshape(*x.shape[:-1], -1)


def _both_ways_given(lazy: Any, draw: Draw, shape: tuple[int, ...]) -> list[Tensor]:
    extra = _extra(lazy)
    return _both_ways(lazy.forward(draw(shape[-2], extra) if extra else None), draw, shape)


def _both_ways(transform: Any, draw: Draw, shape: tuple[int, ...]) -> list[Tensor]:
    return [*transform.call_and_ladj(draw(*shape)), *transform.inv.call_and_ladj(draw(*shape))]


_COUPLING = coupling_adapter(
    library="zuko",
    where="zuko.flows.coupling",
    name="GeneralCouplingTransform",
    find=_find,
    members=lambda lazy, layout, context: (_side(lazy, layout),),
    nets=lambda lazy: (lazy.hyper,),
    methods=({"forward": _forward}, _both_ways_given),
    shapes=lambda lazy: ((3, lazy.mask.numel()), (2, 3, lazy.mask.numel())),
    extra=_extra,
    stub=lambda lazy: _LastDim,
    masks=lambda lazy: (lazy.mask,),
    settings=("univariate", "shapes"),
    assumes=("meta",),
    decides=True,
    stored=_STORED,
)


# LazyComposedTransform


def _forward_chain(chain: Any, c: Tensor | None = None) -> Transform:
    """The transform for c: where c is None all couplings together, else zuko's own composition."""
    fused = fused_of(chain) if c is None and not is_traced() and not is_patched(chain) else None
    if fused is None:
        return original_class(chain).forward(chain, c)  # type: ignore[attr-defined]
    return _together_class()(chain, fused, False)


@functools.cache
def _together_class() -> Callable[..., Transform]:
    """The class of all couplings' transform, a subclass of zuko's ComposedTransform; zuko must be imported."""
    base: Any = find_class("zuko.transforms", "ComposedTransform")

    class ComposedTransform(base):
        """y and log|det| of all couplings together; by one transform per coupling where the chain has changed."""

        domain = codomain = constraints.real_vector
        bijective = True

        def __init__(self, chain: Any, fused: Fused, inverted: bool) -> None:
            Transform.__init__(self)
            self.domain_dim = self.codomain_dim = 1
            self._chain, self._fused, self._inverted = chain, fused, inverted
            self._couplings = tuple(chain.transforms)

        @functools.cached_property
        def _apart(self) -> list[Transform]:
            """One transform per coupling, with the masks from when this object was made."""
            pairs = zip(self._couplings, self._fused.couplings, strict=True)
            return [_transform_class()(lazy, None, None, True, _mask_of(lazy, each.kept)) for lazy, each in pairs]

        @property
        def transforms(self) -> list[Transform]:
            return [t.inv for t in reversed(self._apart)] if self._inverted else self._apart

        @property
        def inv(self) -> Transform:
            return type(self)(self._chain, self._fused, not self._inverted)

        def __reduce__(self) -> Any:
            """As the library's own, which a process without linfast can load."""
            return (getattr, (base(*self._apart), "inv")) if self._inverted else (base, tuple(self._apart))

        def _call(self, x: Tensor) -> Tensor:
            outputs = self._together(x, self._inverted)
            return super()._call(x) if outputs is None else outputs[0]

        def _inverse(self, y: Tensor) -> Tensor:
            outputs = self._together(y, not self._inverted)
            return super()._inverse(y) if outputs is None else outputs[0]

        def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self._together(x, self._inverted) or super().call_and_ladj(x)

        def _together(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
            check_kind("x", x, Tensor)
            if x.ndim == 0 or PLAN not in vars(self._chain):
                return None
            rows = x.reshape(-1, x.shape[-1])
            if not self._fused.takes(rows) or fused_of(self._chain) is not self._fused:
                return None
            y, log_det = self._fused(self._chain, rows, inverse)
            return y.reshape(x.shape), log_det.reshape(x.shape[:-1])

    return ComposedTransform


_CHAIN = chain_adapter(
    "zuko",
    "zuko.lazy",
    "LazyComposedTransform",
    listed("transforms"),
    None,
    NO_MAPS,
    methods={"forward": _forward_chain},
    probe=lambda chain, draw: (),
    stored=_STORED,
    vectors=lambda chain, draw, features: _both_ways(chain.forward(None), draw, (3, features)),
)

ADAPTERS = (_COUPLING, _CHAIN)

LAYERS = Layers("zuko", "zuko.lazy", "LazyTransform", ("LazyInverse", "UnconditionalTransform"))
