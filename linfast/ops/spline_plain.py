"""Rational-quadratic splines in plain torch for a CPU, in both directions.

Inside, values are [D, b] and parameters of a bin [D, b] too, a plane: each operation is a long one, and no table is
formed per value. b rows are taken at a time, few enough for the cache. Starts of bins are counted from l, the lower
end of the interval. Of the bin of each value (names as in ``rq_spline``) the formulas use

    A = d_k (1 - t) + s t    B = s (1 - t) + d_{k+1} t    base = A t + B (1 - t)    M = A (1 - t) + B t
    p = t A / base           y = y_k + H p                dy/dx = (s / base)^2 M

which are sums of positive terms. The inverse, from p = (y - y_k) / H:

    m = d_k (1 - p) - d_{k+1} p    v = 4 s^2 p (1 - p)    r = sqrt(m^2 + v)    t = 2 s p / (2 s p + m + r)

where m + r is computed as v / (r - m) if m < 0, so that nothing cancels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import has_values
from ..kernels.spline_spec import TAILS, Spline

_AT_ONCE = 320_000
"""Bins of all values of x in a part, per thread. With a quarter as many, torch's calls cost a tenth more."""


class Tables(NamedTuple):
    """The parameters of some rows, in planes; b is 1 where all rows share them.

    raw, fractions [2, D, K, b]: raw widths and heights, and their softmax over the bins
    slopes [D, K + 1, b]: raw derivatives at all knots
    """

    raw: Tensor
    fractions: Tensor
    slopes: Tensor


class Bin(NamedTuple):
    """The bin of each value, [D, b] if not stated otherwise.

    outside: whether the value is outside the interval, or NaN
    below [D, K - 1, b]: 1 for the bins before this one, else 0
    number [2, D, 1, b]: its number, int64
    fractions, before [2, D, b]: its fraction, and the sum of those of the bins before it
    sizes, starts [2, D, b]: W and H; x_k - l and y_k - l
    raw, slopes [2, D, b]: derivatives at its two knots, raw and d
    """

    outside: Tensor
    below: Tensor
    number: Tensor
    fractions: Tensor
    before: Tensor
    sizes: Tensor
    starts: Tensor
    raw: Tensor
    slopes: Tensor
    s: Tensor
    t: Tensor
    p: Tensor
    A: Tensor
    B: Tensor
    base: Tensor
    M: Tensor


def plain(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(y, log|det|) of x [B, D]; not differentiable.

    Args:
        x: [B, D].
        arguments: params [B or 1, D, P], None, None; or raw widths, heights and derivatives. Then the fields of a
            Spline, inverse and log_det.
    """
    given, (*options, inverse, log_det) = arguments[:3], arguments[3:]
    spline, wide = Spline(*options), wide_type(x, *given)
    y, total = x.new_empty(x.shape), x.new_zeros(x.shape[0] if log_det else 0, dtype=wide)
    with torch.inference_mode():  # calls of torch take a tenth less
        for rows, value, tables in parts(x, given, spline, wide):
            out, logs = _transformed(value, tables, spline, inverse, log_det)
            y[rows] = out.t()
            if logs is not None:
                total[rows] = logs
    return y, total


def _transformed(
    value: Tensor, tables: Tables, spline: Spline, inverse: bool, log_det: bool
) -> tuple[Tensor, Tensor | None]:
    """(y [D, b], log|det| [b] or None)."""
    found = find(value, tables, spline, inverse)
    of_out = 0 if inverse else 1
    part = found.t if inverse else found.p
    out = found.starts[of_out].addcmul_(found.sizes[of_out], part).add_(spline.low)
    out = torch.where(found.outside, value, out)
    if not log_det:
        return out, None
    logs = (found.s / found.base).square_().mul_(found.M).log_().masked_fill_(found.outside, 0).sum(0)
    return out, logs.neg_() if inverse else logs


def wide_type(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of all arithmetic: fp32, or float64 where a tensor is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def parts(
    x: Tensor, given: Sequence[Tensor | None], spline: Spline, wide: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tables]]:
    """(rows, their values [D, b], their tables), in parts of about as many rows each."""
    (n_rows, features), known = x.shape, [each for each in given if each is not None]
    if x.numel() == 0:
        return
    shared = known[0].shape[0] != n_rows
    of_all = _tables(known, spline, wide) if shared else None
    most = max(1, torch.get_num_threads() * _AT_ONCE // (features * spline.bins))
    n = -(-n_rows // -(-n_rows // most))
    for first in range(0, n_rows, n):
        rows = slice(first, first + n)
        tables = _tables([each[rows] for each in known], spline, wide) if of_all is None else of_all
        yield rows, columns(x[rows], wide), tables


def columns(rows: Tensor, wide: torch.dtype) -> Tensor:
    """[b, D] as contiguous [D, b]."""
    return rows.to(wide).t().contiguous()


def _tables(given: Sequence[Tensor], spline: Spline, wide: torch.dtype) -> Tables:
    bins, first = spline.bins, given[0].to(wide)
    if len(given) == 1:
        planes = _planes(first)
        raw, slopes = planes[:, : 2 * bins].unflatten(1, (2, bins)).transpose(0, 1), planes[:, 2 * bins :]
    else:
        raw = first.new_empty(2, first.shape[1], bins, first.shape[0])
        for into, rows in zip(raw, given[:2], strict=True):
            _planes(rows.to(wide), into)
        slopes = _planes(given[2].to(wide))
    clipped = raw / clipper(raw, math.log(spline.min_derivative) / 2) if spline.soft_clip else raw
    clipped = clipped if spline.temperature == 1.0 else clipped / spline.temperature
    return Tables(raw, torch.softmax(clipped, 2), _at_all_knots(slopes, spline))


def _planes(rows: Tensor, into: Tensor | None = None) -> Tensor:
    """[b, D, n] as [D, n, b], whose last dimension is contiguous; copied to ``into`` where given."""
    planes = rows.permute(1, 2, 0)
    if planes.stride(2) == 1:
        return planes if into is None else into.copy_(planes)
    if rows.stride(1) < rows.stride(2) and into is None:
        return _planes(rows.transpose(1, 2)).transpose(0, 1)
    into = rows.new_empty(planes.shape) if into is None else into
    into.view(-1, rows.shape[0]).copy_(rows.reshape(rows.shape[0], -1).t())  # torch transposes a matrix in blocks
    return into


def clipper(raw: Tensor, bound: float) -> Tensor:
    """1 + |u / c|, which divides u."""
    return raw.abs().div_(abs(bound)).add_(1)


class Affine(NamedTuple):
    """Sizes of bins, scales f + least, from their fractions f; with knots @ f the bins' ends, but the last one's.

    scales, least [2, 1, 1]; knots [2, 1, K - 1, K]; no entry is negative.
    """

    scales: Tensor
    least: Tensor
    knots: Tensor


def affine(spline: Spline, like: Tensor) -> Affine:
    """How fractions, whose sum is 1, become sizes and knots, counted from l, for tensors like this one."""
    make = _affine if has_values(like) else _affine.__wrapped__  # a fake tensor must not be kept
    return make(spline, like.dtype, like.device)


@functools.lru_cache(64)
def _affine(spline: Spline, dtype: torch.dtype, device: torch.device) -> Affine:
    bins, length = spline.bins, spline.high - spline.low
    least = torch.tensor((spline.min_width, spline.min_height), dtype=torch.float64).view(2, 1, 1)
    scales = (1 - least * bins).clamp_min(0)
    knots = torch.arange(1, bins)[:, None] * least + scales * torch.ones(bins - 1, bins).tril()
    return Affine(*((each * length).to(device, dtype) for each in (scales, least, knots[:, None])))


def _at_all_knots(raw: Tensor, spline: Spline) -> Tensor:
    """Raw derivatives at all knots; at the ends of linear tails, the one whose derivative is 1."""
    kind = TAILS[spline.tails]
    if kind == "circular":
        return torch.cat((raw, raw[:, :1]), 1)
    if kind == "linear":
        end = 0.0 if spline.soft_clip else unit_derivative(spline.min_derivative) - spline.offset
        column = raw.new_full((raw.shape[0], 1, raw.shape[2]), end)
        return torch.cat((column, raw, column), 1)
    return raw


def unit_derivative(min_derivative: float) -> float:
    """The raw value w whose derivative min_derivative + softplus(w) is 1."""
    return math.log(math.expm1(1 - min_derivative))


def find(value: Tensor, tables: Tables, spline: Spline, inverse: bool) -> Bin:
    """The bins of values [D, b], the positions in them, and the formula's terms."""
    (n, b), bins = value.shape, spline.bins
    at = value.clamp(spline.low, spline.high).nan_to_num_(spline.low)  # so that no term is NaN
    outside = at != value
    at.sub_(spline.low)
    scales, least, knots = affine(spline, value)
    axis, below = int(inverse), at.new_empty(n, bins - 1, b)
    # A product: cumsum along planes takes longer.
    torch.ge(at.unsqueeze(1), torch.matmul(knots[axis], tables.fractions[axis]), out=below)
    count = below.sum(1)
    number = count.long().unsqueeze(1).expand(2, n, 1, b)

    fractions = tables.fractions.expand(2, n, bins, b).gather(2, number).squeeze(2)
    before = (below * tables.fractions[:, :, :-1]).sum(2)
    starts = torch.addcmul(count * least, before, scales)
    of_bins = tables.slopes.unfold(1, bins, 1).permute(1, 0, 3, 2)  # [2, D, K, b]: left and right ends
    raw = of_bins.expand(2, n, bins, b).gather(2, number).squeeze(2)
    if not spline.soft_clip and spline.offset:
        raw.add_(spline.offset)
    slopes = _slopes(raw, spline)

    sizes = torch.addcmul(least, fractions, scales)
    (W, H), (x_k, y_k), (d_0, d_1) = sizes.unbind(), starts.unbind(), slopes.unbind()
    s = H / W
    if inverse:
        p = at.sub_(y_k).div_(H).clamp_(0, 1)
        t = _position(p, s, d_0, d_1)
    else:
        t = at.sub_(x_k).div_(W).clamp_(0, 1)
    A, B = torch.lerp(d_0, s, t), torch.lerp(s, d_1, t)
    base, M = torch.lerp(B, A, t), torch.lerp(A, B, t)
    p = p if inverse else (t * A).div_(base)
    return Bin(outside, below, number, fractions, before, sizes, starts, raw, slopes, s, t, p, A, B, base, M)


def _position(p: Tensor, s: Tensor, d_0: Tensor, d_1: Tensor) -> Tensor:
    """t, from p = t A / base."""
    rest = 1 - p
    m, left = (d_0 * rest).addcmul_(d_1, p, value=-1), (s * p).mul_(2)
    v = (s * left).mul_(rest).mul_(2)
    r = torch.addcmul(v, m, m).sqrt_().add_(m.abs())
    return left / torch.where(m < 0, v.div_(r), r).add_(left)


def _slopes(raw: Tensor, spline: Spline) -> Tensor:
    """Derivatives from raw ones."""
    if spline.soft_clip:
        return (raw / clipper(raw, math.log(spline.min_derivative))).exp_()
    return F.softplus(raw).add_(spline.min_derivative)
