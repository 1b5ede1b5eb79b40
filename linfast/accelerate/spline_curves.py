"""The spline of a coupling of nflows, glasflow or normflows, and of its unconditional transform, by attributes.

    tails                  interval           derivatives
    None                   [0, 1]             K + 1
    "linear", "circular"   [-bound, bound]    K - 1, K
    a list (normflows)     the same           K + 1: both ends of linear features are replaced by 1, and the last
                                              one of circular features by the first

A bound per feature scales x and y: y = b S(x / b), whose derivative is that of S. With a list y = 0 outside.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..dispatch import cat
from ..kernels.spline_spec import Spline
from ..ops.rq_spline import spline_of, spline_transform

CURVE_METHODS = "forward", "inverse", "_spline"
"""The methods of a PiecewiseRationalQuadraticCDF that must be the library's own."""


class Other(Exception):
    """The library's own code is to run in this place."""


def curve_of(owner: Any, bins: int, temperature: float) -> Spline:
    """The spline that the attributes of a coupling or of a PiecewiseRationalQuadraticCDF describe."""
    tails, bound = owner.tails, owner.tail_bound
    kind = tails if isinstance(tails, str) else "bounded"
    high = 1.0 if tails is None or isinstance(bound, Tensor) else bound
    low = 0.0 if tails is None else -high
    least = owner.min_bin_width, owner.min_bin_height, owner.min_derivative
    return _spline(bins, kind, low, high, *least, temperature)


@functools.lru_cache(256)
def _spline(
    bins: int, tails: str, low: float, high: float, width: float, height: float, slope: float, temperature: float
) -> Spline:
    return spline_of(
        bins, tails=tails, interval=(low, high), min_width=width, min_height=height, min_derivative=slope,
        temperature=temperature, parameters="softmax",
    )  # fmt: skip


def curve_for(owner: Any, bins: int, temperature: float, x: Tensor) -> Spline:
    """The spline that is to run on x; raises Other where its options, or x without tails, are the library's."""
    try:
        spline = curve_of(owner, bins, temperature)
    except ValueError as error:
        raise Other from error
    if owner.tails is None and x.is_cpu and not (x.numel() and all(0 <= end <= 1 for end in x.detach().aminmax())):
        raise Other
    return spline


def apply_spline(owner: Any, spline: Spline, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, log_det [B]) of x [B, ...] by params [B or 1, ..., P]; raises Other where they do not fit x."""
    tails: Any = owner.tails
    bound: Any = None if tails is None else owner.tail_bound
    if params.shape[1:] != (*x.shape[1:], spline.per_feature) or x.dtype != params.dtype:
        raise Other
    listed = isinstance(tails, list | tuple)
    if listed:
        params = _with_ends(params, _linear(tuple(tails), params.device), spline)
    if not listed and not isinstance(bound, Tensor):
        y, log_det = spline_transform(x, params, spline, inverse, True)
    else:
        scale = bound if isinstance(bound, Tensor) else 1.0
        y, log_det = spline_transform(x / scale, params, spline, inverse, True)
        y = torch.where((x >= -bound) & (x <= bound), y * scale, 0.0 if listed else x)
    assert log_det is not None
    return y, log_det.to(x.dtype)


@functools.lru_cache(64)
@torch.inference_mode(False)  # it is used outside too
def _linear(tails: tuple[str, ...], device: torch.device) -> Tensor:
    """Which features have linear tails, [D, 1, 1]. Copied to the device once: a copy at every call would wait."""
    return torch.tensor([kind == "linear" for kind in tails], device=device)[:, None, None]


def _with_ends(params: Tensor, linear: Tensor, spline: Spline) -> Tensor:
    """params [B, D, 3 K + 1] with slope 1 at both ends of linear features, and equal slopes at those of others."""
    one = math.log(math.expm1(1 - spline.min_derivative))
    planes = params.permute(1, 2, 0)
    sizes, first, inner, _ = planes.split((2 * spline.bins, 1, spline.bins - 1, 1), 1)
    ends = torch.where(linear, one, first)
    return cat([sizes, ends, inner, ends], 1).permute(2, 0, 1)


def apply_own_spline(owner: Any, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, log_det) of the kept features x by a PiecewiseRationalQuadraticCDF."""
    widths = owner.unnormalized_widths
    params = cat([widths, owner.unnormalized_heights, owner.unnormalized_derivatives], -1)[None]
    return apply_spline(owner, curve_for(owner, widths.shape[-1], 1.0, x), x, params, inverse)
