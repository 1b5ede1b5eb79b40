"""The reference of rq_spline: its formulas (``ops/rq_spline.py``) in plain differentiable torch, bins last."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.spline_spec import TAILS, Spline
from .spline_plain import wide_type


def rq_spline_reference(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor | None]:
    """The raw op rq_spline, for x [B, D] and params [B or 1, D, P], in plain differentiable torch."""
    spline, inverse, log_det = Spline(*constants[:-2]), constants[-2], constants[-1]
    wide = wide_type(x, params)
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
    if inverse:
        p = _within_bin((value - y_k) / h)
        m, v = d_0 * (1 - p) - d_1 * p, 4 * s * s * p * (1 - p)
        r = (m * m + v).sqrt() + torch.where(m < 0, -m, m)
        t = 2 * s * p / (2 * s * p + torch.where(m < 0, v / r, r))
    else:
        t = _within_bin((value - x_k) / w)
    q = t * (1 - t)
    base = s + (d_0 + d_1 - 2 * s) * q
    out = x_k + t * w if inverse else y_k + h * (s * t * t + d_0 * q) / base
    y = torch.where(inside, out, x.to(wide)).to(x.dtype)
    if not log_det:
        return y, None
    logs = 2 * torch.log(s / base) + torch.log(d_1 * t * t + 2 * s * q + d_0 * (1 - t) ** 2)
    return y, torch.where(inside, -logs if inverse else logs, 0.0).sum(-1)


def _within_bin(part: Tensor) -> Tensor:
    """A position that rounding may have moved out of [0, 1], moved back; its derivative stays 1."""
    return part + (part.clamp(0, 1) - part).detach()


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
        slopes = spline.min_derivative + F.softplus(raw + spline.offset)
    kind = TAILS[spline.tails]
    if kind == "linear":
        return F.pad(slopes, (1, 1), value=1.0)
    return torch.cat((slopes, slopes[..., :1]), -1) if kind == "circular" else slopes
