"""The rational-quadratic spline of x [B, D] by params [B or 1, D, P]: one launch each way, and one for all gradients.

Parameters u (widths), v (heights), w (derivatives) of a value, K bins of an interval [l, r] of length L. In base 2:

    e_j = 2^((u_j - max u) log2(e) / T)     f_j = e_j / sum e     W_j = L (m_w + (1 - m_w K) f_j)
    x_j = l + L m_w j + L (1 - m_w K) (f_0 + .. + f_{j-1})        heights H_j, y_j likewise, from v
    d_j = m_d + softplus(w_j), or exp of a clipped w_j;           1 at both ends of linear tails

The bin k of x is the last with x_k <= x; only its e, f, w are kept, picked by selects while the starts are summed. With
t = (x - x_k) / W, s = H / W, e = d_k + d_{k+1} - 2 s, q = t (1 - t), base = s + e q, and sums of positive terms

    A = d_k (1 - t) + s t    B = s (1 - t) + d_{k+1} t    M = A (1 - t) + B t
    y = y_k + H t A / base    dy/dx = (s / base)^2 M

The inverse, z = y - y_k: t = 2 s z / (b + sqrt(b^2 + 4 a s z)), a = H (s - d_k) + z e, b = H d_k - z e. t is clamped to
[0, 1] and the root's argument at 0, so that rounding makes no NaN.

The backward computes the bin again, from x or y and the parameters, which alone are saved. linfast/ops/spline_plain.py
derives its formulas; the raw width of bin j receives, with the gradients G_x of the bin's start and G_w of its size,

    f_j (G_x [j < k] + G_w [j = k] - S) L (1 - m_w K) / T,    S = G_x (f_0 + .. + f_{k-1}) + G_w f_k

Bytes per value in fp32: forward 4 (P + 2), P = 3 K - 1 with linear tails: 100 at K = 8; backward 4 (2 P + 3). Operations
forward: about 22 a bin, of which 2 are exponentials on the special function unit, and 120 for the bin that was found.
docs/roofline.md predicts that bytes are the limit.

A program takes rows x features (see spline_planes.py), all features where D fits. log|det| is summed within a row of a
tile by the kernel and over several tiles by torch, and so are the gradients of parameters that all samples share: no
atomics, the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, ceil_div, needs_int64, power_of_two, tile_for
from .math import LOG2E, exp, sigmoid, softplus
from .spline_planes import load_planes, store_planes, swapped, tile_of
from .spline_spec import TAILS, Spline

_LINEAR = tl.constexpr(TAILS.index("linear"))
_CIRCULAR = tl.constexpr(TAILS.index("circular"))

# (most bins, tile). VALUES / (32 num_warps) = 1 value per thread: all its parameters are in registers.
TILES: tuple[tuple[int, Tile], ...] = ((1 << 62, {"VALUES": 128, "num_warps": 4}),)


@triton.jit
def _clipper(raw, over_bound):
    """1 + |u / c|, which divides u."""
    return 1.0 + tl.abs(raw) * over_bound


@triton.jit
def _exponentials(raw, sharpness, over_bound, BINS: tl.constexpr, SOFT_CLIP: tl.constexpr):
    """(e_j of each bin, 1 / their sum)."""
    if SOFT_CLIP:
        clipped = ()
        for j in tl.static_range(BINS):
            clipped = clipped + (raw[j] / _clipper(raw[j], 2.0 * over_bound),)
        raw = clipped
    most = raw[0]
    for j in tl.static_range(1, BINS):
        most = tl.where(raw[j] > most, raw[j], most)
    terms = ()
    total = tl.zeros_like(most)
    for j in tl.static_range(BINS):
        term = tl.exp2((raw[j] - most) * sharpness)
        terms = terms + (term,)
        total += term
    return terms, 1.0 / total


@triton.jit
def _load_tables(
    ptr, stride, inside, inv_temperature, over_bound,
    BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr,
    BINS_LAST: tl.constexpr,
):  # fmt: skip
    """(raw widths, heights and derivatives at all knots; e of widths, 1 / their sum, e of heights, 1 / their sum)."""
    slopes: tl.constexpr = BINS - 1 + TAILS
    u = load_planes(ptr, stride, inside, BINS, LEVELS, N, BINS_LAST)
    v = load_planes(ptr + BINS * stride, stride, inside, BINS, LEVELS, N, BINS_LAST)
    knots = load_planes(ptr + 2 * BINS * stride, stride, inside, slopes, LEVELS, N, BINS_LAST)
    if TAILS == _LINEAR:
        end = tl.zeros_like(u[0])
        knots = (end,) + knots + (end,)
    elif TAILS == _CIRCULAR:
        knots = knots + (knots[0],)
    e_u, over_u = _exponentials(u, inv_temperature * LOG2E, over_bound, BINS, SOFT_CLIP)
    e_v, over_v = _exponentials(v, inv_temperature * LOG2E, over_bound, BINS, SOFT_CLIP)
    return u, v, knots, e_u, over_u, e_v, over_v


@triton.jit
def _slope(raw, min_derivative, over_bound, SOFT_CLIP: tl.constexpr):
    """A derivative from a raw one."""
    if SOFT_CLIP:
        slope = exp(raw / _clipper(raw, over_bound))
    else:
        slope = min_derivative + softplus(raw)
    return slope


@triton.jit
def _slopes(
    k, raw_0, raw_1, min_derivative, over_bound, BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr
):
    """The derivatives at the two knots of bin k; 1 at the ends of linear tails."""
    d_0 = _slope(raw_0, min_derivative, over_bound, SOFT_CLIP)
    d_1 = _slope(raw_1, min_derivative, over_bound, SOFT_CLIP)
    if TAILS == _LINEAR:
        d_0 = tl.where(k == 0, 1.0, d_0)
        d_1 = tl.where(k == BINS - 1, 1.0, d_1)
    return d_0, d_1


@triton.jit
def _slope_derivative(raw, slope, over_bound, SOFT_CLIP: tl.constexpr):
    if SOFT_CLIP:
        clipper = _clipper(raw, over_bound)
        derivative = slope / (clipper * clipper)
    else:
        derivative = sigmoid(raw)
    return derivative


@triton.jit
def _bin_of(
    value, e_u, over_u, e_v, over_v, knots, low, least_w, scale_w, least_h, scale_h,
    BINS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """(number k of the value's bin; its fractions f, and those of the bins before it; raw derivatives at its knots)."""
    k = tl.zeros(value.shape, tl.int32)
    e_w = e_u[0]
    e_h = e_v[0]
    raw_0 = knots[0]
    raw_1 = knots[1]
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
def _spline(
    value, k, f_w, before_w, f_h, before_h, d_0, d_1, low, least_w, scale_w, least_h, scale_h, INVERSE: tl.constexpr
):
    """(y, or x where INVERSE; then the terms of the formula: w, h, s, e, t, q, 1 / base, A, B, M)."""
    w = least_w + scale_w * f_w
    h = least_h + scale_h * f_h
    x_k = (low + k * least_w) + before_w * scale_w
    y_k = (low + k * least_h) + before_h * scale_h
    s = h / w
    e = d_0 + d_1 - 2.0 * s
    if INVERSE:
        z = value - y_k
        b = h * d_0 - z * e
        c = s * z
        root = b * b + 4.0 * (h * (s - d_0) + z * e) * c
        t = 2.0 * c / (b + tl.sqrt(tl.where(root < 0.0, 0.0, root)))
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
    return out, w, h, s, e, t, q, over_base, A, B, M


@triton.jit
def _clamped(x, low, high):
    """(x clamped to the interval, whether it was inside)."""
    return tl.where(x < low, low, tl.where(x > high, high, x)), (x >= low) & (x <= high)


@triton.jit(do_not_specialize=["n_rows", "stride_pb", "stride_pd", "stride_pk"])
def _rq_spline_kernel(
    x_ptr, params_ptr, y_ptr, partial_ptr, n_rows, n_features,
    stride_xb, stride_xd, stride_pb, stride_pd, stride_pk,
    low, high, least_w, scale_w, least_h, scale_h, min_derivative, inv_temperature, over_bound,
    BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr, LEVELS: tl.constexpr,
    INVERSE: tl.constexpr, LOG_DET: tl.constexpr, BINS_LAST: tl.constexpr, SWAPPED: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = ROWS * FEATURES
    row, feature, there, _ = tile_of(n_rows, n_features, ROWS, FEATURES, False, INT64)
    x = tl.load(x_ptr + row * stride_xb + feature * stride_xd, mask=there, other=0.0).to(tl.float32)
    p_row, p_feature, p_there, _ = tile_of(n_rows, n_features, ROWS, FEATURES, SWAPPED, INT64)
    p_at = params_ptr + p_row * stride_pb + p_feature * stride_pd
    _, _, knots, e_u, over_u, e_v, over_v = _load_tables(
        p_at, stride_pk, p_there, inv_temperature, over_bound, BINS, TAILS, SOFT_CLIP, LEVELS, N, BINS_LAST
    )
    value, inside = _clamped(swapped(x, ROWS, FEATURES, SWAPPED), low, high)
    k, f_w, before_w, f_h, before_h, raw_0, raw_1 = _bin_of(
        value, e_u, over_u, e_v, over_v, knots, low, least_w, scale_w, least_h, scale_h, BINS, INVERSE
    )
    d_0, d_1 = _slopes(k, raw_0, raw_1, min_derivative, over_bound, BINS, TAILS, SOFT_CLIP)
    out, _, _, s, _, _, _, over_base, _, _, M = _spline(
        value, k, f_w, before_w, f_h, before_h, d_0, d_1, low, least_w, scale_w, least_h, scale_h, INVERSE
    )
    y = tl.where((x >= low) & (x <= high), swapped(out, FEATURES, ROWS, SWAPPED), x)
    tl.store(y_ptr + row * n_features + feature, y.to(y_ptr.dtype.element_ty), mask=there)
    if LOG_DET:
        ratio = s * over_base
        logs = tl.log(ratio * ratio * M)
        logs = tl.where(inside & p_there, -logs if INVERSE else logs, 0.0)
        total = tl.sum(tl.reshape(swapped(logs, FEATURES, ROWS, SWAPPED), [ROWS, FEATURES]), 1)
        n_tiles = tl.cdiv(n_features, FEATURES)
        block = tl.program_id(0) // n_tiles
        at = block * ROWS + tl.arange(0, ROWS)
        tile = tl.program_id(0) - block * n_tiles
        if INT64:
            at = at.to(tl.int64)
        tl.store(partial_ptr + at * n_tiles + tile, total, mask=at < n_rows)


@triton.jit
def _pulled(g, h, inside, w, height, s, e, t, q, over_base, A, B, M, INVERSE: tl.constexpr):
    """The gradients of the value, of its bin's starts x_k, y_k, of its sizes w, h, and of d_k, d_{k+1}."""
    y_x = (s * over_base) * (s * over_base) * M
    half_l_t = (B - A) / M - (1.0 - 2.0 * t) * e * over_base
    c = tl.where(inside, (-2.0 if INVERSE else 2.0) * h, 0.0)  # of half of log dy/dx
    a = g
    if INVERSE:
        a = -(g + c * half_l_t / w) / y_x
    a_in = tl.where(inside, a, 0.0)
    of_t = a_in * y_x * w + c * half_l_t
    top = t * A * over_base  # (y - y_k) / H
    per = a_in * height * over_base
    straight = 1.0 - 2.0 * q
    c_over_M = c / M
    of_s = per * (t * t - straight * top) + c * (1.0 / s - straight * over_base) + c_over_M * q
    of_q = q * over_base * c
    of_d0 = per * q * (1.0 - top) + 0.5 * c_over_M * (1.0 - t) * (1.0 - t) - of_q
    of_d1 = 0.5 * c_over_M * t * t - of_q - per * q * top
    of_value = tl.where(inside, -a if INVERSE else of_t / w, g)
    return of_value, -of_t / w, a_in, -(of_t * t + of_s * s) / w, a_in * top + of_s / w, of_d0, of_d1


@triton.jit
def _of_sizes(
    terms, over, raw, k, f, before, of_start, of_size, factor, over_bound,
    BINS: tl.constexpr, SOFT_CLIP: tl.constexpr,
):  # fmt: skip
    """The gradients of the raw sizes of all bins."""
    of_start *= factor
    of_size *= factor
    mean = of_start * before + of_size * f
    gradients = ()
    for j in tl.static_range(BINS):
        gradient = terms[j] * over * (tl.where(k > j, of_start, tl.where(k == j, of_size, 0.0)) - mean)
        if SOFT_CLIP:
            clipper = _clipper(raw[j], 2.0 * over_bound)
            gradient = gradient / (clipper * clipper)
        gradients = gradients + (gradient,)
    return gradients


@triton.jit
def _of_slopes(k, of_raw_0, of_raw_1, BINS: tl.constexpr, TAILS: tl.constexpr):
    """The gradients of all raw derivatives."""
    first: tl.constexpr = 1 if TAILS == _LINEAR else 0
    gradients = ()
    for j in tl.static_range(first, first + BINS - 1 + TAILS):
        gradient = tl.where(k == j, of_raw_0, tl.where(k == j - 1, of_raw_1, 0.0))
        if TAILS == _CIRCULAR and j == 0:
            gradient += tl.where(k == BINS - 1, of_raw_1, 0.0)
        gradients = gradients + (gradient,)
    return gradients


@triton.jit
def _store_gradients(
    ptr, stride, planes, there, COUNT: tl.constexpr, LEVELS: tl.constexpr, BINS_LAST: tl.constexpr,
    SHARED: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Write each plane, or, where all samples share the parameters, its sum over the tile's rows."""
    if SHARED:
        there = tl.reshape(there, [ROWS, FEATURES])
        for j in tl.static_range(COUNT):
            total = tl.sum(tl.where(there, tl.reshape(planes[j], [ROWS, FEATURES]), 0.0), 0)
            tl.store(ptr + j * stride, total, mask=tl.sum(there.to(tl.int32), 0) > 0)
    else:
        store_planes(ptr, stride, planes, there, COUNT, LEVELS, ROWS * FEATURES, BINS_LAST)


@triton.jit(do_not_specialize=["n_rows", "stride_pb", "stride_pd", "stride_pk", "stride_qb", "stride_qd", "stride_qk"])
def _rq_spline_backward_kernel(
    x_ptr, params_ptr, grad_ptr, grad_log_det_ptr, dx_ptr, dparams_ptr, n_rows, n_features,
    stride_xb, stride_xd, stride_pb, stride_pd, stride_pk, stride_gb, stride_gd, stride_h,
    stride_qb, stride_qd, stride_qk,
    low, high, least_w, scale_w, least_h, scale_h, min_derivative, inv_temperature, over_bound,
    BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr, LEVELS: tl.constexpr,
    INVERSE: tl.constexpr, GRAD: tl.constexpr, LOG_DET: tl.constexpr, OF_X: tl.constexpr, OF_PARAMS: tl.constexpr,
    SHARED: tl.constexpr, BINS_LAST: tl.constexpr, GRADIENTS_LAST: tl.constexpr, SWAPPED: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = ROWS * FEATURES
    row, feature, there, _ = tile_of(n_rows, n_features, ROWS, FEATURES, False, INT64)
    p_row, p_feature, p_there, block = tile_of(n_rows, n_features, ROWS, FEATURES, SWAPPED, INT64)
    x = tl.load(x_ptr + row * stride_xb + feature * stride_xd, mask=there, other=0.0).to(tl.float32)
    g = tl.zeros_like(x)
    h = tl.zeros_like(x)
    if GRAD:
        g_at = grad_ptr + row * stride_gb + feature * stride_gd
        g = swapped(tl.load(g_at, mask=there, other=0.0).to(tl.float32), ROWS, FEATURES, SWAPPED)
    if LOG_DET:
        h = tl.load(grad_log_det_ptr + p_row * stride_h, mask=p_there, other=0.0).to(tl.float32)
    p_at = params_ptr + p_row * stride_pb + p_feature * stride_pd
    u, v, knots, e_u, over_u, e_v, over_v = _load_tables(
        p_at, stride_pk, p_there, inv_temperature, over_bound, BINS, TAILS, SOFT_CLIP, LEVELS, N, BINS_LAST
    )
    value, inside = _clamped(swapped(x, ROWS, FEATURES, SWAPPED), low, high)
    k, f_w, before_w, f_h, before_h, raw_0, raw_1 = _bin_of(
        value, e_u, over_u, e_v, over_v, knots, low, least_w, scale_w, least_h, scale_h, BINS, INVERSE
    )
    d_0, d_1 = _slopes(k, raw_0, raw_1, min_derivative, over_bound, BINS, TAILS, SOFT_CLIP)
    _, w, height, s, e, t, q, over_base, A, B, M = _spline(
        value, k, f_w, before_w, f_h, before_h, d_0, d_1, low, least_w, scale_w, least_h, scale_h, INVERSE
    )
    of_x, of_x_k, of_y_k, of_w, of_h, of_d0, of_d1 = _pulled(
        g, h, inside, w, height, s, e, t, q, over_base, A, B, M, INVERSE
    )
    if OF_X:
        of_x = swapped(of_x, FEATURES, ROWS, SWAPPED)
        tl.store(dx_ptr + row * n_features + feature, of_x.to(dx_ptr.dtype.element_ty), mask=there)
    if OF_PARAMS:
        if SHARED:
            q_feature = (tl.program_id(0) % tl.cdiv(n_features, FEATURES)) * FEATURES + tl.arange(0, FEATURES)
            q_at = dparams_ptr + block * stride_qb + q_feature * stride_qd
        else:
            q_at = dparams_ptr + p_row * stride_qb + p_feature * stride_qd
        of_u = _of_sizes(
            e_u, over_u, u, k, f_w, before_w, of_x_k, of_w, scale_w * inv_temperature, over_bound, BINS, SOFT_CLIP
        )
        _store_gradients(
            q_at, stride_qk, of_u, p_there, BINS, LEVELS, GRADIENTS_LAST, SHARED, ROWS, FEATURES
        )
        of_v = _of_sizes(
            e_v, over_v, v, k, f_h, before_h, of_y_k, of_h, scale_h * inv_temperature, over_bound, BINS, SOFT_CLIP
        )
        q_at += BINS * stride_qk
        _store_gradients(
            q_at, stride_qk, of_v, p_there, BINS, LEVELS, GRADIENTS_LAST, SHARED, ROWS, FEATURES
        )
        of_raw_0 = of_d0 * _slope_derivative(raw_0, d_0, over_bound, SOFT_CLIP)
        of_raw_1 = of_d1 * _slope_derivative(raw_1, d_1, over_bound, SOFT_CLIP)
        of_knots = _of_slopes(k, of_raw_0, of_raw_1, BINS, TAILS)
        q_at += BINS * stride_qk
        _store_gradients(
            q_at, stride_qk, of_knots, p_there, BINS - 1 + TAILS, LEVELS, GRADIENTS_LAST, SHARED, ROWS, FEATURES
        )


class _Launch(NamedTuple):
    """What both launches share.

    Args:
        programs, n_tiles: in all, and side by side over the features.
        scalars: the interval and the least sizes, as the kernels take them.
        constants: the kernels' constexprs.
    """

    programs: int
    n_tiles: int
    scalars: tuple[float, ...]
    constants: dict[str, int]


def _prepared(x: Tensor, params: Tensor, spline: Spline, inverse: bool) -> _Launch:
    rows, features = x.shape
    tile = dict(tile_for(spline.bins, TILES))
    values = tile.pop("VALUES")
    tile["FEATURES"] = min(power_of_two(features), values)
    tile["ROWS"] = values // tile["FEATURES"]
    n_tiles = ceil_div(features, tile["FEATURES"])
    length = spline.high - spline.low
    sizes = [
        number
        for least in (spline.min_width, spline.min_height)
        for number in (length * least, length * (1 - least * spline.bins))
    ]
    over_bound = -1 / math.log(spline.min_derivative)
    stride_b, stride_d, stride_k = params.stride()
    constants = {
        **spline.constexprs, "LEVELS": power_of_two(spline.bins).bit_length() - 1, "INVERSE": inverse,
        "BINS_LAST": stride_k == 1, "SWAPPED": 0 < stride_b < stride_d and params.shape[0] > 1, **tile,
    }  # fmt: skip
    scalars = (spline.low, spline.high, *sizes, spline.min_derivative, 1 / spline.temperature, over_bound)
    return _Launch(ceil_div(rows, tile["ROWS"]) * n_tiles, n_tiles, scalars, constants)


def _strides(params: Tensor, shared: bool) -> tuple[int, int, int]:
    """(sample, feature, parameter) strides; 0 per sample of shared parameters."""
    return (0 if shared else params.stride(0), params.stride(1), params.stride(2))


def launch_rq_spline(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    """(y [B, D], log|det| [B] fp32; [0] where not requested)."""
    spline, (inverse, log_det) = Spline(*constants[:-2]), constants[-2:]
    y, (rows, features) = x.new_empty(x.shape), x.shape
    if x.numel() == 0:
        return y, x.new_zeros(rows if log_det else 0, dtype=torch.float32)
    launch = _prepared(x, params, spline, inverse)
    partial = x.new_empty((rows, launch.n_tiles) if log_det else (0,), dtype=torch.float32)
    _rq_spline_kernel[(launch.programs,)](
        x, params, y, partial, rows, features, *x.stride(), *_strides(params, params.shape[0] != rows),
        *launch.scalars, LOG_DET=log_det, INT64=needs_int64(x, params, y), **launch.constants,
    )  # fmt: skip
    if not log_det:
        return y, partial
    return y, partial[:, 0] if launch.n_tiles == 1 else partial.sum(1)


def launch_rq_spline_backward(
    x: Tensor, params: Tensor, grad: Tensor | None, grad_log_det: Tensor | None, *arguments: Any
) -> tuple[Tensor | None, Tensor | None]:
    """(dx [B, D], dparams like params); None where not needed. A gradient that is None is zero."""
    *constants, inverse, _, needs = arguments
    spline, (rows, features), shared = Spline(*constants), x.shape, params.shape[0] != x.shape[0]
    dx = x.new_empty(x.shape) if needs[0] else None
    dparams = _like(params) if needs[1] else None
    if x.numel() == 0:
        return dx, None if dparams is None else dparams.zero_()
    launch = _prepared(x, params, spline, inverse)
    written = dparams
    if shared and dparams is not None:  # sums over the rows of each tile, features innermost
        blocks = launch.programs // launch.n_tiles
        written = x.new_empty((blocks, spline.per_feature, features), dtype=torch.float32).mT
    g, h, q = (x if given is None else given for given in (grad, grad_log_det, written))
    _rq_spline_backward_kernel[(launch.programs,)](
        x, params, g, h, x if dx is None else dx, q, rows, features, *x.stride(), *_strides(params, shared),
        *g.stride(), h.stride(0), *(q.stride() if written is not None else (0, 0, 0)), *launch.scalars,
        GRAD=grad is not None, LOG_DET=grad_log_det is not None, OF_X=needs[0], OF_PARAMS=needs[1], SHARED=shared,
        GRADIENTS_LAST=written is not None and written.stride(2) == 1,
        INT64=needs_int64(x, params, grad, written), **launch.constants,
    )  # fmt: skip
    if shared and dparams is not None and written is not None:
        dparams[0] = written.sum(0)
    return dx, dparams


def _like(params: Tensor) -> Tensor:
    """An empty tensor in planes of bins where params are, else contiguous."""
    if params.stride(0) == 1:
        return params.new_empty(*params.shape[1:], params.shape[0]).permute(2, 0, 1)
    return params.new_empty(params.shape)
