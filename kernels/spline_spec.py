"""Spline: the options of a monotonic rational-quadratic spline, which ``linfast.ops.rq_spline`` derives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_type_hints

TAILS = ("linear", "circular", "bounded")
_EXTRA_DERIVATIVES = (-1, 0, 1)


class Spline(NamedTuple):
    """The options of a spline with K bins: the constants of the raw op, followed by ``inverse`` and ``log_det``.

    Args:
        bins: K.
        low, high: the interval that the spline maps to itself; outside it the map is the identity.
        min_width, min_height: of a bin, as fractions of the interval.
        min_derivative: the least derivative at a knot; of a soft-clipped spline 1 / the largest one too.
        temperature: divides the raw widths and heights.
        tails: an index in ``TAILS``.
        soft_clip: raw values u are bounded smoothly, as u / (1 + |u| / c).
        offset: added to the raw derivatives of a spline that is not soft-clipped.
    """

    bins: int
    low: float = -3.0
    high: float = 3.0
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3
    temperature: float = 1.0
    tails: int = 0
    soft_clip: bool = False
    offset: float = 0.0

    @property
    def derivatives(self) -> int:
        """The number of raw derivatives: K - 1 at the inner knots, K or K + 1 with one or both ends."""
        return self.bins + _EXTRA_DERIVATIVES[self.tails]

    @property
    def per_feature(self) -> int:
        """P, the number of raw parameters of a feature: widths, heights, derivatives."""
        return 2 * self.bins + self.derivatives

    @property
    def constexprs(self) -> dict[str, int]:
        return {"BINS": self.bins, "TAILS": self.tails, "SOFT_CLIP": self.soft_clip}


_TYPES = get_type_hints(Spline)
SPLINE_SCHEMA = ", ".join(f"{kind.__name__} {name}" for name, kind in _TYPES.items())


def spline_of_numbers(numbers: Sequence[float]) -> Spline:
    """The Spline whose fields are these numbers, in order."""
    return Spline(*[kind(number) for kind, number in zip(_TYPES.values(), numbers, strict=True)])
