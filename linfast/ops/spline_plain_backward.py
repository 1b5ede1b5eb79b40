"""The gradients of rational-quadratic splines in plain torch for a CPU; names as in ``spline_plain``.

Let g = dL/dy and h = dL/d log_det. With l = log dy/dx of the forward map, a parameter v of the bin receives

    forward   a y_v + c l_v,  a = g, c = h        inverse   the same with  c = -h,  a = -(g + c l_x) / y_x

because the inverse x(y, v) has x_v = -y_v / y_x. dL/d input is a y_x + c l_x forward, and -a of the inverse, whose
a y_x + c l_x is -g. With q = t (1 - t), e = d_k + d_{k+1} - 2 s and L_v for a y_v + c l_v:

    L_x = a y_x + c l_x,   l_x = 2 ((B - A) / M - e (1 - 2 t) / base) / W,   L of x_k is -L_x, and of y_k a
    L_d_k     = a H q (1 - p) / base + c ((1 - t)^2 / M - 2 q / base)
    L_d_{k+1} = -a H q p / base + c (t^2 / M - 2 q / base)
    s L_s     = a H q s (d_{k+1} t^2 - d_k (1 - t)^2) / base^2 + 2 c q (s / M + (d_k + d_{k+1}) / base)
    L_W = -t L_x - s L_s / W      L_H = a p + s L_s / H

The raw width of bin j receives, with the fractions f of the bins and the gradients of the bin's start and size,

    f_j (L_x_k [j < k] + L_W [j = k] - sum_i f_i (L_x_k [i < k] + L_W [i = k])) L (1 - m_w K) / T
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.spline_spec import TAILS, Spline
from .spline_plain import Bin, Tables, affine, clipper, columns, find, parts, wide_type


class _Pulled(NamedTuple):
    """Gradients of the values [D, b], and of the starts, sizes and derivatives of their bins, [2, D, b] each."""

    value: Tensor
    starts: Tensor
    sizes: Tensor
    slopes: Tensor


def plain_backward(x: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """The gradients of x and of the three arguments after it, which are as ``plain`` takes them.

    Args:
        x: [B, D].
        arguments: the three, the gradients of y and of log|det| or None, the fields of a Spline, inverse, log_det
            and needs.
    """
    given, (grad, grad_log_det) = arguments[:3], arguments[3:5]
    *options, inverse, _, needs = arguments[5:]
    spline, wide = Spline(*options), wide_type(x, *given)
    of_x, shared = x.new_empty(x.shape), given[0].shape[0] != x.shape[0]
    of_sizes, of_slopes, of_given = _buffers(given[0], given[1] is None, spline, wide, shared)
    with torch.inference_mode():  # calls of torch take a tenth less
        for rows, value, tables in parts(x, given, spline, wide):
            found = find(value, tables, spline, inverse)
            g = torch.zeros_like(value) if grad is None else columns(grad[rows], wide)
            h = value.new_zeros(()) if grad_log_det is None else grad_log_det[rows].to(wide)
            pulled = _pulled(found, g, h, inverse)
            of_x[rows] = pulled.value.t()
            if not any(needs[1:]):
                continue
            if shared:
                part = value.new_empty(*of_sizes.shape[:-1], value.shape[-1])
                of_sizes += _of_sizes(found, tables, pulled, spline, part).sum(-1, keepdim=True)
                of_slopes += _of_slopes(found, pulled.slopes, spline).sum(-1, keepdim=True)
            else:
                _of_sizes(found, tables, pulled, spline, of_sizes[..., rows])
                of_slopes[..., rows] = _of_slopes(found, pulled.slopes, spline)
    pairs = zip(of_given, given, strict=True)
    of_tensors = [None if each is None else each.permute(2, 0, 1).to(like.dtype) for each, like in pairs]
    return tuple([each if need else None for each, need in zip((of_x, *of_tensors), needs, strict=True)])


def _buffers(
    params: Tensor, whole: bool, spline: Spline, wide: torch.dtype, shared: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Buffers for gradients of sizes [2, D, K, B or 1] and slopes [D, n, B or 1], and views as the arguments."""
    (rows, features, _), bins = params.shape, spline.bins
    new = functools.partial(params.new_zeros if shared else params.new_empty, dtype=wide)
    if whole:
        every = new((features, spline.per_feature, rows))
        sizes = every[:, : 2 * bins].unflatten(1, (2, bins)).transpose(0, 1)
        return sizes, every[:, 2 * bins :], (every, None, None)
    sizes, slopes = new((2, features, bins, rows)), new((features, spline.derivatives, rows))
    return sizes, slopes, (*sizes.unbind(), slopes)


def _pulled(found: Bin, g: Tensor, h: Tensor, inverse: bool) -> _Pulled:
    s, t, p, base, M, outside = found.s, found.t, found.p, found.base, found.M, found.outside
    (W, H), (d_0, d_1), rest = found.sizes.unbind(), found.slopes.unbind(), 1 - t
    y_x, both = (s / base).square_().mul_(M), d_0 + d_1
    half_l_x = both.sub(s, alpha=2).mul_(t - rest).div_(base).add_((found.B - found.A).div_(M)).div_(W)

    a, c = g.masked_fill(outside, 0), h.expand_as(t).masked_fill(outside, 0).mul_(-2 if inverse else 2)
    if inverse:
        of_x = -a
        a = torch.addcmul(of_x, c, half_l_x, value=-1).div_(y_x)
        of_value = torch.where(outside, g, -a)
    else:
        of_x = (a * y_x).addcmul_(c, half_l_x)
        of_value = torch.where(outside, g, of_x)

    q = t * rest
    k, m = (a * H).mul_(q).div_(base), c * q
    squares = torch.stack((rest, t)).square_()
    parts = found.slopes * squares
    of_slopes = (c / M).mul_(0.5) * squares
    of_slopes.sub_(torch.addcmul(m / base, k, p))
    of_slopes[0] += k
    s_of_s = (parts[1] - parts[0]).mul_(k).mul_(s).div_(base)
    s_of_s.addcmul_(m, (s / M).addcdiv_(both, base))
    of_starts = torch.stack((-of_x, a))
    of_sizes = s_of_s / found.sizes
    of_sizes[0].neg_()
    of_sizes.addcmul_(of_starts, torch.stack((t, p)))
    return _Pulled(of_value, of_starts, of_sizes, of_slopes)


def _of_sizes(found: Bin, tables: Tables, pulled: _Pulled, spline: Spline, out: Tensor) -> Tensor:
    """The gradients of the raw widths and heights, written to ``out`` [2, D, K, b]."""
    scales = affine(spline, out).scales / spline.temperature
    of_start, of_size = pulled.starts.mul_(scales), pulled.sizes.mul_(scales)
    rest = (of_start * found.before).addcmul_(of_size, found.fractions).neg_()
    of_size, of_start, rest = (each.unsqueeze(2) for each in (of_size.add_(rest), of_start, rest))
    torch.addcmul(rest, found.below, of_start, out=out[:, :, :-1])
    out[:, :, -1:] = rest
    out.scatter_(2, found.number, of_size).mul_(tables.fractions)
    if spline.soft_clip:
        out.div_(clipper(tables.raw, math.log(spline.min_derivative) / 2).square_())
    return out


def _of_slopes(found: Bin, of_ends: Tensor, spline: Spline) -> Tensor:
    """The gradients of the raw derivatives, [D, K - 1 .. K + 1, b], from those of d_k and d_{k+1}."""
    if spline.soft_clip:
        of_ends.mul_(found.slopes).div_(clipper(found.raw, math.log(spline.min_derivative)).square_())
    else:
        of_ends.mul_(found.raw.sigmoid())
    index, (_, n, b) = found.number[0], of_ends.shape
    every = of_ends.new_zeros(n, spline.bins + 1, b)
    every[:, :-1].scatter_(1, index, of_ends[0].unsqueeze(1))
    every[:, 1:].scatter_(1, index, of_ends[1].unsqueeze(1))
    kind = TAILS[spline.tails]
    if kind == "linear":
        return every[:, 1:-1]
    if kind == "circular":
        every[:, 0] += every[:, -1]
        return every[:, :-1]
    return every
