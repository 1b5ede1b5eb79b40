"""The raw op rq_spline in plain torch for a CPU: forward, inverse and the backward of both.

Inside, values are [D, b] and parameters [D, P, b]: each bin is a plane of contiguous values, so that every
operation is a long one, and no table is gathered as a whole. b rows are taken at a time, few enough for the cache.
With A = d_k + t (s - d_k), B = s + t (d_{k+1} - s) and base = s + e q (see ``rq_spline`` for the other names)

    y = y_k + H t A / base      dy/dx = (s / base)^2 M,  M = A + t (B - A)

The backward: let g = dL/dy and h = dL/d log_det. With l = log dy/dx of the forward map, a parameter p receives

    forward   g y_p + h l_p        inverse   a y_p + c l_p,  c = -h,  a = -(g + c l_x) / y_x,  and dL/dy = -a

because the inverse x(y, p) has x_p = -y_p / y_x. The raw width of bin j receives, with the fractions f of the bins,

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

_AT_ONCE = 1 << 14
"""Values of x in a part: with 8 bins its planes are 1.5 MiB in fp32. Measured on an AMD EPYC: half as many cost
20%, twice as many 15%."""


class _Tables(NamedTuple):
    """The bins of widths (axis 0) and heights (axis 1).

    fractions [D, 2, K, b or 1]: softmax over the bins
    bins [D, 2, 2, K, b or 1]: their sizes, then their starts x_k, y_k
    slopes [D, K + 1, b or 1]: raw derivatives at all knots
    """

    fractions: Tensor
    bins: Tensor
    slopes: Tensor


class _Bin(NamedTuple):
    """The bin of each value: numbers in [D, b], and the formula's common terms.

    index: int64 [D, 1, b]; below [D, K, b]: 1 for the bins before this one
    raw, slopes [D, 2, b]: derivatives at the bin's two knots, raw (with the offset) and d_k, d_{k+1}
    """

    inside: Tensor
    index: Tensor
    below: Tensor
    raw: Tensor
    slopes: Tensor
    w: Tensor
    x_k: Tensor
    h: Tensor
    y_k: Tensor
    s: Tensor
    e: Tensor
    t: Tensor
    q: Tensor
    base: Tensor
    A: Tensor
    B: Tensor
    M: Tensor


def plain(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor | None]:
    """The raw op in plain torch; not differentiable."""
    spline, inverse, log_det = Spline(*constants[:-2]), constants[-2], constants[-1]
    y, total = x.new_empty(x.shape), x.new_empty(x.shape[0] if log_det else 0, dtype=_wide(x, params))
    for rows, value, tables, _ in _parts(x, params, spline):
        found = _find(value, tables, spline, inverse)
        if inverse:
            out = torch.addcmul(found.x_k, found.t, found.w)
        else:
            out = torch.addcdiv(found.y_k, (found.t * found.A).mul_(found.h), found.base)
        y[rows] = torch.where(found.inside, out, value).t()
        if log_det:
            ratio = found.s / found.base
            logs = ratio.mul_(ratio).mul_(found.M).log_().mul_(found.inside).sum(0)
            total[rows] = logs.neg_() if inverse else logs
    return y, total


def _wide(x: Tensor, params: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32)


def _parts(x: Tensor, params: Tensor, spline: Spline) -> Iterator[tuple[slice, Tensor, _Tables, Tensor]]:
    """(rows, their values [D, b], tables, parameters [D, P, b], or [D, P, 1] for all rows) in turn."""
    columns, planes, wide = x.t(), params.permute(1, 2, 0), _wide(x, params)
    shared = params.shape[0] != x.shape[0]
    if shared:
        planes = planes.to(wide)
        tables = _tables(planes, spline)
    n = max(1, _AT_ONCE // max(1, x.shape[1]))
    for first in range(0, x.shape[0], n):
        rows = slice(first, first + n)
        part = planes if shared else planes[..., rows].to(wide)
        yield rows, columns[:, rows].to(wide).contiguous(), tables if shared else _tables(part, spline), part


def _tables(planes: Tensor, spline: Spline) -> _Tables:
    bins, (n, _, b) = spline.bins, planes.shape
    raw = planes[:, : 2 * bins].reshape(n, 2, bins, b)
    if spline.soft_clip:
        raw = raw / _clipper(raw, math.log(spline.min_derivative) / 2)
    if spline.temperature != 1.0:
        raw = raw / spline.temperature
    fractions = torch.softmax(raw, 2)
    steps, matrix = _affine(spline, planes.dtype)
    # One product for both: cumsum along planes takes longer.
    both = torch.matmul(matrix, fractions) if n * b else fractions.new_empty(n, 2, 2 * bins, b)
    return _Tables(fractions, both.add_(steps).unflatten(2, (2, bins)), _all_slopes(planes, spline))


def _clipper(raw: Tensor, bound: float) -> Tensor:
    """1 + |u / c|, which divides u."""
    return raw.abs().div_(abs(bound)).add_(1)


@functools.lru_cache(64)
def _affine(spline: Spline, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(steps [2, 2 K, 1], matrix [2, 2 K, K]) with matrix fractions + steps = sizes, then starts."""
    bins, length = spline.bins, spline.high - spline.low
    eye = torch.eye(bins, dtype=torch.float64)
    before = torch.cat((eye, torch.ones_like(eye).tril(-1)))
    offset = torch.cat((torch.zeros_like(eye[0]), torch.full_like(eye[0], spline.low)))[:, None]
    least = [length * fraction for fraction in (spline.min_width, spline.min_height)]
    steps = torch.stack([before.sum(1, keepdim=True) * size + offset for size in least])
    return steps.to(dtype), torch.stack([before * (length - bins * size) for size in least]).to(dtype)


def _all_slopes(planes: Tensor, spline: Spline) -> Tensor:
    """Raw derivatives at all knots; at the ends of linear tails, the one whose derivative is 1."""
    raw, kind = planes[:, 2 * spline.bins :], TAILS[spline.tails]
    if kind == "circular":
        return torch.cat((raw, raw[:, :1]), 1)
    if kind == "linear":
        one = 0.0 if spline.soft_clip else unit_derivative(spline.min_derivative) - spline.offset
        end = raw.new_full((), one).expand(raw.shape[0], 1, raw.shape[2])
        return torch.cat((end, raw, end), 1)
    return raw


def unit_derivative(min_derivative: float) -> float:
    """The raw value w whose derivative min_derivative + softplus(w) is 1."""
    return math.log(math.expm1(1 - min_derivative))


def _find(value: Tensor, tables: _Tables, spline: Spline, inverse: bool) -> _Bin:
    """The bins of values [D, b], the positions t in them, and the formula's terms."""
    (n, b), bins, axis = value.shape, spline.bins, int(inverse)
    at = value.clamp(spline.low, spline.high)
    inside = at == value
    below = at.new_zeros(n, bins, b)
    torch.ge(at.unsqueeze(1), tables.bins[:, axis, 1, 1:], out=below[:, :-1])
    index = below.sum(1, keepdim=True).long()
    of_all = index[:, None, None].expand(n, 2, 2, 1, b)
    w, x_k, h, y_k = tables.bins.expand(n, 2, 2, bins, b).gather(3, of_all).view(n, 4, b).unbind(1)
    raw = tables.slopes.expand(n, bins + 1, b).gather(1, torch.cat((index, index + 1), 1))
    raw = raw.add_(spline.offset) if spline.offset else raw
    slopes = _slopes(raw, spline)
    d_0, d_1 = slopes.unbind(1)
    s = h / w
    e = (d_0 + d_1).sub_(s, alpha=2)
    if inverse:
        z = at.sub_(y_k)
        bent = z * e
        b_2, c_2 = (h * d_0).sub_(bent), z.mul_(s).mul_(2)  # b and -2 c
        root = torch.addcmul(b_2 * b_2, bent.addcmul_(h, s - d_0), c_2, value=2).clamp_min_(0).sqrt_()
        t = c_2.div_(root.add_(b_2))
    else:
        t = at.sub_(x_k).div_(w)
    t.clamp_(0, 1)
    q = torch.addcmul(t, t, t, value=-1)
    A, B = torch.lerp(d_0, s, t), torch.lerp(s, d_1, t)
    base = torch.addcmul(s, e, q)
    return _Bin(inside, index, below, raw, slopes, w, x_k, h, y_k, s, e, t, q, base, A, B, torch.lerp(A, B, t))


def _slopes(raw: Tensor, spline: Spline) -> Tensor:
    """Derivatives from raw ones."""
    if spline.soft_clip:
        return (raw / _clipper(raw, math.log(spline.min_derivative))).exp_()
    return F.softplus(raw).add_(spline.min_derivative)


def plain_backward(
    x: Tensor, params: Tensor, grad: Tensor | None, grad_log_det: Tensor | None, *arguments: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and params."""
    *constants, inverse, _, needs = arguments
    spline, wide = Spline(*constants), _wide(x, params)
    shared = params.shape[0] != x.shape[0]
    grad_x, shape = x.new_empty(x.shape), (*params.shape[1:], params.shape[0])
    grad_planes = params.new_zeros(shape, dtype=wide) if shared else params.new_empty(shape)
    for rows, value, tables, planes in _parts(x, params, spline):
        found = _find(value, tables, spline, inverse)
        g = None if grad is None else grad.t()[:, rows].to(wide)
        h = None if grad_log_det is None else grad_log_det[rows].to(wide)
        of_value, *of_bin = _pulled(found, g, h, inverse)
        grad_x[rows] = of_value.t()
        if needs[1]:
            _add_or_store(grad_planes, rows, shared, found, tables, planes, of_bin, spline)
    of_params = grad_planes.permute(2, 0, 1).to(params.dtype)
    return (grad_x if needs[0] else None), (of_params if needs[1] else None)


def _pulled(
    found: _Bin, g: Tensor | None, h: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the values [D, b], of the bins' starts and sizes and of the slopes, [D, 2, b] each."""
    inside, w, s, e, t, q, A, B, M = (
        found.inside, found.w, found.s, found.e, found.t, found.q, found.A, found.B, found.M,
    )  # fmt: skip
    over = found.base.reciprocal()
    y_x = (s * over).square_().mul_(M)
    half_l_t = ((B - A) / M).sub_((1 - 2 * t).mul_(e).mul_(over))
    g = torch.zeros_like(t) if g is None else g
    c = (inside if h is None else inside * h) * (-2.0 if inverse else 2.0)  # of half of l
    c = torch.zeros_like(t) if h is None else c
    a = torch.addcdiv(g, c * half_l_t, w).div_(y_x).neg_() if inverse else g
    a_in = a * inside
    of_t = (a_in * y_x).mul_(w).addcmul_(c, half_l_t)
    q_over, straight = q * over, (1 - 2 * q).mul_(over)
    top = (t * A).mul_(over)  # (y - y_k) / H
    per = (a_in * found.h).mul_(over)
    c_over_M = c / M
    of_s = per * (t * t).addcmul_(top, 1 - 2 * q, value=-1)
    of_s.add_((1 / s).sub_(straight).mul_(c)).addcmul_(c_over_M, q)
    of_q = q_over * c
    rest = 1 - t
    of_d0 = (per * q).mul_(1 - top).addcmul_(c_over_M, rest.mul_(rest), value=0.5).sub_(of_q)
    of_d1 = (c_over_M * t).mul_(t).mul_(0.5).sub_(of_q).addcmul_(per * q, top, value=-1)
    of_value = torch.where(inside, a.neg() if inverse else of_t / w, g)
    of_start = torch.stack((-of_t / w, a_in), 1)
    of_size = torch.stack((-(of_t * t).addcmul_(of_s, s) / w, (a_in * top).addcdiv_(of_s, w)), 1)
    return of_value, of_start, of_size, torch.stack((of_d0, of_d1), 1)


def _add_or_store(
    into: Tensor, rows: slice, shared: bool, found: _Bin, tables: _Tables, planes: Tensor, of_bin: list[Tensor],
    spline: Spline,
) -> None:  # fmt: skip
    """The raw parameters' gradients, written to ``into`` [D, P, B], or added up in [D, P, 1]."""
    bins, (of_start, of_size, of_slopes) = spline.bins, of_bin
    sizes = _of_sizes(found, tables, of_start, of_size, spline)
    if spline.soft_clip:
        raw = planes[:, : 2 * bins].reshape(sizes.shape[:3] + planes.shape[2:])
        clipper = _clipper(raw, math.log(spline.min_derivative) / 2)
        sizes.div_(clipper).div_(clipper)
    for first, part in ((0, sizes.flatten(1, 2)), (2 * bins, _of_slopes(found, of_slopes, spline))):
        planes_of = into[:, first : first + part.shape[1]]
        if shared:
            planes_of += part.sum(-1, keepdim=True)
        else:
            planes_of[..., rows] = part


def _of_sizes(found: _Bin, tables: _Tables, of_start: Tensor, of_size: Tensor, spline: Spline) -> Tensor:
    """The gradients of the raw widths and heights, [D, 2, K, b]."""
    (n, _, b), bins, length = of_start.shape, spline.bins, spline.high - spline.low
    fractions = tables.fractions
    index = found.index.unsqueeze(1).expand(n, 2, 1, b)
    scale = [length * (1 - least * bins) / spline.temperature for least in (spline.min_width, spline.min_height)]
    for axis, factor in enumerate(scale):
        of_start[:, axis] *= factor
        of_size[:, axis] *= factor
    sizes = found.below.unsqueeze(1) * of_start.unsqueeze(2)
    sizes.scatter_add_(2, index, of_size.unsqueeze(2))
    sizes.mul_(fractions)
    return torch.addcmul(sizes, fractions, sizes.sum(2, keepdim=True), value=-1)


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
