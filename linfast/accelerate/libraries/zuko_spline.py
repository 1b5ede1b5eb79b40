"""zuko: the rational-quadratic splines of NSF and NCSF, by ``lf.ops.rq_spline``.

    widths, heights = softmax(C(u; c / 2)), slopes = exp(C(v; c)),  C(u; c) = u / (1 + |u / c|), c = -ln slope
    NCSF first maps x to the interval, (x mod 2 pi) - pi

``SplineTransform`` is what ``MaskedAutoregressiveTransform.meta`` returns: the transform of all features together.
zuko's own code runs where it is faster: for few values on a CPU.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ...dispatch import autocast_dtype, is_traced, is_transformed
from ...kernels.spline_spec import Spline
from ...ops.rq_spline import MOST_BOUND, spline_transform
from ...rows import checks_all_lengths
from ..identity import changed_method, find_class, is_own_method
from ..masked import InvertFeatures
from .zuko import named_options


@dataclass(frozen=True)
class _Fewest:
    """Values of x on a CPU, from which the op is faster (measured on an AMD EPYC with one thread)."""

    values: int = 256
    graph: int = 1024  # where a gradient is required


_FEWEST = _Fewest()
_METHODS = {
    "MonotonicRQSTransform": ("__init__", "bin", "_call", "_inverse", "call_and_ladj"),
    "CircularShiftTransform": ("__init__", "_call", "_inverse", "log_abs_det_jacobian"),
}


@dataclass(frozen=True)
class Univariate:
    """zuko's univariate transform: the spline, and whether x is first mapped to its interval, as in NCSF."""

    spline: Spline
    shifted: bool

    def inverse(self, log_det: bool) -> InvertFeatures:
        """(y [B, n], params [B, n, P], features) -> (x [B, n], log|dx / dy| [B, 1], or 0 of it)."""

        def invert(y: Tensor, params: Tensor, features: list[int]) -> tuple[Tensor, Tensor]:
            x, total = _transform(y, params, self, True, log_det)
            return x, (y.new_zeros(()).expand(len(y)) if total is None else total.to(y.dtype)).unsqueeze(1)

        return invert


def find_spline(lazy: Any) -> Univariate | None:
    """The spline that a lazy transform applies to every feature; None where it applies another transform."""
    function, named = named_options(lazy.univariate)
    shifted = _is_circular(function)
    if not (shifted or function is find_class("zuko.transforms", "MonotonicRQSTransform")):
        return None
    if set(named) - ({"slope"} if shifted else {"slope", "bound"}) or not all(map(_is_own, _METHODS)):
        return None
    slope, bound = named.get("slope", 1e-3), math.pi if shifted else named.get("bound", 5.0)
    if not all(type(value) in (int, float) for value in (slope, bound)) or not (
        1e-6 <= slope < 1 and 0 < bound <= MOST_BOUND
    ):
        return None
    shapes = [tuple(shape) for shape in lazy.shapes]
    bins = shapes[0][0] if shapes and shapes[0] else 0
    if bins < 2 or shapes != [(bins,), (bins,), (bins - 1,)]:
        return None
    return Univariate(Spline(bins, -float(bound), float(bound), 0.0, 0.0, float(slope), soft_clip=True), shifted)


def _is_circular(function: Any) -> bool:
    """Whether it is the function of this name in zuko, which composes the shift and the spline."""
    where = sys.modules.get("zuko.flows.spline")
    return isinstance(function, FunctionType) and (
        (function.__module__, function.__qualname__) == ("zuko.flows.spline", "CircularRQSTransform")
        and function is getattr(where, "CircularRQSTransform", None)
        and not hasattr(function, "__wrapped__")
    )


def _is_own(name: str) -> bool:
    cls = find_class("zuko.transforms", name)
    return cls is not None and all(is_own_method(cls, method) for method in _METHODS[name])


def methods_of_splines() -> list[tuple[Any, str]]:
    """zuko's classes and methods that ``Univariate`` stands for."""
    return [(find_class("zuko.transforms", name), method) for name in _METHODS for method in _METHODS[name]]


def _transform(
    x: Tensor, params: Tensor, spline: Univariate, inverse: bool, log_det: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| [B] or None) of x [B, n] by params [B, n, P]."""
    bound = spline.spline.high
    if spline.shifted and not inverse:
        x = torch.remainder(x, 2 * bound) - bound
    x = x.to(torch.promote_types(x.dtype, params.dtype))  # as zuko's arithmetic does; the op keeps the dtype of x
    y, total = spline_transform(x, params, spline.spline, inverse, log_det)
    return torch.remainder(y, 2 * bound) - bound if spline.shifted and inverse else y, total


def _takes(lazy: Any, c: Any, x: Any) -> bool:
    """Whether the op is at least as fast as zuko's own code, and computes all that is asked for."""
    if type(x) not in (Tensor, nn.Parameter) or type(c) not in (Tensor, nn.Parameter, NoneType) or x.ndim == 0:
        return False
    if x.is_cpu and not checks_all_lengths():
        values = max(x.numel(), 0 if c is None or c.ndim < 2 else c[..., 0].numel() * x.shape[-1])
        if values < _FEWEST.graph and (values < _FEWEST.values or _requires_grad(lazy, c, x)):
            return False
    if is_traced() or is_transformed() or autocast_dtype(x.device.type) is not None:
        return False
    return changed_method(lazy, ("meta",)) is None


def _requires_grad(lazy: Any, c: Tensor | None, x: Tensor) -> bool:
    tensors = itertools.chain((x,), () if c is None else (c,), lazy.parameters())
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _broadcast(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with the same batch dimensions."""
    batch = torch.broadcast_shapes(x.shape[:-1], c.shape[:-1])
    return x.expand(*batch, -1), c.expand(*batch, -1)


class SplineTransform(Transform):
    """The splines of all features of x [..., D], by params [..., D, P]; their batches are broadcast."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, params: Tensor, spline: Univariate) -> None:
        super().__init__()
        self._params, self._spline = params, spline

    def _call(self, x: Tensor) -> Tensor:
        return self._by_op(x, False, False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._by_op(y, True, False)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log|dy / dx| [...])."""
        y, total = self._by_op(x, False, True)
        assert total is not None
        return y, total.to(y.dtype)

    def _by_op(self, x: Tensor, inverse: bool, log_det: bool) -> tuple[Tensor, Tensor | None]:
        shape = torch.broadcast_shapes(x.shape, self._params.shape[:-1])
        rows = x.expand(shape).reshape(-1, shape[-1])
        params = self._params.expand(*shape, -1).reshape(*rows.shape, self._params.shape[-1])
        y, total = _transform(rows, params, self._spline, inverse, log_det)
        return y.reshape(shape), None if total is None else total.reshape(shape[:-1])


def meta(lazy: Any, c: Tensor | None, x: Tensor) -> Transform:
    """The transform of all features at once, given x: a spline by the op, or zuko's own."""
    if _takes(lazy, c, x) and (spline := find_spline(lazy)) is not None:
        given = x if c is None else torch.cat(_broadcast(x, c), -1)
        return SplineTransform(lazy.hyper(given).unflatten(-1, (-1, lazy.total)), spline)
    made: Transform = lazy.meta(c, x)
    return made
