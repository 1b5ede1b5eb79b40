"""The rational-quadratic spline of x [B, D] by params [B or 1, D, P]: one launch each way, one for all gradients.

Parameters u (widths), v (heights), w (derivatives) of a value, K bins of an interval [l, r] of length L. In base 2:

    e_j = 2^((u_j - max u) log2(e) / T)     f_j = e_j / sum e     W_j = L (m_w + (1 - m_w K) f_j)
    x_j = l + L m_w j + L (1 - m_w K) (f_0 + .. + f_{j-1})        heights H_j, y_j likewise, from v
    d_j = m_d + softplus(w_j + offset), or exp of a clipped w_j;  1 at both ends of linear tails

The bin k of x is the last with x_k <= x. Only its e, f and w are kept: they are selected while starts are summed.
With t = (x - x_k) / W, s = H / W, e = d_k + d_{k+1} - 2 s, q = t (1 - t), base = s + e q, and sums without a minus

    A = d_k (1 - t) + s t    B = s (1 - t) + d_{k+1} t    M = A (1 - t) + B t
    y = y_k + H t A / base    dy/dx = (s / base)^2 M

The inverse, with z = y - y_k, b = H d_k - z e and a = H s - b, takes the form whose sums do not cancel:

    t = 2 s z / (b + r) where b >= 0, else (r - b) / (2 a),  r = sqrt(b^2 + 4 a s z)

t is clamped to [0, 1] and the root's argument at 0, so that rounding makes no NaN.

The backward computes the bin again, from x or y and the parameters, which alone are saved. The formulas are derived
in linfast/ops/spline_plain.py. With the gradients G_x of the bin's start and G_w of its size, raw width j receives

    f_j (G_x [j < k] + G_w [j = k] - S) L (1 - m_w K) / T,    S = G_x (f_0 + .. + f_{k-1}) + G_w f_k

Bytes per value in fp32: forward 4 (P + 2), P = 3 K - 1 with linear tails: 100 at K = 8; backward 4 (2 P + 3): 196.
Operations at K = 8 on sm_90: 648 instructions for the 32 values of a warp, of them 27 on the special function unit
(16 exponentials of bins, 5 of two softplus, 6 quotients and logarithms); backward 960 and 35. docs/roofline.md
predicts that bytes are the limit. The code grows with K: one compilation takes a minute at K = 64, which spills.

A program takes rows x features (see spline_planes.py), all features where D fits. log|det| is summed within a row
of a tile by the kernel, and over several tiles by torch; likewise gradients of parameters that all samples share.
There are no atomics: the same bits every time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, ceil_div, needs_int64, power_of_two, tile_for
from .math import LOG2E
from .spline_bin import (
    CIRCULAR,
    LINEAR,
    bin_of,
    exponentials,
    log_slope,
    of_sizes,
    of_slopes,
    pulled,
    slopes_of,
    transformed,
)
from .spline_planes import appended, load_planes, places, planes_of, store_planes, swapped, tile_numbers
from .spline_spec import Spline

# (most bins, tile). A thread has one value and all its parameters: 55 registers forward and 92 backward at K = 8 on
# sm_90, 80 and 128 at K = 16. There, with 4 warps, the backward spills.
TILES: tuple[tuple[int, Tile], ...] = (
    (8, {"VALUES": 128, "num_warps": 4}),
    (1 << 62, {"VALUES": 64, "num_warps": 2}),
)


@triton.jit
def _load_parameters(
    ptr, stride, inside, inv_temperature, over_bound,
    BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr,
    BINS_LAST: tl.constexpr,
):  # fmt: skip
    """(raw widths, raw heights; e and 1 / their sum, of widths, of heights; raw derivatives at all knots)."""
    N_SLOPES: tl.constexpr = BINS - 1 + TAILS
    step = 1 if BINS_LAST else stride
    u = load_planes(ptr, step, inside, BINS, LEVELS, BINS_LAST)
    v = load_planes(ptr + BINS * step, step, inside, BINS, LEVELS, BINS_LAST)
    knots = load_planes(ptr + 2 * BINS * step, step, inside, N_SLOPES, LEVELS, BINS_LAST)
    u = planes_of(u, BINS, LEVELS, N, BINS_LAST)
    v = planes_of(v, BINS, LEVELS, N, BINS_LAST)
    knots = planes_of(knots, N_SLOPES, LEVELS, N, BINS_LAST)
    if TAILS == LINEAR:
        end = tl.zeros_like(u[0])
        knots = appended(appended((), end) + knots, end)
    elif TAILS == CIRCULAR:
        knots = appended(knots, knots[0])
    e_u, over_u = exponentials(u, inv_temperature * LOG2E, over_bound, BINS, SOFT_CLIP)
    e_v, over_v = exponentials(v, inv_temperature * LOG2E, over_bound, BINS, SOFT_CLIP)
    return u, v, e_u, over_u, e_v, over_v, knots


@triton.jit
def _clamped(x, low, high):
    """(x clamped to the interval, whether it was inside)."""
    return tl.where(x < low, low, tl.where(x > high, high, x)), (x >= low) & (x <= high)


@triton.jit(do_not_specialize=["n_rows", "stride_pb", "stride_pd", "stride_pk"])
def _rq_spline_kernel(
    x_ptr, params_ptr, y_ptr, partial_ptr, n_rows, n_features,
    stride_xb, stride_xd, stride_pb, stride_pd, stride_pk,
    low, high, least_w, scale_w, least_h, scale_h, min_derivative, inv_temperature, over_bound, offset,
    BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr, LEVELS: tl.constexpr,
    INVERSE: tl.constexpr, LOG_DET: tl.constexpr, BINS_LAST: tl.constexpr, SWAPPED: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = ROWS * FEATURES
    bounds = (low, least_w, scale_w, least_h, scale_h)
    block, tile, n_tiles = tile_numbers(n_features, FEATURES, INT64)
    row, feature, there = places(block, tile, n_rows, n_features, ROWS, FEATURES, False)
    p_row, p_feature, p_there = places(block, tile, n_rows, n_features, ROWS, FEATURES, SWAPPED)
    x = tl.load(x_ptr + row * stride_xb + feature * stride_xd, mask=there, other=0.0).to(tl.float32)
    p_at = params_ptr + p_row * stride_pb + p_feature * stride_pd
    _, _, e_u, over_u, e_v, over_v, knots = _load_parameters(
        p_at, stride_pk, p_there, inv_temperature, over_bound, BINS, TAILS, SOFT_CLIP, LEVELS, N, BINS_LAST
    )
    value, inside = _clamped(swapped(x, ROWS, FEATURES, SWAPPED), low, high)
    found = bin_of(value, e_u, over_u, e_v, over_v, knots, bounds, BINS, INVERSE)
    options = min_derivative, over_bound, offset
    slopes = slopes_of(found, options, BINS, TAILS, SOFT_CLIP)
    out, terms = transformed(value, found, slopes, bounds, INVERSE)
    _, inside_x = _clamped(x, low, high)
    y = tl.where(inside_x, swapped(out, FEATURES, ROWS, SWAPPED), x)
    tl.store(y_ptr + row * n_features + feature, y.to(y_ptr.dtype.element_ty), mask=there)
    if LOG_DET:
        logs = log_slope(terms)
        logs = tl.where(inside & p_there, -logs if INVERSE else logs, 0.0)
        total = tl.sum(tl.reshape(swapped(logs, FEATURES, ROWS, SWAPPED), [ROWS, FEATURES]), 1)
        at = block * ROWS + tl.arange(0, ROWS)
        tl.store(partial_ptr + at * n_tiles + tile, total, mask=at < n_rows)


@triton.jit
def _store_gradients(
    ptr, step, planes, there, COUNT: tl.constexpr, LEVELS: tl.constexpr, BINS_LAST: tl.constexpr,
    SHARED: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Write each plane, or, where all samples share the parameters, its sum over the tile's rows."""
    if SHARED:
        there = tl.reshape(there, [ROWS, FEATURES])
        for j in tl.static_range(COUNT):
            total = tl.sum(tl.where(there, tl.reshape(planes[j], [ROWS, FEATURES]), 0.0), 0)
            tl.store(ptr + j * step, total, mask=tl.sum(there.to(tl.int32), 0) > 0)
    else:
        store_planes(ptr, step, planes, there, COUNT, LEVELS, ROWS * FEATURES, BINS_LAST)


@triton.jit(
    do_not_specialize=["n_rows", "stride_pb", "stride_pd", "stride_pk", "stride_qb", "stride_qd", "stride_qk"]
)
def _rq_spline_backward_kernel(
    x_ptr, params_ptr, grad_ptr, grad_log_det_ptr, dx_ptr, dparams_ptr, n_rows, n_features,
    stride_xb, stride_xd, stride_pb, stride_pd, stride_pk, stride_gb, stride_gd, stride_h,
    stride_qb, stride_qd, stride_qk,
    low, high, least_w, scale_w, least_h, scale_h, min_derivative, inv_temperature, over_bound, offset,
    BINS: tl.constexpr, TAILS: tl.constexpr, SOFT_CLIP: tl.constexpr, LEVELS: tl.constexpr,
    INVERSE: tl.constexpr, GRAD: tl.constexpr, LOG_DET: tl.constexpr, OF_X: tl.constexpr, OF_PARAMS: tl.constexpr,
    SHARED: tl.constexpr, BINS_LAST: tl.constexpr, GRADIENTS_LAST: tl.constexpr, SWAPPED: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = ROWS * FEATURES
    bounds = (low, least_w, scale_w, least_h, scale_h)
    block, tile, _ = tile_numbers(n_features, FEATURES, INT64)
    row, feature, there = places(block, tile, n_rows, n_features, ROWS, FEATURES, False)
    p_row, p_feature, p_there = places(block, tile, n_rows, n_features, ROWS, FEATURES, SWAPPED)
    x = tl.load(x_ptr + row * stride_xb + feature * stride_xd, mask=there, other=0.0).to(tl.float32)
    g = tl.zeros_like(x)
    h = tl.zeros_like(x)
    if GRAD:
        g = tl.load(grad_ptr + row * stride_gb + feature * stride_gd, mask=there, other=0.0).to(tl.float32)
    if LOG_DET:
        h = tl.load(grad_log_det_ptr + p_row * stride_h, mask=p_there, other=0.0).to(tl.float32)
    p_at = params_ptr + p_row * stride_pb + p_feature * stride_pd
    u, v, e_u, over_u, e_v, over_v, knots = _load_parameters(
        p_at, stride_pk, p_there, inv_temperature, over_bound, BINS, TAILS, SOFT_CLIP, LEVELS, N, BINS_LAST
    )
    value, inside = _clamped(swapped(x, ROWS, FEATURES, SWAPPED), low, high)
    found = bin_of(value, e_u, over_u, e_v, over_v, knots, bounds, BINS, INVERSE)
    options = min_derivative, over_bound, offset
    slopes = slopes_of(found, options, BINS, TAILS, SOFT_CLIP)
    _, terms = transformed(value, found, slopes, bounds, INVERSE)
    of_x, of_x_k, of_w, of_y_k, of_h, of_d_0, of_d_1 = pulled(
        swapped(g, ROWS, FEATURES, SWAPPED), h, inside, terms, INVERSE
    )
    if OF_X:
        of_x = swapped(of_x, FEATURES, ROWS, SWAPPED)
        tl.store(dx_ptr + row * n_features + feature, of_x.to(dx_ptr.dtype.element_ty), mask=there)
    if OF_PARAMS:
        step = 1 if GRADIENTS_LAST else stride_qk
        if SHARED:
            at = dparams_ptr + block * stride_qb + (tile * FEATURES + tl.arange(0, FEATURES)) * stride_qd
        else:
            at = dparams_ptr + p_row * stride_qb + p_feature * stride_qd
        k, f_w, before_w, f_h, before_h, _, _ = found
        of_u = of_sizes(
            u, e_u, over_u, k, f_w, before_w, of_x_k, of_w, scale_w * inv_temperature, over_bound, BINS, SOFT_CLIP
        )
        _store_gradients(at, step, of_u, p_there, BINS, LEVELS, GRADIENTS_LAST, SHARED, ROWS, FEATURES)
        of_v = of_sizes(
            v, e_v, over_v, k, f_h, before_h, of_y_k, of_h, scale_h * inv_temperature, over_bound, BINS, SOFT_CLIP
        )
        at += BINS * step
        _store_gradients(at, step, of_v, p_there, BINS, LEVELS, GRADIENTS_LAST, SHARED, ROWS, FEATURES)
        of_raw = of_slopes(found, slopes, of_d_0, of_d_1, options, BINS, TAILS, SOFT_CLIP)
        at += BINS * step
        N_SLOPES: tl.constexpr = BINS - 1 + TAILS
        _store_gradients(at, step, of_raw, p_there, N_SLOPES, LEVELS, GRADIENTS_LAST, SHARED, ROWS, FEATURES)


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
    of_slope = (spline.min_derivative, 1 / spline.temperature, over_bound, spline.offset)
    scalars = (spline.low, spline.high, *sizes, *of_slope)
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
