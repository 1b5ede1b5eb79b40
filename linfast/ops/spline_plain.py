"""The raw op rq_spline in plain torch for a CPU: forward, inverse and the backward of both.

Inside, values are [D, b] and parameters [D, P, b]: each bin is a plane of contiguous values, so that every
operation is a long one, and no table is gathered as a whole. b rows are taken at a time, few enough for the cache.

The backward, in the notation of ``rq_spline``. Let g = dL/dy and h = dL/d log_det of the forward map. Every partial
derivative of y and of l = log dy/dx with respect to a parameter p enters as

    forward   g y_p + h l_p        inverse   a y_p + c l_p,  c = -h,  a = -(g + c l_x) / y_x       (then dL/dy = -a)

because the inverse x(y, p) has x_p = -y_p / y_x. A raw width of bin j receives, with the fraction f_j of its bin,

    f_j (G_x [j < k] + G_w [j = k] - sum_i f_i (G_x [i < k] + G_w [i = k])) L (1 - m_w K) / T

where G_x and G_w are the gradients of the bin's start x_k and of its size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.spline_spec import TAILS, Spline

_AT_ONCE = 1 << 13
"""Values of x in a part: with 8 bins its planes are 0.8 MiB in fp32 (1 MiB of L2 per core, AMD EPYC)."""


class _Tables(NamedTuple):
    """The bins of widths (axis 0) and heights (axis 1): their fractions of the interval.

    fractions, ends [D, 2, K, b or 1]: softmax over the bins, and its cumulative sums.
    slopes: raw derivatives at all K + 1 knots, [D, K + 1, b or 1]
    """

    fractions: Tensor
    ends: Tensor
    slopes: Tensor


class _Bin(NamedTuple):
    """The bin of each value, all [D, b] or, with both axes, [D, 2, b]; positions are distances from the left end.

    below: [D, K, b], 1 for the bins before this one; index: its number, int64 [D, 1, b]
    fraction, before: of the interval by the softmax: this bin's, and that of all bins before it
    size, start: width and height; x_k and y_k
    raw, slopes: derivatives at the bin's two knots, raw and d_k, d_{k+1}
    """

    inside: Tensor
    below: Tensor
    index: Tensor
    fraction: Tensor
    before: Tensor
    size: Tensor
    start: Tensor
    raw: Tensor
    slopes: Tensor
    t: Tensor


def plain(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor | None]:
    """The raw op in plain torch; not differentiable."""
    spline, inverse, log_det = Spline(*constants[:-2]), constants[-2], constants[-1]
    wide = torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32)
    y, total = x.new_empty(x.shape), x.new_empty(x.shape[0] if log_det else 0, dtype=wide)
    for rows, value, planes in _parts(x, params, wide):
        found = _find(value, _tables(planes, spline), spline, inverse)
        s, e, q, base = _terms(found)
        if inverse:
            out = torch.addcmul(found.start[:, 0], found.t, found.size[:, 0])
        else:
            top = torch.addcmul(found.t * found.t * s, found.slopes[:, 0], q)
            out = torch.addcmul(found.start[:, 1], top.div_(base), found.size[:, 1])
        y[rows] = torch.where(found.inside, out.add_(spline.low), value).t()
        if log_det:
            ratio = s / base
            logs = _slope_sum(found, s, q).mul_(ratio).mul_(ratio).log_().mul_(found.inside)
            total[rows] = logs.sum(0).neg_() if inverse else logs.sum(0)
    return y, total


def _parts(x: Tensor, params: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their values [D, b], their parameters [D, P, b], or [D, P, 1] for all rows) in turn."""
    columns, planes = x.t(), params.permute(1, 2, 0)
    shared = params.shape[0] != x.shape[0]
    n = max(1, _AT_ONCE // max(1, x.shape[1]))
    for first in range(0, x.shape[0], n):
        rows = slice(first, first + n)
        part = planes if shared else planes[..., rows]
        yield rows, columns[:, rows].to(wide).contiguous(), part.to(wide).contiguous()


def _tables(planes: Tensor, spline: Spline) -> _Tables:
    bins = spline.bins
    raw = planes[:, : 2 * bins].unflatten(1, (2, bins))
    if spline.soft_clip:
        raw = raw / _clipper(raw, math.log(spline.min_derivative) / 2)
    if spline.temperature != 1.0:
        raw = raw / spline.temperature
    fractions = torch.softmax(raw, 2)
    # A product, because cumsum along planes takes twice as long.
    return _Tables(fractions, torch.matmul(_lower(bins, planes.dtype), fractions), _all_slopes(planes, spline))


def _clipper(raw: Tensor, bound: float) -> Tensor:
    """1 + |u / c|, which divides u."""
    return raw.abs().div_(abs(bound)).add_(1)


@functools.lru_cache(64)
def _lower(bins: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(bins, bins, dtype=dtype).tril_()


def _all_slopes(planes: Tensor, spline: Spline) -> Tensor:
    """Raw derivatives at all knots; at the ends of linear tails, the one whose derivative is 1."""
    raw, kind = planes[:, 2 * spline.bins :], TAILS[spline.tails]
    if kind == "circular":
        return torch.cat((raw, raw[:, :1]), 1)
    if kind == "linear":
        one = 0.0 if spline.soft_clip else math.log(math.expm1(1 - spline.min_derivative))
        return F.pad(raw, (0, 0, 1, 1), value=one)
    return raw


def _find(value: Tensor, tables: _Tables, spline: Spline, inverse: bool) -> _Bin:
    """The bins of values [D, b], and the positions t in them."""
    fractions, ends, all_slopes = tables
    (n, b), bins, length = value.shape, spline.bins, spline.high - spline.low
    scale, least = _affine(spline, value.dtype)
    inside = (value >= spline.low) & (value <= spline.high)
    at = value.clamp(spline.low, spline.high).sub_(spline.low)
    below = at.new_zeros(n, bins, b)
    axis = int(inverse)
    knots = torch.add(_steps(spline, axis, at.dtype), ends[:, axis, :-1], alpha=_scales(spline)[axis])
    torch.ge(at.unsqueeze(1), knots, out=below[:, :-1])
    count = below.sum(1)
    index = count.long().unsqueeze(1)
    both = index.unsqueeze(1).expand(n, 2, 1, b)
    fraction = fractions.expand(n, 2, bins, b).gather(2, both).squeeze(2)
    before = ends.expand(n, 2, bins, b).gather(2, both).squeeze(2).sub_(fraction)
    size = torch.addcmul(least, fraction, scale)
    start = torch.addcmul(before * scale, count.unsqueeze(1), least)
    raw = all_slopes.expand(n, bins + 1, b).gather(1, torch.cat((index, index + 1), 1))
    found = _Bin(inside, below, index, fraction, before, size, start, raw, _slopes(raw, spline), at)
    return found._replace(t=_position(found, axis))


def _scales(spline: Spline) -> tuple[float, float]:
    """The lengths, of widths and of heights, that the softmax shares out: L (1 - m K)."""
    length = spline.high - spline.low
    return tuple(length * (1 - least * spline.bins) for least in (spline.min_width, spline.min_height))  # type: ignore[return-value]


@functools.lru_cache(64)
def _affine(spline: Spline, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(L (1 - m K), L m) [2, 1]: what fractions are multiplied by, and the least size of a bin."""
    length = spline.high - spline.low
    least = [[length * least] for least in (spline.min_width, spline.min_height)]
    return torch.tensor(_scales(spline), dtype=dtype)[:, None], torch.tensor(least, dtype=dtype)


@functools.lru_cache(64)
def _steps(spline: Spline, axis: int, dtype: torch.dtype) -> Tensor:
    """[K - 1, 1], the least distances of the inner knots from the left end."""
    least = (spline.high - spline.low) * (spline.min_width, spline.min_height)[axis]
    return torch.arange(1, spline.bins, dtype=dtype).mul_(least)[:, None]


def _slopes(raw: Tensor, spline: Spline) -> Tensor:
    """Derivatives from raw ones."""
    if spline.soft_clip:
        return (raw / _clipper(raw, math.log(spline.min_derivative))).exp_()
    return F.softplus(raw).add_(spline.min_derivative)


def _position(found: _Bin, axis: int) -> Tensor:
    """t in [0, 1], of values at distance ``found.t`` from the left end."""
    rest, (w, h) = found.t - found.start[:, axis], found.size.unbind(1)
    if axis == 0:
        return rest.div_(w).clamp_(0, 1)
    d_0, d_1 = found.slopes.unbind(1)
    s = h / w
    bent = (d_0 + d_1).sub_(s, alpha=2).mul_(rest)
    a, b = torch.addcmul(bent, h, s - d_0), (h * d_0).sub_(bent)
    c = rest.mul_(s).mul_(2)  # -2 c of the formula
    root = torch.addcmul(b * b, a, c, value=2).clamp_min_(0).sqrt_()
    return c.div_(root.add_(b)).clamp_(0, 1)


def _terms(found: _Bin) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s, e, q, s + e q)."""
    s = found.size[:, 1] / found.size[:, 0]
    e = (found.slopes[:, 0] + found.slopes[:, 1]).sub_(s, alpha=2)
    q = torch.addcmul(found.t, found.t, found.t, value=-1)
    return s, e, q, torch.addcmul(s, e, q)


def _slope_sum(found: _Bin, s: Tensor, q: Tensor) -> Tensor:
    """d_{k+1} t^2 + 2 s q + d_k (1 - t)^2."""
    rest = 1 - found.t
    total = torch.addcmul(s * q * 2, found.slopes[:, 0], rest.mul_(rest))
    return total.addcmul_(found.slopes[:, 1], found.t * found.t)


def plain_backward(
    x: Tensor, params: Tensor, grad: Tensor | None, grad_log_det: Tensor | None, *arguments: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and params, which are computed together: ``needs`` is not read."""
    *constants, inverse, _, needs = arguments
    spline = Spline(*constants)
    wide = torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32)
    grad_x = x.new_empty(x.shape)
    grad_planes = params.new_zeros(*params.shape[1:], params.shape[0])
    shared = params.shape[0] != x.shape[0]
    for rows, value, planes in _parts(x, params, wide):
        tables = _tables(planes, spline)
        found = _find(value, tables, spline, inverse)
        zero = torch.zeros_like(value)
        g = zero if grad is None else grad.t()[:, rows].to(wide)
        h = zero if grad_log_det is None else grad_log_det[rows].to(wide).expand_as(value)
        part, of_params = _pulled(found, tables, planes, g, h, spline, inverse)
        grad_x[rows] = part.t()
        if shared:
            grad_planes += of_params.sum(-1, keepdim=True)
        else:
            grad_planes[..., rows] = of_params
    return (grad_x if needs[0] else None), (grad_planes.permute(2, 0, 1) if needs[1] else None)


def _pulled(
    found: _Bin, tables: _Tables, planes: Tensor, g: Tensor, h: Tensor, spline: Spline, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the values [D, b] and of their parameters [D, P, b], from g = dL/dy and h = dL/d log_det."""
    s, e, q, base = _terms(found)
    t, (width, height), (d_0, d_1) = found.t, found.size.unbind(1), found.slopes.unbind(1)
    rest = 1 - t
    slopes = _slope_sum(found, s, q)
    top = torch.addcmul(t * t * s, d_0, q)  # y = y_k + H top / base
    bend = 1 - 2 * t  # dq/dt
    # l = log dy/dx by t and by what it depends on
    l_t = ((d_1 * t - d_0 * rest).add_(s * bend).mul_(2) / slopes).sub_(e * bend / base, alpha=2)
    y_x = (s / base).square_().mul_(slopes)
    if inverse:
        a, c = -(g - h * l_t / width) / y_x, -h
    else:
        a, c = g, h
    inside = found.inside
    a_in, c_in = a * inside, c * inside
    per = a_in * height / (base * base)
    of_t = torch.addcmul(c_in * l_t, a_in, y_x * width)
    two_q = 2 * q
    of_s = per * (t * t * base - top * (1 - two_q)) + c_in * (2 / s + two_q / slopes - 2 * (1 - two_q) / base)
    of_d0 = per * q * (base - top) + c_in * (rest * rest / slopes - two_q / base)
    of_d1 = c_in * (t * t / slopes - two_q / base) - per * q * top
    of_start = torch.stack((-of_t / width, a_in), 1)
    of_size = torch.stack((-(of_t * t + of_s * s) / width, a_in * top / base + of_s / width), 1)
    of_value = torch.where(inside, -a if inverse else of_t / width, g)

    bins = spline.bins
    scale = _affine(spline, g.dtype)[0] / spline.temperature
    of_start, of_size = of_start.mul_(scale), of_size.mul_(scale)
    mean = (of_start * found.before).addcmul_(of_size, found.fraction)
    out = planes.new_empty(*found.below.shape[:1], spline.per_feature, found.below.shape[2])
    sizes = out[:, : 2 * bins].unflatten(1, (2, bins))
    torch.addcmul(mean.neg_().unsqueeze(2), found.below.unsqueeze(1), of_start.unsqueeze(2), out=sizes)
    sizes.scatter_add_(2, found.index.unsqueeze(1).expand(-1, 2, -1, -1), of_size.unsqueeze(2))
    sizes.mul_(tables.fractions)
    if spline.soft_clip:
        clipper = _clipper(planes[:, : 2 * bins].unflatten(1, (2, bins)), math.log(spline.min_derivative) / 2)
        sizes.div_(clipper).div_(clipper)
    out[:, 2 * bins :] = _of_slopes(found, torch.stack((of_d0, of_d1), 1), spline)
    return of_value, out


def _of_slopes(found: _Bin, grad: Tensor, spline: Spline) -> Tensor:
    """The gradients of the raw derivatives, [D, K - 1 .. K + 1, b], from those of d_k and d_{k+1} [D, 2, b]."""
    if spline.soft_clip:
        grad = grad * found.slopes / _clipper(found.raw, math.log(spline.min_derivative)).square_()
    else:
        grad = grad * found.raw.sigmoid()
    bins, kind = spline.bins, TAILS[spline.tails]
    every = grad.new_zeros(grad.shape[0], bins + 1, grad.shape[2])
    every.scatter_(1, torch.cat((found.index, found.index + 1), 1), grad)
    if kind == "linear":
        return every[:, 1:-1]
    if kind == "circular":
        every[:, 0] += every[:, -1]
        return every[:, :-1]
    return every
