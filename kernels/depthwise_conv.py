"""Depthwise "same" correlation of [B, C, H, W] with a kh x kw kernel per channel, shared or per sample.

With l = (k - 1) // 2 in each direction, and zeros outside:

    y[b, c, i, j] = sum_{u, v} w[b, c, u, v] x[b, c, i + u - l_h, j + v - l_w]      and its transpose
    z[b, c, i, j] = sum_{u, v} w[b, c, u, v] x[b, c, i - u + l_h, j - v + l_w]

Gradients: dx is the transpose applied to g = dL/dy, and, with + for the correlation and - for its transpose,

    dw[b, c, u, v] = sum_{i, j} g[b, c, i, j] x[b, c, i +- (u - l_h), j +- (v - l_w)]

summed over b where w is shared. x and w are saved. Bytes: x is read and y written, 8 C H W per sample in fp32; a
program reads its tile of x and the border around it k^2 times, from L1.

A program computes a tile of channels and pixels of one sample; consecutive threads have pixels of a row, or
channels where these are innermost. For dw a program sums over all pixels for the taps of a row, up to MOST_TAPS,
and writes one number per tap and channel: no atomics, the same bits every time. x and g are read once per row of w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, ceil_div, needs_int64, power_of_two

# (whether channels are innermost, tile). 1024 elements over 128 threads are 8 per thread: the loads of a row's taps
# overlap, and 8 sums take few registers.
TILES: dict[bool, Tile] = {
    False: {"CHANNELS": 1, "PIXELS": 1024, "num_warps": 4},  # NCHW: pixels of one channel
    True: {"CHANNELS": 32, "PIXELS": 32, "num_warps": 4},  # channels_last: 32 channels are one 128-byte line
}
MOST_TAPS = 9  # of dw per program, each 8 sums per thread: g is read once for all of them, and x from L1


def choose_tile(x: Tensor) -> tuple[Tile, int]:
    """(the tile for images of x's shape and strides, blocks of channels per sample)."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    tile = dict(TILES[x.stride(1) < x.stride(3)])
    tile["CHANNELS"] = min(tile["CHANNELS"], power_of_two(channels))
    tile["PIXELS"] = min(tile["PIXELS"], max(power_of_two(pixels), 16))
    return tile, ceil_div(channels, tile["CHANNELS"])


@triton.jit
def _channels(program, n_blocks, n_channels, CHANNELS: tl.constexpr, INT64: tl.constexpr):
    """Sample, and the channels [CHANNELS, 1] of this block of channels."""
    b = program // n_blocks
    c = ((program - b * n_blocks) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    if INT64:
        b = b.to(tl.int64)
        c = c.to(tl.int64)
    return b, c


@triton.jit
def _pixels(start, width, PIXELS: tl.constexpr, INT64: tl.constexpr):
    """Row and column [1, PIXELS] of a run of pixels."""
    p = (start + tl.arange(0, PIXELS))[None, :]
    i = p // width
    j = p - i * width
    if INT64:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    return i, j


@triton.jit
def _depthwise_conv_kernel(
    x_ptr, weight_ptr, y_ptr, n_blocks, n_channels, height, width, kh,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_yb, stride_yc, stride_yh, stride_yw,
    stride_wb, stride_wc, stride_wu, stride_wv,
    KW: tl.constexpr, TRANSPOSE: tl.constexpr, INT64: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(height * width, PIXELS)
    block = tl.program_id(0) // n_tiles  # one axis, because a grid's others end at 65,535
    b, c = _channels(block, n_blocks, n_channels, CHANNELS, INT64)
    i, j = _pixels((tl.program_id(0) - block * n_tiles) * PIXELS, width, PIXELS, INT64)
    inside = (c < n_channels) & (i < height)
    sign = -1 if TRANSPOSE else 1
    acc = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for u in range(0, kh):  # a run-time bound: unrolled, 7 x 7 spills on gfx942
        for v in tl.static_range(0, KW):
            row = i + sign * (u - (kh - 1) // 2)
            column = j + sign * (v - (KW - 1) // 2)
            there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            x_at = b * stride_xb + c * stride_xc + row * stride_xh + column * stride_xw
            w_at = b * stride_wb + c * stride_wc + u * stride_wu + v * stride_wv
            weight = tl.load(weight_ptr + w_at, mask=c < n_channels, other=0.0).to(tl.float32)
            acc += weight * tl.load(x_ptr + x_at, mask=there, other=0.0).to(tl.float32)
    y_at = b * stride_yb + c * stride_yc + i * stride_yh + j * stride_yw
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _depthwise_conv_weight_kernel(
    x_ptr, grad_ptr, partial_ptr, n_blocks, n_channels, height, width,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_gb, stride_gc, stride_gh, stride_gw,
    KH: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr, TRANSPOSE: tl.constexpr, INT64: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """TAPS taps of a row of the kernel, for a block of a sample's channels; grid (B blocks, KH cdiv(KW, TAPS))."""
    b, c = _channels(tl.program_id(0), n_blocks, n_channels, CHANNELS, INT64)
    RUNS: tl.constexpr = (KW + TAPS - 1) // TAPS
    u = tl.program_id(1) // RUNS
    first = (tl.program_id(1) - u * RUNS) * TAPS
    sign = -1 if TRANSPOSE else 1
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros((CHANNELS, PIXELS), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for start in range(0, height * width, PIXELS):
        i, j = _pixels(start, width, PIXELS, INT64)
        row = i + sign * (u - (KH - 1) // 2)
        inside = (c < n_channels) & (i < height)
        g_at = b * stride_gb + c * stride_gc + i * stride_gh + j * stride_gw
        grad = tl.load(grad_ptr + g_at, mask=inside, other=0.0).to(tl.float32)
        inside &= (row >= 0) & (row < height)
        new = ()
        for v in tl.static_range(TAPS):
            column = j + sign * (first + v - (KW - 1) // 2)
            x_at = b * stride_xb + c * stride_xc + row * stride_xh + column * stride_xw
            x = tl.load(x_ptr + x_at, mask=inside & (column >= 0) & (column < width), other=0.0)
            new = new + (sums[v] + x.to(tl.float32) * grad,)  # type: ignore[assignment]  # noqa: RUF005
        sums = new
    at = (b * n_channels + c) * (KH * KW) + u * KW + first
    for v in tl.static_range(TAPS):
        total = tl.sum(sums[v], 1)[:, None]
        tl.store(partial_ptr + at + v, total, mask=(c < n_channels) & (first + v < KW))


def _weight_strides(weight: Tensor) -> tuple[int, ...]:
    """(sample, channel, row, column) strides; 0 per sample for a shared kernel."""
    return (0, *weight.stride()) if weight.ndim == 3 else weight.stride()


def launch_depthwise_conv(x: Tensor, weight: Tensor, transpose: bool, like: Tensor | None = None) -> Tensor:
    """y, in the strides of ``like``, or of x."""
    y = torch.empty_like(x if like is None else like)
    if x.numel() == 0:
        return y
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[-2:]
    tile, n_blocks = choose_tile(y)
    _depthwise_conv_kernel[(batch * n_blocks * ceil_div(height * width, tile["PIXELS"]),)](
        x, weight, y, n_blocks, channels, height, width, kh,
        *x.stride(), *y.stride(), *_weight_strides(weight), KW=kw, TRANSPOSE=transpose,
        INT64=needs_int64(x, weight, y), **tile,
    )  # fmt: skip
    return y


def launch_depthwise_conv_backward(
    x: Tensor, weight: Tensor, grad: Tensor, transpose: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx like x and dweight like weight; None where not needed."""
    dx = launch_depthwise_conv(grad, weight, not transpose, like=x) if needs[0] else None
    return dx, _weight_gradient(x, weight, grad, transpose) if needs[1] else None


def _weight_gradient(x: Tensor, weight: Tensor, grad: Tensor, transpose: bool) -> Tensor:
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[-2:]
    if x.numel() == 0:
        return weight.new_zeros(weight.shape)
    partial = x.new_empty((batch, channels, kh, kw), dtype=torch.float32)
    tile, n_blocks = choose_tile(x)
    taps = ceil_div(kw, ceil_div(kw, MOST_TAPS))
    _depthwise_conv_weight_kernel[(batch * n_blocks, kh * ceil_div(kw, taps))](
        x, grad, partial, n_blocks, channels, height, width, *x.stride(), *grad.stride(),
        KH=kh, KW=kw, TAPS=taps, TRANSPOSE=transpose, INT64=needs_int64(x, grad), **tile,
    )  # fmt: skip
    return (partial if weight.ndim == 4 else partial.sum(0)).to(weight.dtype)
