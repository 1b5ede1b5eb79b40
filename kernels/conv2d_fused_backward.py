"""Gradients of conv2d_fused. With g = dL/dy, and a recomputed from x (kernels/conv2d_fused.py):

    da[b, c, i, j] = sum_{o, u, v} W[o, c, u, v] g[b, o, i - u + l, j - v + l]   the forward's kernel, transposed
    dW[o, c, u, v] = sum_{b, i, j} g[b, o, i, j] a[b, c, i + u - l, j + v - l]
    dx, dw, db     through the norm and SiLU from da: kernels/group_norm_silu.py's backward
    dbias = sum g over positions, and over samples where bias is shared          dz = alpha g

x, W, w, b and the [B, groups] means and reciprocal deviations are saved, but neither a nor y.

dW is a sum over the tiles of positions of all samples, split into equal runs. Each run writes a partial sum, and
these are added in a fixed order: no atomics, the same bits every time. A program computes one tap of one run: the
product over ROWS of g [ROWS, C_out] and a [ROWS, C_in]. Bytes: x and g k^2 times, mostly from L2, since the taps of
a run follow one another in the grid; k^2 C_in C_out partial sums per run, written and read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv2d_configs import WEIGHT_TILES, ConvSpec, choose_tile, weight_splits
from .conv2d_fused import activated, apply_conv, mode_of, norm_of_channels, positions_of, silu_form
from .group_norm_silu import launch_group_norm_silu_backward
from .launch import ceil_div, like, needs_int64
from .row_products import dot


@triton.jit(do_not_specialize=["n_steps", "steps_a_split"])
def _conv2d_weight_kernel(
    x_ptr, grad_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, partial_ptr, n_in, n_out, height, width,
    n_row_tiles, n_steps, steps_a_split, groups, stride_xb, stride_xc, stride_xh, stride_xw,
    stride_gb, stride_gc, stride_gh, stride_gw, KERNEL: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
    FORM: tl.constexpr, INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    NORM: tl.constexpr = mean_ptr is not None
    TAPS: tl.constexpr = KERNEL * KERNEL
    split = tl.program_id(0) // TAPS
    tap = tl.program_id(0) - split * TAPS
    u = tap // KERNEL
    v = tap - u * KERNEL
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
    if INT64:
        o, c = o.to(tl.int64), c.to(tl.int64)
    total = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for step in tl.range(0, steps_a_split, num_stages=STAGES):
        program = split * steps_a_split + step
        b = program // n_row_tiles
        i, j = positions_of(program - b * n_row_tiles, width, ROWS, INT64)
        if INT64:
            b = b.to(tl.int64)
        real = (i < height) & (program < n_steps)
        g_at = b * stride_gb + (i * stride_gh + j * stride_gw)[:, None] + (o * stride_gc)[None, :]
        g = tl.load(grad_ptr + g_at, mask=real[:, None] & (o < n_out)[None, :], other=0.0)
        mean = tl.zeros((DEPTH,), tl.float32)
        gain, shift = mean, mean
        if NORM:
            there = (c < n_in) & (program < n_steps)
            of_group = b * groups + c // (n_in // groups)
            mean = tl.load(mean_ptr + of_group, mask=there, other=0.0)
            rstd = tl.load(rstd_ptr + of_group, mask=there, other=0.0)
            mean, gain, shift = norm_of_channels(norm_weight_ptr, norm_bias_ptr, mean, rstd, c, there)
        row = i + u - KERNEL // 2
        column = j + v - KERNEL // 2
        real = real & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        x_at = b * stride_xb + (row * stride_xh + column * stride_xw)[:, None] + (c * stride_xc)[None, :]
        a = activated(x_ptr + x_at, real[:, None] & (c < n_in)[None, :], mean, gain, shift, NORM, FORM)
        total = dot(tl.trans(g), a, total, PARTS, TYPE)
    at = tl.program_id(0) * n_out * n_in + o[:, None] * n_in + c[None, :]
    tl.store(partial_ptr + at, total, mask=(o < n_out)[:, None] & (c < n_in)[None, :])


def launch_conv2d_fused_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    mean: Tensor, rstd: Tensor, grad: Tensor, *rest: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dweight, dbias, dw, db, dresidual, None for x's statistics), each like its tensor, None if not needed.

    Gradients of mean, rstd and y's statistics are ignored: no caller differentiates these.
    """
    _, _, _, *constants, needs = rest
    spec = ConvSpec(*constants)
    dx, dbias, dnorm_weight, dnorm_bias = None, None, None, None
    if needs[0] or needs[3] or needs[4]:
        dx = like(x)
        if x.numel() and weight.shape[0]:
            apply_conv(grad, weight, dx, mode_of(spec, weight.dtype), transpose=True)
        else:
            dx.zero_()
        if spec.groups:
            dx, dnorm_weight, dnorm_bias, _, _ = launch_group_norm_silu_backward(
                x, norm_weight, norm_bias, None, None, mean, rstd, dx, None, None, *spec[:3],
                [needs[0], needs[3], needs[4], False, False],
            )  # fmt: skip
    norm = (norm_weight, norm_bias, *((mean, rstd) if spec.groups else (None, None)))
    dweight = _weight_gradient(x, weight, grad, norm, spec) if needs[1] else None
    if needs[2] and bias is not None:
        dbias = grad.sum((0, 2, 3) if bias.ndim == 1 else (2, 3), dtype=torch.float32).to(bias.dtype)
    dresidual = grad * spec.alpha if needs[5] else None
    return dx if needs[0] else None, dweight, dbias, dnorm_weight, dnorm_bias, dresidual, None


def _weight_gradient(
    x: Tensor, weight: Tensor, grad: Tensor, norm: Sequence[Tensor | None], spec: ConvSpec
) -> Tensor:
    """dW in weight's layout; ``norm``: w, b, mean and rstd."""
    (batch, n_in, height, width), (n_out, _, k, _) = x.shape, weight.shape
    dweight = torch.empty_like(weight)
    if x.numel() == 0 or n_out == 0:
        return dweight.zero_()
    mode = mode_of(spec, weight.dtype)
    tile = choose_tile(max(n_in, n_out), height * width, WEIGHT_TILES, mode.parts)
    row_tiles = ceil_div(height * width, tile["ROWS"])
    splits, steps = weight_splits(batch * row_tiles)
    partial = x.new_empty((splits, k, k, n_out, n_in), dtype=torch.float32)
    grid = (splits * k * k, ceil_div(n_out, tile["COLUMNS"]), ceil_div(n_in, tile["DEPTH"]))
    _conv2d_weight_kernel[grid](
        x, grad, *(t if t is None else t.contiguous() for t in norm), partial, n_in, n_out, height, width,
        row_tiles, batch * row_tiles, steps, max(spec.groups, 1), *x.stride(), *grad.stride(), KERNEL=k,
        FORM=silu_form(x, spec), INT64=needs_int64(x, grad, partial), **mode.constexprs, **tile,
    )  # fmt: skip
    return dweight.copy_(partial.sum(0).permute(2, 3, 0, 1))
