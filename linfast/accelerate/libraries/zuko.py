"""zuko: GeneralCouplingTransform with the affine univariate transform, and so NICE and RealNVP.

    y = m e^s + t,  s = raw / (1 + |raw / ln slope|),  m where the mask is False
    params (t, raw) of (kept, c), interleaved; t(c) -> a Transform on x [..., D]

The transform it gives has one pass of the conditioner for value and log-determinant, both ways
(the original's inverse with log-determinant runs it twice), and slices for a regular mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import ExpTransform, Transform

from ...checks import check_kind
from ...rows import is_short, on_plain_cpu
from ...scale_maps import ScaleMap
from ..adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from ..coupling import couple, described, gains
from ..coupling_side import Side, Split, Tail, split_of
from ..identity import PLAN, find_class, original_class
from ..swap import may_replace, plan_of

__all__ = ["ADAPTERS"]

_SLOPE = 1e-3


def _plan(lazy: Any, options: Options) -> Plan:
    univariate: Any = lazy.univariate
    named: dict[str, Any] = {}
    if isinstance(univariate, functools.partial) and not univariate.args:
        univariate, named = univariate.func, dict(univariate.keywords)
    if univariate is not find_class("zuko.transforms", "MonotonicAffineTransform") or set(named) - {"slope"}:
        raise Unfit(f"univariate {getattr(univariate, '__name__', univariate)}: only the affine one")
    if tuple(map(tuple, lazy.shapes)) != ((), ()):
        raise Unfit(f"shapes {lazy.shapes}: only one shift and one scale a feature")
    bound = abs(math.log(named.get("slope", _SLOPE)))
    split, scale_map = split_of(lazy.mask), ScaleMap("smooth", bound)
    layout = split, Tail(scale_map.log_scale, "interleaved", scale_map)
    return Plan(
        described(f"affine coupling, smooth, mask {split.kind}", [_side(lazy, layout, lazy.hyper, (lazy.hyper,))]),
        layout=layout,
    )


def _side(
    lazy: Any, layout: tuple[Split, Tail], run: Callable[[Tensor], Tensor], nets: tuple[nn.Module, ...]
) -> Side:
    split, tail = layout
    return Side(split, tail, run, lazy, nets)


def _forward(lazy: Any, c: Tensor | None = None) -> Transform:
    """The transform given c. On a CPU it is the library's own until it is given a long batch."""
    on_cpu = on_plain_cpu(lazy.mask)
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not (on_cpu or may_replace(lazy, _COUPLING, "forward"))
    ):
        original: Transform = original_class(lazy).forward(lazy, c)  # type: ignore[attr-defined]
        return original
    made: Transform = _transform_class()(lazy, c, None if on_cpu else plan_of(lazy).layout)
    return made


@functools.cache
def _transform_class() -> type:
    """The fused transform, a zuko CouplingTransform; made when zuko is there."""
    base: Any = find_class("zuko.transforms", "CouplingTransform")
    base_of_inverse: Any = type(ExpTransform().inv)

    class CouplingTransform(base):
        """y and log|det| in one pass, and the same for the inverse."""

        def __init__(self, lazy: Any, c: Tensor | None, layout: tuple[Split, Tail] | None) -> None:
            meta = functools.partial(lazy.meta, c)
            if layout is None:
                super().__init__(meta, lazy.mask)
            else:  # without the features' numbers, for which a GPU would be waited for
                Transform.__init__(self)
                self.meta = meta
            self._lazy, self._c, self._layout = lazy, c, layout

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
            return base, (self.meta, self._lazy.mask)

        def _call(self, x: Tensor) -> Tensor:
            return super()._call(x) if self._layout_for(x) is None else self.call_and_ladj(x)[0]

        def _inverse(self, y: Tensor) -> Tensor:
            return super()._inverse(y) if self._layout_for(y) is None else self.inverse_and_ladj(y)[0]

        def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
            layout = self._layout_for(x)
            return super().call_and_ladj(x) if layout is None else self._run(x, layout, inverse=False)

        def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
            """(x, log|dx / dy|); the library would run its conditioner twice."""
            layout = self._layout_for(y)
            if layout is not None:
                return self._run(y, layout, inverse=True)
            kept, moved = self.split(y)
            moved, ladj = self.meta(kept).inv.call_and_ladj(moved)
            return self.merge(kept, moved, y.shape), ladj

        def _layout_for(self, x: Tensor) -> tuple[Split, Tail] | None:
            """What our path is to run x by; None where the library's own code is to run."""
            check_kind("x", x, Tensor)
            if self._layout is not None:
                return self._layout
            rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1] if x.ndim else 1)
            if PLAN not in vars(self._lazy) or is_short(rows, plan_of(self._lazy).least_rows):
                return None
            if not may_replace(self._lazy, _COUPLING, "forward"):
                return None
            found: tuple[Split, Tail] = plan_of(self._lazy).layout
            same = torch.equal(self._lazy.mask.nonzero().squeeze(-1), self.idx_a)  # the mask may be another since
            return found if same and gains(rows, [self._side(x, found)]) else None

        def _side(self, x: Tensor, layout: tuple[Split, Tail]) -> Side:
            nets = (self._lazy.hyper,) if self._c is None else ()
            return _side(self._lazy, layout, lambda kept: self._params(kept, x.shape[:-1]), nets)

        def _run(self, x: Tensor, layout: tuple[Split, Tail], inverse: bool) -> tuple[Tensor, Tensor]:
            """(y, log|det|) of x [..., D], or of the inverse."""
            y, log_det = couple(x.reshape(-1, x.shape[-1]), self._side(x, layout), inverse)
            return y.reshape(x.shape), log_det.reshape(x.shape[:-1])

        def _params(self, kept: Tensor, batch: Size) -> Tensor:
            """[rows, 2 n] of kept [rows, n]; c is [..., n_c], broadcast to the batch. Few rows: of an MLP alone."""
            if len(batch) != 1 and kept.shape[0] == math.prod(batch):
                kept = kept.reshape(*batch, kept.shape[-1])
            if self._c is not None:
                kept = torch.cat((kept, self._c.expand(*kept.shape[:-1], -1)), -1)
            params = self._lazy.hyper(kept)
            return params.reshape(-1, params.shape[-1])

    class Inverse(base_of_inverse):
        """The inverse, whose value and log-determinant take one pass too."""

        def __reduce__(self) -> Any:
            return base_of_inverse, (self._inv,)

        def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
            return self._inv.inverse_and_ladj(y)

    return CouplingTransform


def _probe(lazy: Any, draw: Draw) -> Sequence[Tensor]:
    kept, features = int(lazy.mask.sum()), lazy.mask.numel()
    extra = lazy.hyper.in_features - kept
    outputs: list[Tensor] = []
    lazy._modules["hyper"] = _LastDim(kept + extra, 2 * (features - kept), draw)
    for batch in ((3,), (2, 3)):
        c = draw(*batch[-1:], extra) if extra else None
        outputs += [*lazy.forward(c).call_and_ladj(draw(*batch, features))]
        outputs += [*lazy.forward(c).inv.call_and_ladj(draw(*batch, features))]
    return outputs


class _LastDim(Stub):
    def forward(self, x: Tensor, *context: Any, **named: Any) -> Tensor:
        return (
            super().forward(x.movedim(-1, 1) if x.ndim > 1 else x[None]).movedim(1, -1).reshape(*x.shape[:-1], -1)
        )


_COUPLING = Adapter(
    library="zuko",
    where="zuko.flows.coupling",
    name="GeneralCouplingTransform",
    methods={"forward": _forward},
    plan=_plan,
    probe=_probe,
    masks=lambda lazy: (lazy.mask,),
    settings=("univariate", "shapes"),
    assumes=("meta",),
    decides=True,
    conditioners=lambda lazy: (lazy.hyper,),
    sides=lambda lazy, layout: (_side(lazy, layout, lazy.hyper, (lazy.hyper,)),),
    vectors=lambda lazy, draw, features: (
        *lazy.forward(None).call_and_ladj(draw(3, features)),
        *lazy.forward(None).inv.call_and_ladj(draw(3, features)),
    ),
    stored="zuko makes a new Transform, not a module, at every call",
)

ADAPTERS = (_COUPLING,)
