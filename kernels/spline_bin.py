"""The formulas of a rational-quadratic spline and of its gradient for one value per lane, as @triton.jit helpers.

Raw parameters are tuples of vectors (see spline_planes.py). ``bounds`` is (l, L m_w, L (1 - m_w K), L m_h,
L (1 - m_h K)); kernels/rq_spline.py explains the names.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import exp, sigmoid, softplus
from .spline_planes import appended
from .spline_spec import TAILS

LINEAR = tl.constexpr(TAILS.index("linear"))
CIRCULAR = tl.constexpr(TAILS.index("circular"))


@triton.jit
def _clipper(raw, over_bound):
    """1 + |u / c|, which divides u."""
    return 1.0 + tl.abs(raw) * over_bound


@triton.jit
def exponentials(raw, sharpness, over_bound, BINS: tl.constexpr, SOFT_CLIP: tl.constexpr):
    """(e_j of each bin, 1 / their sum)."""
    if SOFT_CLIP:
        clipped = ()
        for j in tl.static_range(BINS):
            clipped = appended(clipped, raw[j] / _clipper(raw[j], 2.0 * over_bound))
        raw = clipped
    most = raw[0]
    for j in tl.static_range(1, BINS):
        most = tl.where(raw[j] > most, raw[j], most)
    terms = ()
    total = tl.zeros_like(most)
    for j in tl.static_range(BINS):
        term = tl.exp2((raw[j] - most) * sharpness)
        terms = appended(terms, term)
        total += term
    return terms, 1.0 / total


@triton.jit
def bin_of(value, e_u, over_u, e_v, over_v, knots, bounds, BINS: tl.constexpr, INVERSE: tl.constexpr):
    """(number k of the value's bin; its f and their sum before it, of widths, heights; its raw derivatives)."""
    low, least_w, scale_w, least_h, scale_h = bounds
    k = tl.zeros(value.shape, tl.int32)
    e_w, e_h, raw_0, raw_1 = e_u[0], e_v[0], knots[0], knots[1]
    before_w = tl.zeros_like(value)
    before_h = tl.zeros_like(value)
    sum_w = before_w
    sum_h = before_h
    for j in tl.static_range(1, BINS):
        sum_w += e_u[j - 1]
        sum_h += e_v[j - 1]
        if INVERSE:
            start = (low + j * least_h) + sum_h * (over_v * scale_h)
        else:
            start = (low + j * least_w) + sum_w * (over_u * scale_w)
        passed = value >= start
        k = tl.where(passed, j, k)
        e_w = tl.where(passed, e_u[j], e_w)
        e_h = tl.where(passed, e_v[j], e_h)
        before_w = tl.where(passed, sum_w, before_w)
        before_h = tl.where(passed, sum_h, before_h)
        raw_0 = tl.where(passed, knots[j], raw_0)
        raw_1 = tl.where(passed, knots[j + 1], raw_1)
    return k, e_w * over_u, before_w * over_u, e_h * over_v, before_h * over_v, raw_0, raw_1


@triton.jit
def _slope(raw, options, SOFT_CLIP: tl.constexpr):
    """A derivative from a raw one; options: the least one, 1 / c, and the number that is added to raw ones."""
    min_derivative, over_bound, offset = options
    if SOFT_CLIP:
        slope = exp(raw / _clipper(raw, over_bound))
    else:
        slope = min_derivative + softplus(raw + offset)
    return slope


@triton.jit
def slopes_of(found, options, BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr):
    """d_k and d_{k+1}; 1 at the ends of linear tails."""
    d_0 = _slope(found[5], options, SOFT_CLIP)
    d_1 = _slope(found[6], options, SOFT_CLIP)
    if TAILS == LINEAR:
        d_0 = tl.where(found[0] == 0, 1.0, d_0)
        d_1 = tl.where(found[0] == BINS - 1, 1.0, d_1)
    return d_0, d_1


@triton.jit
def transformed(value, found, slopes, bounds, INVERSE: tl.constexpr):
    """(y, or x where INVERSE; the formula's terms: w, h, s, e, t, q, 1 / base, A, B, M)."""
    low, least_w, scale_w, least_h, scale_h = bounds
    k, f_w, before_w, f_h, before_h, _, _ = found
    d_0, d_1 = slopes
    w = least_w + scale_w * f_w
    h = least_h + scale_h * f_h
    x_k = (low + k * least_w) + before_w * scale_w
    y_k = (low + k * least_h) + before_h * scale_h
    s = h / w
    e = d_0 + d_1 - 2.0 * s
    if INVERSE:
        z = value - y_k
        b = h * d_0 - z * e
        a = h * s - b
        c = s * z
        root = b * b + 4.0 * a * c
        root = tl.sqrt(tl.where(root < 0.0, 0.0, root))
        t = tl.where(b < 0.0, root - b, 2.0 * c) / tl.where(b < 0.0, 2.0 * a, b + root)  # sums that do not cancel
    else:
        t = (value - x_k) / w
    t = tl.where(t < 0.0, 0.0, tl.where(t > 1.0, 1.0, t))
    rest = 1.0 - t
    q = t * rest
    over_base = 1.0 / (s + e * q)
    A = d_0 * rest + s * t
    B = s * rest + d_1 * t
    M = A * rest + B * t
    if INVERSE:
        out = x_k + t * w
    else:
        out = y_k + h * t * A * over_base
    return out, (w, h, s, e, t, q, over_base, A, B, M)


@triton.jit
def log_slope(terms):
    """log dy/dx of the spline, in whichever direction it ran."""
    ratio = terms[2] * terms[6]
    return tl.log(ratio * ratio * terms[9])


@triton.jit
def pulled(g, h, inside, terms, INVERSE: tl.constexpr):
    """The gradients of the value; of the bin's x_k, w, y_k, h; of d_k, d_{k+1}; from those of y and log|det|."""
    w, height, s, e, t, q, over_base, A, B, M = terms
    ratio = s * over_base
    y_x = ratio * ratio * M
    half_l_t = (B - A) / M - (1.0 - 2.0 * t) * e * over_base
    c = tl.where(inside, (-2.0 if INVERSE else 2.0) * h, 0.0)  # of half of log dy/dx
    a = g
    if INVERSE:
        a = -(g + c * half_l_t / w) / y_x
    a_in = tl.where(inside, a, 0.0)
    of_t = a_in * y_x * w + c * half_l_t
    top = t * A * over_base  # (y - y_k) / h
    per = a_in * height * over_base
    straight = 1.0 - 2.0 * q
    c_over_M = c / M
    of_s = per * (t * t - straight * top) + c * (1.0 / s - straight * over_base) + c_over_M * q
    of_q = q * over_base * c
    of_d_0 = per * q * (1.0 - top) + 0.5 * c_over_M * (1.0 - t) * (1.0 - t) - of_q
    of_d_1 = 0.5 * c_over_M * t * t - of_q - per * q * top
    of_value = tl.where(inside, -a if INVERSE else of_t / w, g)
    return of_value, -of_t / w, -(of_t * t + of_s * s) / w, a_in, a_in * top + of_s / w, of_d_0, of_d_1


@triton.jit
def of_sizes(
    raw, terms, over, k, f, before, of_start, of_size, factor, over_bound,
    BINS: tl.constexpr, SOFT_CLIP: tl.constexpr,
):  # fmt: skip
    """The gradients of the raw sizes of all bins, from those of the bin's start and size; factor: dW / df / T."""
    factor *= over
    mean = of_start * before + of_size * f
    below = (of_start - mean) * factor
    here = (of_size - mean) * factor
    above = -mean * factor
    gradients = ()
    for j in tl.static_range(BINS):
        gradient = terms[j] * tl.where(k > j, below, tl.where(k == j, here, above))
        if SOFT_CLIP:
            clipper = _clipper(raw[j], 2.0 * over_bound)
            gradient = gradient / (clipper * clipper)
        gradients = appended(gradients, gradient)
    return gradients


@triton.jit
def of_slopes(
    found, slopes, of_d_0, of_d_1, options, BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr
):
    """The gradients of all raw derivatives, from those of d_k and d_{k+1}."""
    k = found[0]
    of_0 = of_d_0 * _slope_derivative(found[5], slopes[0], options, SOFT_CLIP)
    of_1 = of_d_1 * _slope_derivative(found[6], slopes[1], options, SOFT_CLIP)
    first: tl.constexpr = 1 if TAILS == LINEAR else 0
    gradients = ()
    for j in tl.static_range(first, first + BINS - 1 + TAILS):
        gradient = tl.where(k == j, of_0, tl.where(k == j - 1, of_1, 0.0))
        if TAILS == CIRCULAR and j == 0:
            gradient += tl.where(k == BINS - 1, of_1, 0.0)
        gradients = appended(gradients, gradient)
    return gradients


@triton.jit
def _slope_derivative(raw, slope, options, SOFT_CLIP: tl.constexpr):
    """The derivative of ``_slope``."""
    _, over_bound, offset = options
    if SOFT_CLIP:
        clipper = _clipper(raw, over_bound)
        derivative = slope / (clipper * clipper)
    else:
        derivative = sigmoid(raw + offset)
    return derivative
