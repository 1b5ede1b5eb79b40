"""Bijection, the base class of all invertible layers; ChannelLinear; the wrappers Conditioned and Inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_dense, check_kind, check_like
from ..hub import HubMethods
from ..ranges import range_
from .undo import Context, Made, Outputs, Undone, undo

_OF_DENSITIES = ("log_prob", "rsample", "sample", "sample_and_log_prob")
_TRANSFORMS = {"_transform", "forward", "inverse", "forward_and_log_det", "inverse_and_log_det"}


class Bijection(nn.Module, HubMethods):
    """An invertible map g of data x [B, C, ...] to noise z of as many elements per sample: the base class.

    Context keywords, ``t=`` and ``context=``, go to the conditioners. A subclass sets ``features`` and implements
    one method, ``_transform``, which the four public methods call.

    Attributes:
        features: channels (dim 1) of x; None where any number is valid.
        features_out: channels of z.
        shape: sample shape of x without the batch, where known.
    """

    features: int | None = None
    shape: tuple[int, ...] | None = None
    _shown: tuple[str, ...] = ()  # the attributes that repr shows

    @property
    def features_out(self) -> int | None:
        return self.features

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        """(y, log|det| [B] of the map, None unless ``log_det``), where y = g(x), or g^{-1}(x) for ``inverse``."""
        raise NotImplementedError

    def _undo(self, made: Made, context: Context, inverse: bool, log_det: bool) -> Undone:
        """x with ``_transform(x)`` = y, and the gradients of this step. Layers with a faster way override it."""
        return undo(
            lambda x: run(self, x, context, inverse, log_det),
            lambda y: run(self, y, context, not inverse, False)[0],
            made,
            self,
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_undo" not in vars(cls) and vars(cls).keys() & _TRANSFORMS:  # an inherited override undoes another map
            cls._undo = Bijection._undo  # type: ignore[method-assign]

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """z = g(x)."""
        with range_("forward", self):
            self._check("x", x, self.features)
            return self._transform(x, context, inverse=False, log_det=False)[0]

    def inverse(self, z: Tensor, **context: Any) -> Tensor:
        """x = g^{-1}(z)."""
        with range_("inverse", self):
            self._check("z", z, self.features_out)
            return self._transform(z, context, inverse=True, log_det=False)[0]

    def forward_and_log_det(self, x: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """(g(x), log|det dg/dx| [B])."""
        with range_("forward_and_log_det", self):
            self._check("x", x, self.features)
            return _both(self._transform(x, context, inverse=False, log_det=True))

    def inverse_and_log_det(self, z: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """(g^{-1}(z), log|det dg^{-1}/dz| [B])."""
        with range_("inverse_and_log_det", self):
            self._check("z", z, self.features_out)
            return _both(self._transform(z, context, inverse=True, log_det=True))

    def at(self, **context: Any) -> Conditioned:
        """This bijection with its context fixed: g.at(t=1.0)(x) is g(x, t=1.0)."""
        return Conditioned(self, context)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)

    def _check(self, name: str, x: Tensor, features: int | None) -> None:
        kind = type(self).__name__
        if torch.compiler.is_compiling():
            check_dense(name, x)
        else:
            check_like(kind, name, x, next(self.parameters(), None))
        if x.ndim < 2:
            raise ValueError(f"{kind}: {name} must be [B, C, ...]; got {tuple(x.shape)}")
        if features is not None and x.shape[1] != features:
            raise ValueError(f"{kind}: {name} must have {features} features (dim 1); got {tuple(x.shape)}")
        if self.shape is not None and x.ndim != 1 + len(self.shape):
            raise ValueError(f"{kind}: {name} must have {1 + len(self.shape)} dimensions; got {tuple(x.shape)}")


def find_part(module: nn.Module, name: str) -> Tensor | nn.Module:
    """The ``__getattr__`` of flows: torch's, but it tells who looks for a method of a density where to find one.

    Each layer of a call looks up its parts, so that single layers keep torch's own.
    """
    own, kind = module.__dict__, type(module).__name__
    for parts in ("_modules", "_parameters", "_buffers"):
        if name in own.get(parts, ()):
            return own[parts][name]
    advice = f": a {kind} has no base distribution; use lf.Density(flow).{name}" if name in _OF_DENSITIES else ""
    raise AttributeError(f"{kind!r} object has no attribute {name!r}{advice}")


def _both(result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    y, log_det = result
    assert log_det is not None
    return y, log_det


class ChannelLinear(Bijection):
    """A bijection that is one affine map of the channels, the same at every position.

    The map is computed from the tensors ``numbers()``. The maps of N layers of one class whose tensors have equal
    shapes can be computed at once, from the stacked tensors: below, ... is N then, and empty for a single layer.
    """

    _shown: tuple[str, ...] = ("features",)

    def numbers(self) -> tuple[Tensor, ...]:
        """The tensors that determine the map."""
        raise NotImplementedError

    def after(self, numbers: Sequence[Tensor], weight: Tensor, bias: Tensor | None, inverse: bool) -> Outputs:
        """(W', b') with W' x + b' = L(weight x + bias), L this layer or its inverse; in fp32 or wider.

        weight [..., C, C]; bias [..., C], None for 0.
        """
        raise NotImplementedError

    def log_abs_det(self, numbers: Sequence[Tensor]) -> Tensor | float:
        """log|det| [...] of the forward map's C x C matrix."""
        return 0.0


def wide(parameter: Tensor) -> Tensor:
    """The parameter in fp32 or wider: torch's solves have no half-precision routines."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def constant_log_det(x: Tensor, of_position: Tensor | float = 0.0, inverse: bool = False) -> Tensor:
    """log|det| [B], in fp32 or wider, of a map with log|det| ``of_position`` at each position of each sample.

    There is one position in [B, C], and H W in [B, C, H, W]. ``of_position`` is a tensor, or 0.0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(of_position, Tensor):  # torch.export would fix a dynamic H or W that is read here
        return torch.full((x.shape[0],), 0.0, dtype=dtype, device=x.device)
    total = of_position * x.shape[2:].numel()
    return (-total if inverse else total).to(dtype).expand(x.shape[0])


class Conditioned(Bijection):
    """A bijection with part of its context fixed. Equal contexts of one bijection give the same vector space."""

    __getattr__ = find_part

    def __init__(self, bijection: Bijection, context: Context) -> None:
        super().__init__()
        check_kind("bijection", bijection, Bijection)
        check_kind("context", context, Mapping)
        self.bijection = bijection
        self._numbers = {key: value for key, value in context.items() if not isinstance(value, Tensor)}
        self._tensor_keys = tuple(key for key in context if key not in self._numbers)
        for key in self._tensor_keys:
            self.register_buffer(f"context_{key}", context[key])
        self.features = bijection.features
        self.shape = bijection.shape

    def at(self, **context: Any) -> Conditioned:
        return Conditioned(self.bijection, {**self.context, **context})

    @property
    def context(self) -> dict[str, Any]:
        """The fixed context: numbers, and tensors, which are buffers of this module."""
        return {**self._numbers, **{key: getattr(self, f"context_{key}") for key in self._tensor_keys}}

    @property
    def features_out(self) -> int | None:
        return self.bijection.features_out

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        return run(self.bijection, x, {**self.context, **context}, inverse, log_det)

    def _undo(self, made: Made, context: Context, inverse: bool, log_det: bool) -> Undone:
        return self.bijection._undo(made, {**self.context, **context}, inverse, log_det)


class Inverse(Bijection):
    """The inverse of a bijection: forward is its inverse, and inverse its forward. Parameters are shared.

    Args:
        bijection: g; this module is g^{-1}.
    """

    __getattr__ = find_part

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        check_kind("bijection", bijection, Bijection)
        self.bijection = bijection
        self.features = bijection.features_out
        self.shape = bijection.shape if bijection.features_out == bijection.features else None

    @property
    def features_out(self) -> int | None:
        return self.bijection.features

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        return run(self.bijection, x, context, not inverse, log_det)

    def _undo(self, made: Made, context: Context, inverse: bool, log_det: bool) -> Undone:
        return self.bijection._undo(made, context, not inverse, log_det)


def run(bijection: Bijection, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
    """Call the public method for ``inverse`` and ``log_det``; forward by __call__, so that hooks run."""
    if log_det:
        method = bijection.inverse_and_log_det if inverse else bijection.forward_and_log_det
        return method(x, **context)
    return (bijection.inverse if inverse else bijection)(x, **context), None


def same_space(g: nn.Module, h: nn.Module) -> bool:
    """Whether g and h induce the same vector space: one object, in the same context."""
    check_kind("g", g)
    check_kind("h", h)
    if isinstance(g, Conditioned) and isinstance(h, Conditioned):
        a, b = g.context, h.context
        alike = same_space(g.bijection, h.bijection) and a.keys() == b.keys()
        return alike and all(_same_value(a[key], b[key]) for key in a)
    return g is h


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):  # a copied or moved module has copies of a tensor
        return a is b or (a.device == b.device and a.dtype == b.dtype and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
