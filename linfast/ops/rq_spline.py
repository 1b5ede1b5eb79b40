"""The monotonic rational-quadratic spline of neural spline flows, for every value of x by parameters of its own.

K bins divide an interval [l, r] of length L = r - l, in x and in y. Raw parameters u (widths), v (heights), w
(derivatives at the knots) of one value x:

    W = L (m_w + (1 - m_w K) softmax(u / T))      x_k = l + W_1 + .. + W_k      H and y_k likewise, from v
    d = m_d + softplus(w)                         1 at both ends with tails "linear", equal there with "circular"

In bin k, with t = (x - x_k) / W, s = H / W, e = d_k + d_{k+1} - 2 s and q = t (1 - t):

    y = y_k + H (s t^2 + d_k q) / (s + e q)
    log dy/dx = log(s^2 (d_{k+1} t^2 + 2 s q + d_k (1 - t)^2) / (s + e q)^2)

Outside the interval y = x. The inverse solves the quadratic equation in t that the first line is:

    a t^2 + b t + c = 0,  z = y - y_k,  a = H (s - d_k) + z e,  b = H d_k - z e,  c = -s z,  t = 2 c / (-b - sqrt(b^2 - 4 a c))

With ``parameters="soft_clip"`` u, v and w are first bounded smoothly, C(u; c) = u / (1 + |u| / c): widths and heights
with c = log(1 / m_d) / 2, and d = exp(C(w; log(1 / m_d))).

Per value the op reads x and P = 2 K + K - 1 (K, K + 1) parameters and writes y, about 4 (P + 2) bytes in fp32. Only x
(or y) and the parameters are saved: the backward computes the bins again.

| runs      | where                                                                                   |
|-----------|-----------------------------------------------------------------------------------------|
| plain     | a CPU: bins are planes, and rows are cut to fit the cache (``spline_plain``)            |
| kernel    | a GPU: each direction, and the backward of both, in one launch (kernels/rq_spline.py)   |
| reference | ``backend("reference")``, float64 on a GPU                                              |

Sources: Neural Spline Flows (arXiv 1906.04032); circular tails: 2002.02428; soft-clipped parameters: zuko.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_count, check_flag, check_kind, check_number, check_tensor
from ..dispatch import cat, chosen_backend, interpreting, uses_triton, without_autocast
from ..kernels.spline_spec import SPLINE_SCHEMA, TAILS, Spline
from .register import define_op
from .spline_plain import plain, plain_backward

PARAMETERS = ("softmax", "soft_clip")


def rq_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    tails: str = "linear",
    interval: tuple[float, float] = (-3.0, 3.0),
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    temperature: float = 1.0,
    parameters: str = "softmax",
    inverse: bool = False,
    log_det: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| or None) of the spline that ``linfast.ops.rq_spline`` defines, or of its inverse.

    Args:
        x: [B, ...], any strides.
        widths, heights: [B, ..., K], raw; the shape of x and the bins. The first dimension may be 1: the same
            parameters for all samples.
        derivatives: [B, ..., K - 1], raw, at the inner knots. With tails "circular" K, the first one at both ends;
            with tails "bounded" K + 1.
        tails: "linear", "circular" or "bounded". In every case y = x outside the interval, in fp32 or wider.
        interval: (l, r), which the spline maps to itself.
        min_width, min_height: least size of a bin as a fraction of the interval, at most 1 / K.
        min_derivative: least derivative at a knot.
        temperature: T, which divides the raw widths and heights; nflows takes the root of a network's width.
        parameters: "softmax", or "soft_clip" as in zuko, whose min_width and min_height are 0.
        inverse: apply the inverse.
        log_det: also return log|det| of the map that is applied, [B], in fp32 or wider.

    y has x's dtype and is contiguous; all arithmetic is fp32 or wider. From finite arguments no result and no
    gradient is NaN.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown, or a shape does not fit.
    """
    check_tensor("x", x)
    for name, given in (("widths", widths), ("heights", heights), ("derivatives", derivatives)):
        check_tensor(name, given, x)
        if given.ndim != x.ndim + 1 or given.shape[1:-1] != x.shape[1:] or given.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{name} must be {(*x.shape, '.')} for x {tuple(x.shape)}; got {tuple(given.shape)}")
    check_flag("inverse", inverse)
    check_flag("log_det", log_det)
    spline = spline_of(
        widths.shape[-1], tails=tails, interval=interval, min_width=min_width, min_height=min_height,
        min_derivative=min_derivative, temperature=temperature, parameters=parameters,
    )  # fmt: skip
    for name, given, wanted in (
        ("heights", heights, spline.bins),
        ("derivatives", derivatives, spline.derivatives),
    ):
        if given.shape[-1] != wanted:
            got = f"{given.shape[-1]} for {spline.bins} widths and tails={tails!r}"
            raise ValueError(f"{name} must have {wanted} values in their last dimension; got {got}")
    rows = max(part.shape[0] for part in (widths, heights, derivatives))
    planes = x.is_cpu  # each bin is one run in memory, as the plain code takes it
    parts = [part.expand(rows, *part.shape[1:]) for part in (widths, heights, derivatives)]
    if planes:
        params = cat([part.movedim(0, -1).movedim(-2, 0) for part in parts]).movedim(0, -1).movedim(-2, 0)
    else:
        params = cat(parts, -1)
    return spline_transform(x, params, spline, inverse, log_det)


def spline_of(
    bins: int, *, tails: str, interval: tuple[float, float], min_width: float, min_height: float,
    min_derivative: float, temperature: float, parameters: str,
) -> Spline:  # fmt: skip
    """The checked options as a Spline."""
    check_choice("tails", tails, TAILS)
    check_choice("parameters", parameters, PARAMETERS)
    bins = check_count("bins", bins, least=2)
    check_kind("interval", interval, (tuple, list), "a pair of numbers")
    if len(interval) != 2:
        raise ValueError(f"interval must be (l, r); got {interval}")
    low, high = (check_number("each of interval", end) for end in interval)
    if not low < high:
        raise ValueError(f"interval must be (l, r) with l < r; got {interval}")
    clips = parameters == "soft_clip"
    least = {
        name: 0.0 if clips else check_number(name, value, least=_LEAST, most=1.0 / bins)
        for name, value in (("min_width", min_width), ("min_height", min_height))
    }
    check_number("min_derivative", min_derivative, least=_LEAST, most=1.0, below=True)
    check_number("temperature", temperature, least=0.0, above=True)
    return Spline(
        bins, low, high, *least.values(), float(min_derivative), float(temperature), TAILS.index(tails), clips
    )


_LEAST = 1e-6  # smaller bins or slopes make ratios whose squares overflow in fp32


def spline_transform(
    x: Tensor, params: Tensor, spline: Spline, inverse: bool, log_det: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| or None) of x [B, ...] by params [B or 1, ..., P] of any strides: widths, heights, derivatives."""
    flat = x if x.ndim == 2 else x.reshape(x.shape[0], -1)
    params = params if x.ndim == 2 else params.reshape(params.shape[0], flat.shape[1], params.shape[-1])
    constants = (*spline, inverse, log_det)
    if uses_triton(flat, params) or (x.is_cpu and chosen_backend() != "reference"):
        y, total = _rq_spline(flat, params, *constants)
    else:
        y, total = without_autocast(x.device.type, rq_spline_reference, flat, params, *constants)
    return y.reshape(x.shape), total if log_det else None


def rq_spline_reference(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor | None]:
    """The raw op, for x [B, D] and params [B or 1, D, P], in plain differentiable torch."""
    spline, inverse, log_det = Spline(*constants[:-2]), constants[-2], constants[-1]
    wide = torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32)
    value, params = x.to(wide), params.to(wide).expand(x.shape[0], -1, -1)
    raw_widths, raw_heights, raw_slopes = params.split((spline.bins, spline.bins, spline.derivatives), -1)
    widths = _bins(raw_widths, spline.min_width, spline)
    heights = _bins(raw_heights, spline.min_height, spline)
    slopes = _slopes(raw_slopes, spline)
    low, high = spline.low, spline.high
    inside = (value >= low) & (value <= high)
    value = torch.where(inside, value, low)

    x_k, y_k = (low + F.pad(sizes.cumsum(-1), (1, 0)) for sizes in (widths, heights))
    searched = y_k if inverse else x_k
    index = (value[..., None] >= searched[..., 1:-1]).sum(-1, keepdim=True)
    w, h, x_k, y_k, d_0, d_1 = (
        table.gather(-1, at).squeeze(-1)
        for table, at in (
            (widths, index), (heights, index), (x_k, index), (y_k, index), (slopes, index), (slopes, index + 1),
        )
    )  # fmt: skip
    s = h / w
    e = d_0 + d_1 - 2 * s
    if inverse:
        z = value - y_k
        b, c = h * d_0 - z * e, -s * z
        discriminant = b * b - 4 * (h * (s - d_0) + z * e) * c
        t = (2 * c / (-b - discriminant.clamp_min(0).sqrt())).clamp(0, 1)
    else:
        t = ((value - x_k) / w).clamp(0, 1)
    q = t * (1 - t)
    base = s + e * q
    out = x_k + t * w if inverse else y_k + h * (s * t * t + d_0 * q) / base
    y = torch.where(inside, out, x.to(wide)).to(x.dtype)
    if not log_det:
        return y, None
    logs = torch.log(s * s * (d_1 * t * t + 2 * s * q + d_0 * (1 - t) ** 2) / (base * base))
    return y, torch.where(inside, -logs if inverse else logs, 0.0).sum(-1)


def _bins(raw: Tensor, least: float, spline: Spline) -> Tensor:
    """The sizes of the bins [..., K], from raw sizes; their sum is the interval's length."""
    if spline.soft_clip:
        raw = raw / (1 + (2 * raw / math.log(spline.min_derivative)).abs())
    fractions = torch.softmax(raw / spline.temperature, -1)
    return (spline.high - spline.low) * (least + (1 - least * spline.bins) * fractions)


def _slopes(raw: Tensor, spline: Spline) -> Tensor:
    """The derivatives at all knots [..., K + 1]."""
    if spline.soft_clip:
        slopes = (raw / (1 + (raw / math.log(spline.min_derivative)).abs())).exp()
    else:
        slopes = spline.min_derivative + F.softplus(raw)
    kind = TAILS[spline.tails]
    if kind == "linear":
        return F.pad(slopes, (1, 1), value=1.0)
    return torch.cat((slopes, slopes[..., :1]), -1) if kind == "circular" else slopes


def _fake(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[0] if constants[-1] else 0, dtype=wide)


def _gradients(x: Tensor, params: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Laid out as the backward returns them: in planes of bins on a CPU, and where they are planes in params."""
    if (x.is_cpu and not interpreting()) or params.stride(0) == 1:
        return x.new_empty(x.shape), params.new_empty(*params.shape[1:], params.shape[0]).permute(2, 0, 1)
    return x.new_empty(x.shape), params.new_empty(params.shape)


_rq_spline = define_op(
    f"rq_spline(Tensor x, Tensor params, {SPLINE_SCHEMA}, bool inverse, bool log_det) -> (Tensor y, Tensor log_det)",
    _fake,
    rq_spline_reference,
    saves="x params",
    gradients=_gradients,
    plain=plain,
    plain_backward=plain_backward,
)
