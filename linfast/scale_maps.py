"""Scale maps: how an affine coupling turns its conditioner's raw output r into a log-scale.

    scale = exp(log_scale(r)),  elementwise, any shape

    kind       log_scale(r)                        range               used by
    exp        r                                   unbounded           RealNVP, normflows
    clamp      min(max(r, -c), c)                  [-c, c]             the Linearizer paper (c = 5)
    smooth     r / (1 + |r| / c)                   (-c, c)             linfast's default, zuko (c = ln 1000)
    tanh       c tanh(r)                           (-c, c)             FrEIA
    arctan     c (2 / pi) atan(r)                  (-c, c)             FrEIA's GLOW
    sigmoid    log(sigmoid(r + 2) + floor)         (log floor, ~0]     normflows, nflows (floor = 1e-3)
    softplus   log(min(softplus(r) + floor, c))    [log floor, log c]  glasflow (floor = 1e-3, c = 3)

The log-determinant of a coupling is the sum of these values, so each map is
stated in log space. Round trips of deep stacks stay accurate only while the
summed log-scales stay moderate, which the bound c ensures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_choice, check_number, check_tensor

_TWO_OVER_PI = 2.0 / math.pi
_SIGMOID_SHIFT = 2.0


@dataclass(frozen=True)
class _Kind:
    """Functions of (r or s, c, floor): a log-scale, its derivative in r, its inverse; default c and floor.

    ``scale`` is the scale where it is not the exponential of the log-scale, but the log-scale its logarithm.
    """

    log_scale: Callable[[Tensor, float, float], Tensor]
    derivative: Callable[[Tensor, float, float], Tensor]
    inverse: Callable[[Tensor, float, float], Tensor]
    bound: float = math.inf
    floor: float = 0.0
    scale: Callable[[Tensor, float, float], Tensor] | None = None


def _sigmoid_log_scale(r: Tensor, c: float, floor: float) -> Tensor:
    if floor == 0.0:
        return F.logsigmoid(r + _SIGMOID_SHIFT)
    return torch.log(torch.sigmoid(r + _SIGMOID_SHIFT) + floor)


def _sigmoid_derivative(r: Tensor, c: float, floor: float) -> Tensor:
    s = torch.sigmoid(r + _SIGMOID_SHIFT)
    return torch.sigmoid(-r - _SIGMOID_SHIFT) if floor == 0.0 else s * (1 - s) / (s + floor)


def _softplus_scale(r: Tensor, c: float, floor: float) -> Tensor:
    scale = F.softplus(r) + floor
    return scale if c == math.inf else scale.clamp(max=c)


def _softplus_derivative(r: Tensor, c: float, floor: float) -> Tensor:
    value = F.softplus(r) + floor
    return torch.where(value <= c, torch.sigmoid(r) / value, torch.zeros_like(r))


_KINDS: dict[str, _Kind] = {  # the position of a map is its number in the kernels
    "exp": _Kind(
        lambda r, c, floor: r,
        lambda r, c, floor: torch.ones_like(r),
        lambda s, c, floor: s,
    ),
    "clamp": _Kind(
        lambda r, c, floor: r.clamp(-c, c),
        lambda r, c, floor: (r.abs() <= c).to(r.dtype),
        lambda s, c, floor: s,
        bound=5.0,
    ),
    "smooth": _Kind(
        lambda r, c, floor: r / (1 + r.abs() / c),
        lambda r, c, floor: (1 + r.abs() / c).pow(-2),
        lambda s, c, floor: s / (1 - s.abs() / c),
        bound=0.5,
    ),
    "tanh": _Kind(
        lambda r, c, floor: c * torch.tanh(r),
        lambda r, c, floor: c * (1 - torch.tanh(r).square()),
        lambda s, c, floor: torch.atanh(s / c),
        bound=2.0,
    ),
    "arctan": _Kind(
        lambda r, c, floor: c * _TWO_OVER_PI * torch.atan(r),
        lambda r, c, floor: c * _TWO_OVER_PI / (1 + r.square()),
        lambda s, c, floor: torch.tan(s / (c * _TWO_OVER_PI)),
        bound=2.0,
    ),
    "sigmoid": _Kind(
        _sigmoid_log_scale,
        _sigmoid_derivative,
        lambda s, c, floor: torch.logit(torch.exp(s) - floor) - _SIGMOID_SHIFT,
        scale=lambda r, c, floor: torch.sigmoid(r + _SIGMOID_SHIFT) + floor,
    ),
    "softplus": _Kind(
        lambda r, c, floor: torch.log(_softplus_scale(r, c, floor)),
        _softplus_derivative,
        lambda s, c, floor: torch.log(torch.expm1(torch.exp(s) - floor)),
        bound=3.0,
        floor=1e-3,
        scale=_softplus_scale,
    ),
}

SCALE_MAP_KINDS: tuple[str, ...] = tuple(_KINDS)


@dataclass(frozen=True)
class ScaleMap:
    """A scale map by name, with its bound c and floor; the module's docstring has the formulas.

    Args:
        kind: one of ``SCALE_MAP_KINDS``.
        bound: c, the largest |log scale| (softplus: the largest scale); positive.
            By default clamp 5, smooth 0.5, tanh 2, arctan 2, softplus 3.
        floor: the smallest scale of sigmoid (by default 0) and softplus (1e-3).

    Raises:
        ValueError: unknown kind, bound <= 0 or floor < 0.
    """

    kind: str = "smooth"
    bound: float | None = None
    floor: float | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, SCALE_MAP_KINDS)
        if self.bound is not None:
            check_number("bound", self.bound, 0.0, math.inf, above=True)
        if self.floor is not None:
            check_number("floor", self.floor, 0.0)
        object.__setattr__(self, "log_scale_function", self._log_scale_function())
        object.__setattr__(self, "scale_function", self._scale_function())

    def __reduce__(self) -> tuple[type, tuple[str, float | None, float | None]]:
        return ScaleMap, (self.kind, self.bound, self.floor)

    if TYPE_CHECKING:  # they are attributes: torch.compile warns of functions with a cache

        @property
        def log_scale_function(self) -> Callable[[Tensor], Tensor]:
            """raw -> log s as ``log_scale``, without the check of its argument, for use in loops."""
            raise NotImplementedError

        @property
        def scale_function(self) -> Callable[[Tensor], Tensor]:
            """raw -> e^s, which for sigmoid and softplus needs neither a logarithm nor an exponential of one."""
            raise NotImplementedError

    def _log_scale_function(self) -> Callable[[Tensor], Tensor]:
        bound, floor = self.constants
        if self.kind == "tanh" and bound == 1:
            return torch.tanh
        function: Callable[..., Tensor] = _KINDS[self.kind].log_scale
        return functools.partial(function, c=bound, floor=floor)

    def _scale_function(self) -> Callable[[Tensor], Tensor]:
        kind, (bound, floor) = _KINDS[self.kind], self.constants
        function: Callable[..., Tensor] | None = kind.scale
        if function is not None:
            return functools.partial(function, c=bound, floor=floor)
        return lambda raw: kind.log_scale(raw, bound, floor).exp()

    @property
    def constexpr_id(self) -> int:
        """The number of this map in the kernels."""
        return SCALE_MAP_KINDS.index(self.kind)

    @property
    def constants(self) -> tuple[float, float]:
        """(c, floor), defaults filled in."""
        kind = _KINDS[self.kind]
        bound = kind.bound if self.bound is None else self.bound
        return bound, kind.floor if self.floor is None else self.floor

    def log_scale(self, raw: Tensor) -> Tensor:
        """log s(raw), elementwise, in raw's dtype."""
        check_tensor("raw", raw)
        return _KINDS[self.kind].log_scale(raw, *self.constants)

    def derivative(self, raw: Tensor) -> Tensor:
        """d log s / d raw, elementwise."""
        check_tensor("raw", raw)
        return _KINDS[self.kind].derivative(raw, *self.constants)

    def inverse(self, log_scale: Tensor) -> Tensor:
        """The raw value r with log_scale(r) = ``log_scale``, elementwise; only inside the map's open range."""
        check_tensor("log_scale", log_scale)
        return _KINDS[self.kind].inverse(log_scale, *self.constants)
