"""Affine coupling, the elementwise core: one half of the channels moves, the other is copied.

With x = [first | second] along dim 1, the moved half m, and the conditioner's
output params giving a shift t and a raw value r, log_s = scale_map(r):

    order "shift_first":  y = (m + t) exp(log_s)      m = y exp(-log_s) - t
    order "scale_first":  y = m exp(log_s) + t        m = (y - t) exp(-log_s)
    log|det| = +sum(log_s) forward, -sum(log_s) inverse

Shapes: x [B, C, ...], params [B, 2 C_moved, ...], y like x, log_det [B].
An odd C splits unequally: the first half has ceil(C / 2) channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scale_maps import ScaleMap

__all__ = ["HALVES", "LAYOUTS", "ORDERS", "affine_coupling", "split_sizes"]

ORDERS = ("shift_first", "scale_first")
LAYOUTS = ("halves", "interleaved")
HALVES = ("first", "second")


def split_sizes(features: int) -> tuple[int, int]:
    """Channels of the first and of the second half: ceil(C / 2), floor(C / 2)."""
    return (features + 1) // 2, features // 2


def affine_coupling(
    x: Tensor,
    params: Tensor,
    scale_map: ScaleMap,
    *,
    order: str = "shift_first",
    layout: str = "halves",
    moves: str = "first",
    inverse: bool = False,
    log_det: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = (m + t) exp(log_s) on the moved half m of x, the other half copied; or its inverse.

    Args:
        x: [B, C, ...], C >= 2.
        params: [B, 2 C_moved, ...], the conditioner's output: [shift | raw] along
            dim 1 (layout "halves"), or shift and raw in turn (layout "interleaved").
        scale_map: turns raw into log_s.
        order: "shift_first" (the Linearizer paper) or "scale_first" (RealNVP).
        moves: which half moves, "first" or "second".
        inverse: undo instead of do.
        log_det: also return log|det| of what was done, [B], at least fp32.

    Shift, scale and the sum are computed in fp32 or wider; y has x's dtype.

    Raises:
        ValueError: an unknown option, or params whose shape does not fit x.
    """
    _check(x, params, order, layout, moves)
    first, second = x.split(split_sizes(x.shape[1]), dim=1)
    moved = first if moves == "first" else second
    out, log_s = _couple(moved, params, scale_map, order, layout, inverse)
    y = torch.cat((out, second) if moves == "first" else (first, out), dim=1)
    if not log_det:
        return y, None
    total = log_s.sum(dim=tuple(range(1, log_s.ndim)))
    return y, -total if inverse else total


def _couple(
    moved: Tensor, params: Tensor, scale_map: ScaleMap, order: str, layout: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(moved.dtype, torch.float32)
    if layout == "halves":
        shift, raw = params.chunk(2, dim=1)
    else:
        shift, raw = params[:, 0::2], params[:, 1::2]
    shift, log_s = shift.to(compute), scale_map.log_scale(raw.to(compute))
    value = moved.to(compute)
    if not inverse:
        out = (value + shift) * log_s.exp() if order == "shift_first" else value * log_s.exp() + shift
    elif order == "shift_first":
        out = value * (-log_s).exp() - shift
    else:
        out = (value - shift) * (-log_s).exp()
    return out.to(moved.dtype), log_s


def _check(x: Tensor, params: Tensor, order: str, layout: str, moves: str) -> None:
    for name, value, allowed in (
        ("order", order, ORDERS),
        ("layout", layout, LAYOUTS),
        ("moves", moves, HALVES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if x.ndim < 2 or x.shape[1] < 2:
        raise ValueError(f"x must be [B, C, ...] with C >= 2; got {tuple(x.shape)}")
    channels = split_sizes(x.shape[1])[HALVES.index(moves)]
    expected = (x.shape[0], 2 * channels, *x.shape[2:])
    if params.shape != expected:
        raise ValueError(
            f"params must be {expected} for x {tuple(x.shape)} with moves={moves!r}; got {tuple(params.shape)}"
        )
