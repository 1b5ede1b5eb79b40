"""A k x k convolution of [B, C, H, W] as an implicit matrix product, with the norm before it and the sum after it.

m and r are mean and reciprocal deviation of each group of channels, l = k // 2; a, not x, is padded with zeros:

    a[b, c, i, j] = silu((x - m) r w_c + b_c)                    or without the SiLU, or x itself
    y[b, o, i, j] = sum_{c, u, v} W[o, c, u, v] a[b, c, i + u - l, j + v - l] + bias[(b,) o] + alpha z[b, o, i, j]

A program computes ROWS positions of one sample by COLUMNS output channels. For every DEPTH input channels and each
of the k^2 taps it multiplies [ROWS, DEPTH] of a, computed from x as it is loaded, by [DEPTH, COLUMNS] of W, in the
modes of kernels/mlp.py with fp32 sums. a is never stored, but computed for every tap, from x in L1. m and r are
computed from statistics of tiles (kernels/group_statistics.py), which each program adds up for its channels; it can
write such statistics of y for the next norm. The transposed convolution of the backward is the same kernel on W
with input and output channels swapped and taps reversed, both by strides.

Bytes: x k^2 times from L1 and about once from memory, W from L2, z and y once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv2d_configs import ConvSpec, choose_tile, empty_outputs, padded_group, tile_rows_of
from .group_statistics import group_moments, grouped_channels, launch_group_statistics, store_group_tiles
from .launch import ceil_div, needs_int64
from .mlp import activate, activation_form
from .row_products import Mode, dot

_SILU = tl.constexpr(1)
_PLAIN = tl.constexpr(-1)


@triton.jit
def positions_of(tile, width, ROWS: tl.constexpr, INT64: tl.constexpr):
    """Row and column of the positions [ROWS] of a tile."""
    p = tile * ROWS + tl.arange(0, ROWS)
    i = p // width
    j = p - i * width
    if INT64:
        i, j = i.to(tl.int64), j.to(tl.int64)
    return i, j


@triton.jit
def norm_of_channels(weight_ptr, bias_ptr, mean, rstd, c, inside):
    """(m, r w, b) of channels c; w and b are 1 and 0 where not given."""
    gain = rstd
    shift = tl.zeros(c.shape, tl.float32)
    if weight_ptr is not None:
        gain *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return mean, gain, shift


@triton.jit
def activated(at, inside, mean, gain, shift, NORM: tl.constexpr, FORM: tl.constexpr):
    """a at these addresses, 0 outside; FORM -1 is no SiLU."""
    a = tl.load(at, mask=inside, other=0.0)
    if NORM:
        a = (a.to(tl.float32) - mean[None, :]) * gain[None, :] + shift[None, :]
        if FORM != _PLAIN:
            a = activate(a, _SILU, FORM)
        a = tl.where(inside, a, 0.0)
    return a


@triton.jit
def _conv2d_fused_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, tiles_ptr, y_ptr, mean_ptr,
    rstd_ptr, next_ptr, n_in, n_out, height, width, n_row_tiles, groups, n_tiles, tile_rows, next_groups, n_taps,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_rb, stride_rc, stride_rh, stride_rw,
    stride_yb, stride_yc, stride_yh, stride_yw, stride_wo, stride_wc, stride_wu, stride_wv,
    stride_bb, stride_bo, eps, alpha, KERNEL: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
    FORM: tl.constexpr, PER_GROUP: tl.constexpr, PADDED: tl.constexpr, INT64: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NORM: tl.constexpr = tiles_ptr is not None
    program = tl.program_id(0)
    b = program // n_row_tiles
    tile = program - b * n_row_tiles
    i, j = positions_of(tile, width, ROWS, INT64)
    o, real = grouped_channels(tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), PER_GROUP, PADDED)
    k = tl.arange(0, DEPTH)
    if INT64:
        b, o, k = b.to(tl.int64), o.to(tl.int64), k.to(tl.int64)
    real = real & (o < n_out)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, n_in, DEPTH):
        c = first + k
        mean = tl.zeros((DEPTH,), tl.float32)
        gain, shift = mean, mean
        if NORM:
            per_group = n_in // groups
            group = c // per_group
            mean, rstd = group_moments(
                tiles_ptr, b, group, c < n_in, n_tiles, groups, tile_rows, height * width, per_group, eps
            )
            keeps = (c < n_in) & (c == group * per_group) & (tile == 0) & (tl.program_id(1) == 0)
            tl.store(mean_ptr + b * groups + group, mean, mask=keeps)
            tl.store(rstd_ptr + b * groups + group, rstd, mask=keeps)
            mean, gain, shift = norm_of_channels(norm_weight_ptr, norm_bias_ptr, mean, rstd, c, c < n_in)
        x_at = x_ptr + b * stride_xb + (c * stride_xc)[None, :]
        w_at = weight_ptr + (c * stride_wc)[:, None] + (o * stride_wo)[None, :]
        w_inside = (c < n_in)[:, None] & real[None, :]
        for tap in tl.range(0, n_taps, num_stages=STAGES):  # a run-time bound: unrolled, it spills
            u = tap // KERNEL
            v = tap - u * KERNEL
            row = i + u - KERNEL // 2
            column = j + v - KERNEL // 2
            there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            inside = there[:, None] & (c < n_in)[None, :]
            at = x_at + (row * stride_xh + column * stride_xw)[:, None]
            a = activated(at, inside, mean, gain, shift, NORM, FORM)
            w = tl.load(w_at + u * stride_wu + v * stride_wv, mask=w_inside, other=0.0)
            total = dot(a, w, total, PARTS, TYPE)

    inside = (i < height)[:, None] & real[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + b * stride_bb + o * stride_bo, mask=real, other=0.0)
        total += bias.to(tl.float32)[None, :]
    if residual_ptr is not None:
        at = b * stride_rb + (i * stride_rh + j * stride_rw)[:, None] + (o * stride_rc)[None, :]
        total += alpha * tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = total.to(y_ptr.dtype.element_ty)
    at = b * stride_yb + (i * stride_yh + j * stride_yw)[:, None] + (o * stride_yc)[None, :]
    tl.store(y_ptr + at, y, mask=inside)
    if next_ptr is not None:
        count = tl.minimum(height * width - tile * ROWS, ROWS)
        store_group_tiles(
            next_ptr, y.to(tl.float32), inside, count, program, 0, next_groups, COLUMNS, PER_GROUP, PADDED
        )  # fmt: skip


def mode_of(spec: ConvSpec, dtype: torch.dtype) -> Mode:
    """The operands' number of parts and their dtype; 16-bit weights are one part of their own dtype."""
    return Mode.of(dtype, spec.precision, spec.part_dtype)


def silu_form(x: Tensor, spec: ConvSpec) -> int:
    """The form of the prologue's SiLU (kernels/mlp.py); -1 for no SiLU."""
    return activation_form(x, spec.precision) if spec.activation else -1


def apply_conv(
    x: Tensor, weight: Tensor, y: Tensor, mode: Mode, *, transpose: bool = False, bias: Tensor | None = None,
    norm: Sequence[Tensor | None] = (None, None), moments: Sequence[Tensor | None] = (None, None, None),
    eps: float = 0.0, form: int = -1, residual: Tensor | None = None, alpha: float = 0.0,
    next_tiles: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the formula above to y, or the transpose of the convolution applied to x.

    ``norm`` is (w, b). ``moments``: reads the statistics of x, writes mean and rstd; all None for no norm.
    ``next_tiles`` receives the statistics of y.
    """
    wo, wc, wu, wv = weight.stride()
    first_tap, strides = weight, (wo, wc, wu, wv)
    if transpose:
        first_tap, strides = weight[:, :, -1:, -1:], (wc, wo, -wu, -wv)
    (height, width), n_in, n_out = x.shape[2:], x.shape[1], y.shape[1]
    tile = choose_tile(n_out, height * width, parts=mode.parts)
    row_tiles = ceil_div(height * width, tile["ROWS"])
    tiles, mean, rstd = moments
    n_tiles, groups = (1, 1) if tiles is None else tiles.shape[1:3]
    next_groups = 0 if next_tiles is None else next_tiles.shape[2]
    per_group = n_out // next_groups if next_groups else 1
    column_blocks = 1 if next_groups else ceil_div(n_out, tile["COLUMNS"])
    norm_weight, norm_bias = (t if t is None else t.contiguous() for t in norm)
    _conv2d_fused_kernel[(x.shape[0] * row_tiles, column_blocks)](
        x, first_tap, bias, norm_weight, norm_bias, residual, tiles, y, mean, rstd, next_tiles,
        n_in, n_out, height, width, row_tiles, groups, n_tiles, tile_rows_of(n_tiles, height * width),
        next_groups, weight.shape[2] ** 2, *x.stride(), *(y if residual is None else residual).stride(),
        *y.stride(), *strides, *_bias_strides(bias), eps, alpha, KERNEL=weight.shape[2], FORM=form,
        PER_GROUP=per_group, PADDED=padded_group(n_out, next_groups), INT64=needs_int64(x, weight, y, residual),
        **mode.constexprs, **tile,
    )  # fmt: skip


def _bias_strides(bias: Tensor | None) -> tuple[int, int]:
    if bias is None:
        return 0, 0
    return (0, bias.stride(0)) if bias.ndim == 1 else (bias.stride(0), bias.stride(1))


def launch_conv2d_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: Tensor | None, tiles: Tensor | None, *constants: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(y, x's mean and rstd, y's statistics), laid out by ``empty_outputs``."""
    spec = ConvSpec(*constants)
    y, mean, rstd, next_tiles = empty_outputs(x, weight, residual, spec)
    if x.numel() == 0 or weight.shape[0] == 0:
        return y, mean, rstd, next_tiles
    if spec.groups and tiles is None:
        tiles = launch_group_statistics(x, spec.groups)
    apply_conv(
        x, weight, y, mode_of(spec, weight.dtype), bias=bias, norm=(norm_weight, norm_bias),
        moments=(tiles, mean, rstd) if spec.groups else (None, None, None), eps=spec.eps, form=silu_form(x, spec),
        residual=residual, alpha=spec.alpha, next_tiles=next_tiles if spec.next_groups else None,
    )  # fmt: skip
    return y, mean, rstd, next_tiles
