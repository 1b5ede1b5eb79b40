"""Flows written out from the formulas, layer by layer, as the reference for ours.

No code of linfast runs here except conditioners that are not MLPs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linfast as lf
from linfast.flows import Conditioned

__all__ = ["log_scale", "plain_flow", "plain_spline"]

_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu}


def plain_flow(g: nn.Module, x: Tensor, inverse: bool, context: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(g(x) or g^{-1}(x), log|det| of that [B])."""
    if isinstance(g, Conditioned):
        return plain_flow(g.bijection, x, inverse, {**g.context, **context})
    if isinstance(g, lf.Inverse):
        return plain_flow(g.bijection, x, not inverse, context)
    if isinstance(g, lf.Flow):
        total = x.new_zeros(len(x))
        for layer in reversed(g.bijections) if inverse else g.bijections:
            x, log_det = plain_flow(layer, x, inverse, context)
            total = total + log_det
        return x, total
    if isinstance(g, (lf.AffineCoupling, lf.AdditiveCoupling, lf.SplineCoupling)):
        return _coupling(g, x, inverse, context)
    if isinstance(g, lf.Squeeze):
        return _squeeze(x, inverse), x.new_zeros(len(x))
    return _channels(g, x, inverse)


def _coupling(g: Any, x: Tensor, inverse: bool, context: dict[str, Any]) -> tuple[Tensor, Tensor]:
    first = (x.shape[1] + 1) // 2
    halves = [x[:, :first], x[:, first:]]
    m = 0 if g.moves == "first" else 1
    params = _conditioner(g.conditioner, halves[1 - m], context)
    if isinstance(g, lf.AdditiveCoupling):
        halves[m] = halves[m] - params if inverse else halves[m] + params
        return torch.cat(halves, 1), x.new_zeros(len(x))
    n = halves[m].shape[1]
    if isinstance(g, lf.SplineCoupling):
        at, sizes = (2, (n, -1)) if g.layout == "features_first" else (1, (-1, n))
        raw = params.unflatten(1, sizes).movedim(at, -1)
        widths, heights, slopes = raw[..., : g.bins], raw[..., g.bins : 2 * g.bins], raw[..., 2 * g.bins :]
        slopes = slopes + math.log(math.expm1(1 - g.min_derivative))
        interval = (-g.tail_bound, g.tail_bound)
        halves[m], total = plain_spline(
            halves[m], widths, heights, slopes, g.tails, interval, g.min_derivative, 1.0, "softmax", inverse
        )
        return torch.cat(halves, 1), total
    shift, raw = (params[:, :n], params[:, n:]) if g.layout == "halves" else (params[:, ::2], params[:, 1::2])
    log_s = log_scale(g.scale_map, raw)
    if g.order == "shift_first":
        halves[m] = halves[m] * torch.exp(-log_s) - shift if inverse else (halves[m] + shift) * torch.exp(log_s)
    else:
        halves[m] = (halves[m] - shift) * torch.exp(-log_s) if inverse else halves[m] * torch.exp(log_s) + shift
    total = log_s.flatten(1).sum(1)
    return torch.cat(halves, 1), -total if inverse else total


def log_scale(scale_map: lf.ScaleMap, r: Tensor) -> Tensor:
    """The formulas of linfast.scale_maps."""
    c, floor = scale_map.constants
    if scale_map.kind == "exp":
        return r
    if scale_map.kind == "clamp":
        return r.clamp(-c, c)
    if scale_map.kind == "smooth":
        return r / (1 + r.abs() / c)
    if scale_map.kind == "tanh":
        return c * r.tanh()
    if scale_map.kind == "arctan":
        return c * 2 / math.pi * r.atan()
    if scale_map.kind == "sigmoid":
        return F.logsigmoid(r + 2) if floor == 0 else ((r + 2).sigmoid() + floor).log()
    return (F.softplus(r) + floor).clamp(max=c).log()


def _conditioner(net: nn.Module, kept: Tensor, context: dict[str, Any]) -> Tensor:
    if type(net) is not lf.MLP:
        return net(kept, **context)
    parts = [kept]
    if net.time_features:
        t = torch.as_tensor(context["t"], dtype=kept.dtype).reshape(-1).expand(len(kept))
        half = net.time_features // 2
        frequencies = torch.tensor([10000.0 ** (-k / (half - 1)) for k in range(half)], dtype=kept.dtype)
        angles = t[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    if net.context_features:
        parts.append(context["context"])
    h = torch.cat(parts, 1)
    for i, layer in enumerate(net.layers):
        h = h if i == 0 else _ACTIVATIONS[net.activation](h)
        h = h @ layer.weight.mT + (0 if layer.bias is None else layer.bias)
    return h


def _channels(g: Any, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """A map of the channels, as a matrix and a shift."""
    n = x.shape[1]
    shift = x.new_zeros(n)
    eye = torch.eye(n, dtype=x.dtype)
    if isinstance(g, lf.ActNorm):
        W, shift = torch.diag(g.log_scale.exp()), g.bias * g.log_scale.exp()
    elif isinstance(g, lf.Permute):
        W = eye[g.permutation]
    elif isinstance(g, lf.Householder):
        W = eye
        for v in g.vectors:
            W = W @ (eye - 2 * torch.outer(v, v) / (v @ v))
    elif g.kind == "free":
        W = g.weight
    else:
        W = (g.lower.tril(-1) + eye) @ (g.upper.triu(1) + torch.diag(g.log_diagonal.exp()))
        W = W[g.permutation]
    flat = x.flatten(2) if x.ndim > 2 else x[..., None]
    y = torch.linalg.solve(W, flat - shift[:, None]) if inverse else W @ flat + shift[:, None]
    log_det = torch.linalg.slogdet(W).logabsdet * flat.shape[-1]
    return y.reshape(x.shape), (-log_det if inverse else log_det).expand(len(x))


def _squeeze(x: Tensor, inverse: bool) -> Tensor:
    if inverse:
        y = x.new_zeros(len(x), x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])
        for i in range(4):
            y[:, :, i // 2 :: 2, i % 2 :: 2] = x[:, i::4]
        return y
    parts = [x[:, :, i // 2 :: 2, i % 2 :: 2] for i in range(4)]
    return torch.stack(parts, 2).flatten(1, 2)


def plain_spline(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, tails: str, interval: tuple[float, float],
    min_derivative: float, temperature: float, parameters: str, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, log|det|) of a rational-quadratic spline, bin by bin; its least width and height are 0.001."""
    low, high = interval
    K, least = widths.shape[-1], 0.001
    if parameters == "soft_clip":
        c, least = -math.log(min_derivative), 0.0
        widths, heights = (u / (1 + 2 * u.abs() / c) for u in (widths, heights))
        slopes = (slopes / (1 + slopes.abs() / c)).exp()
    else:
        slopes = min_derivative + (1 + slopes.exp()).log()
    ends = slopes[..., :1] if tails == "circular" else torch.ones_like(widths[..., :1])
    slopes = {"linear": [ends, slopes, ends], "circular": [slopes, ends], "bounded": [slopes]}[tails]
    d = torch.cat(slopes, -1).unbind(-1)
    knots = []
    for raw in (widths, heights):
        e = ((raw - raw.amax(-1, keepdim=True)) / temperature).exp()
        sizes = (high - low) * (least + (1 - least * K) * e / e.sum(-1, keepdim=True))
        knots.append([low + sizes[..., :k].sum(-1) for k in range(K + 1)])
    y, logs = x + 0.0, torch.zeros_like(x)
    inside = (x >= low) & (x <= high)
    for k in range(K):
        (x_0, x_1), (y_0, y_1) = (of[k : k + 2] for of in knots)
        s = (y_1 - y_0) / (x_1 - x_0)
        start, end = (y_0, y_1) if inverse else (x_0, x_1)
        here = inside & (x >= start) & ((x < end) if k < K - 1 else True)
        value = torch.where(here, x, start)
        if inverse:
            z, bend = value - y_0, d[k] + d[k + 1] - 2 * s
            b = (y_1 - y_0) * d[k] - z * bend
            root = (b * b + 4 * ((y_1 - y_0) * (s - d[k]) + z * bend) * s * z).sqrt()
            t = 2 * s * z / (b + root)
        else:
            t = (value - x_0) / (x_1 - x_0)
        under = s + (d[k] + d[k + 1] - 2 * s) * t * (1 - t)
        slope = s**2 * (d[k + 1] * t**2 + 2 * s * t * (1 - t) + d[k] * (1 - t) ** 2) / under**2
        there = y_0 + (y_1 - y_0) * (s * t**2 + d[k] * t * (1 - t)) / under
        y = torch.where(here, x_0 + t * (x_1 - x_0) if inverse else there, y)
        logs = torch.where(here, -slope.log() if inverse else slope.log(), logs)
    return y, logs.flatten(1).sum(1)
