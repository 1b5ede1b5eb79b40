"""GroupNorm, an affine map, a time embedding's scale and shift, and SiLU, on [batch, channel, position].

A group is n = (C / groups) P elements of one sample. With its mean m and r = (var + eps)^-1/2:

    h = (x - m) r        v = h w + b        u = v (1 + s) + t        y = u sigmoid(u)   or   u

w, b are [C], s, t are [B, C]. Gradients, with g = dL/dy, d = g silu'(u) and the sums over positions
S1 = sum(d), S2 = sum(d h), both [B, C], and a = w (1 + s):

    dt = S1                          db = sum_b (1 + s) S1
    ds = w S2 + b S1                 dw = sum_b (1 + s) S2
    dx = r (a d - sum_c(a S1) / n - h sum_c(a S2) / n)

so x, m and r are saved, but not h, v or u. Bytes per sample in fp32, forward: 8 C P to read x and write y;
backward: 12 C P to read x and g and write dx, and S1 and S2 once.

A program computes one group of one sample. A group that fits in one tile stays in registers and is read once; a
larger one is read again for the variance and for the output, mostly from L2. The variance is computed from centred
values. Torch sums S1 and S2 over the batch: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, needs_int64, positions, power_of_two
from .math import sigmoid

# (elements of a tile, warps), smallest first. A group takes the first tile that holds it, else several of the last.
BUDGETS: tuple[tuple[int, int], ...] = (
    (1024, 4),  # small groups: 8 elements per thread, many programs per SM
    (4096, 8),  # 16 per thread
    (16384, 16),  # 32 per thread: a group of 16 channels at 32 x 32 is still read once
)
# The backward holds x and the gradient: half as many elements per thread.
BACKWARD_BUDGETS: tuple[tuple[int, int], ...] = ((1024, 4), (4096, 8), (8192, 16))


@triton.jit
def _block(
    c0, p0, count, PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, INT64: tl.constexpr
):
    """Channel in the group, position, and which of the tile are inside."""
    c = (c0 + tl.arange(0, CHANNELS))[:, None]
    p = (p0 + tl.arange(0, POSITIONS))[None, :]
    inside = (c < PER_GROUP) & (p < count)
    if INT64:
        c = c.to(tl.int64)
        p = p.to(tl.int64)
    return c, p, inside


@triton.jit
def _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_s, c, inside):
    """w, b, 1 + s and t of channels c, in fp32; 1 and 0 where not given."""
    weight = tl.full(c.shape, 1.0, tl.float32)
    bias = tl.full(c.shape, 0.0, tl.float32)
    gain = tl.full(c.shape, 1.0, tl.float32)
    shift = tl.full(c.shape, 0.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        gain = 1.0 + tl.load(scale_ptr + c * stride_s, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + c * stride_s, mask=inside, other=0.0).to(tl.float32)
    return weight, bias, gain, shift


@triton.jit
def _group_norm_silu_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, n_groups, count,
    stride_xb, stride_xc, stride_xp, stride_yb, stride_yc, stride_yp, stride_sb, stride_sc, eps,
    ACTIVATION: tl.constexpr,
    ONE_TILE: tl.constexpr, INT64: tl.constexpr, PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    b = at // n_groups
    first = (at - b * n_groups) * PER_GROUP
    if INT64:
        b = b.to(tl.int64)
        first = first.to(tl.int64)
    x_ptr += b * stride_xb + first * stride_xc
    y_ptr += b * stride_yb + first * stride_yc
    if scale_ptr is not None:
        scale_ptr += b * stride_sb
    if shift_ptr is not None:
        shift_ptr += b * stride_sb
    n = 1.0 * count * PER_GROUP

    if ONE_TILE:
        c, p, inside = _block(0, 0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
        x = tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x) / n
        centred = tl.where(inside, x - mean, 0.0)
        squares = tl.sum(centred * centred)
    else:
        total = tl.zeros((CHANNELS, POSITIONS), tl.float32)
        for c0 in range(0, PER_GROUP, CHANNELS):
            for p0 in range(0, count, POSITIONS):
                c, p, inside = _block(c0, p0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
                total += tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(total) / n
        total = tl.zeros((CHANNELS, POSITIONS), tl.float32)
        for c0 in range(0, PER_GROUP, CHANNELS):
            for p0 in range(0, count, POSITIONS):
                c, p, inside = _block(c0, p0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
                x = tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)
                centred = tl.where(inside, x - mean, 0.0)
                total += centred * centred
        squares = tl.sum(total)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / n + eps))
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, rstd)

    for c0 in range(0, PER_GROUP, CHANNELS):
        c, p, inside = _block(c0, 0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
        weight, bias, gain, shift = _affine(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_sc, first + c, c < PER_GROUP
        )
        for p0 in range(0, POSITIONS if ONE_TILE else count, POSITIONS):
            c, p, inside = _block(c0, p0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
            if not ONE_TILE:
                x = tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)
            u = ((x - mean) * rstd * weight + bias) * gain + shift
            y = u * sigmoid(u) if ACTIVATION else u
            tl.store(y_ptr + c * stride_yc + p * stride_yp, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _slope(x, grad, mean, rstd, weight, bias, gain, shift, ACTIVATION: tl.constexpr):
    """(dL/du, h); dL/du is 0 where grad is."""
    h = (x - mean) * rstd
    if ACTIVATION:
        u = (h * weight + bias) * gain + shift
        s = sigmoid(u)
        grad = grad * (s * (1.0 + u * (1.0 - s)))
    return grad, h


@triton.jit
def _keep_sums(sum_ptr, sum_h_ptr, d, dh, a, c, inside, SUMS: tl.constexpr):
    """Store S1 and S2 of channels c, and return sum_c(a S1) and sum_c(a S2)."""
    channel_sum = tl.sum(d, 1)[:, None]
    channel_sum_h = tl.sum(dh, 1)[:, None]
    if SUMS:
        tl.store(sum_ptr + c, channel_sum, mask=inside)
        tl.store(sum_h_ptr + c, channel_sum_h, mask=inside)
    return tl.sum(channel_sum * a), tl.sum(channel_sum_h * a)


@triton.jit
def _group_norm_silu_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, grad_ptr, dx_ptr, sum_ptr, sum_h_ptr,
    n_groups, count, stride_xb, stride_xc, stride_xp, stride_gb, stride_gc, stride_gp, stride_db, stride_dc,
    stride_dp, stride_sb, stride_sc, ACTIVATION: tl.constexpr, ONE_TILE: tl.constexpr, SUMS: tl.constexpr,
    INPUT: tl.constexpr, INT64: tl.constexpr, PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    b = at // n_groups
    first = (at - b * n_groups) * PER_GROUP
    if INT64:
        b = b.to(tl.int64)
        first = first.to(tl.int64)
    x_ptr += b * stride_xb + first * stride_xc
    grad_ptr += b * stride_gb + first * stride_gc
    dx_ptr += b * stride_db + first * stride_dc
    if scale_ptr is not None:
        scale_ptr += b * stride_sb
    if shift_ptr is not None:
        shift_ptr += b * stride_sb
    sum_ptr += at * PER_GROUP
    sum_h_ptr += at * PER_GROUP
    mean = tl.load(mean_ptr + at)
    rstd = tl.load(rstd_ptr + at)
    n = 1.0 * count * PER_GROUP

    if ONE_TILE:
        c, p, inside = _block(0, 0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
        weight, bias, gain, shift = _affine(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_sc, first + c, c < PER_GROUP
        )
        x = tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + c * stride_gc + p * stride_gp, mask=inside, other=0.0).to(tl.float32)
        d, h = _slope(x, grad, mean, rstd, weight, bias, gain, shift, ACTIVATION)
        a = weight * gain
        all_d, all_dh = _keep_sums(sum_ptr, sum_h_ptr, d, d * h, a, c, c < PER_GROUP, SUMS)
        if INPUT:
            dx = rstd * (d * a - all_d / n - h * (all_dh / n))
            tl.store(dx_ptr + c * stride_dc + p * stride_dp, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    else:
        all_d = 0.0
        all_dh = 0.0
        for c0 in range(0, PER_GROUP, CHANNELS):
            c, p, inside = _block(c0, 0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
            weight, bias, gain, shift = _affine(
                weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_sc, first + c, c < PER_GROUP
            )
            sum_d = tl.zeros((CHANNELS, POSITIONS), tl.float32)
            sum_dh = tl.zeros((CHANNELS, POSITIONS), tl.float32)
            for p0 in range(0, count, POSITIONS):
                c, p, inside = _block(c0, p0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
                x = tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)
                grad = tl.load(grad_ptr + c * stride_gc + p * stride_gp, mask=inside, other=0.0).to(tl.float32)
                d, h = _slope(x, grad, mean, rstd, weight, bias, gain, shift, ACTIVATION)
                sum_d += d
                sum_dh += d * h
            a = weight * gain
            one_d, one_dh = _keep_sums(sum_ptr, sum_h_ptr, sum_d, sum_dh, a, c, c < PER_GROUP, SUMS)
            all_d += one_d
            all_dh += one_dh
        for c0 in range(0, PER_GROUP if INPUT else 0, CHANNELS):
            c, p, inside = _block(c0, 0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
            weight, bias, gain, shift = _affine(
                weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_sc, first + c, c < PER_GROUP
            )
            for p0 in range(0, count, POSITIONS):
                c, p, inside = _block(c0, p0, count, PER_GROUP, CHANNELS, POSITIONS, INT64)
                x = tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)
                grad = tl.load(grad_ptr + c * stride_gc + p * stride_gp, mask=inside, other=0.0).to(tl.float32)
                d, h = _slope(x, grad, mean, rstd, weight, bias, gain, shift, ACTIVATION)
                dx = rstd * (d * (weight * gain) - all_d / n - h * (all_dh / n))
                tl.store(dx_ptr + c * stride_dc + p * stride_dp, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _parameters(*parameters: Tensor | None) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """((weight and bias with stride 1, scale and shift with equal strides), the latter's strides)."""
    weight, bias, scale, shift = (t if t is None or t.ndim == 2 else t.contiguous() for t in parameters)
    if scale is not None and shift is not None and scale.stride() != shift.stride():
        scale, shift = scale.contiguous(), shift.contiguous()
    strided = shift if scale is None else scale
    return (weight, bias, scale, shift), (0, 0) if strided is None else strided.stride()


def _shape(x: Tensor, groups: int, budgets: tuple[tuple[int, int], ...]) -> dict[str, int]:
    """A launch's constants for groups of x [B, C, P]: a tile's channels and positions, and if it holds a group."""
    per_group, count = x.shape[1] // groups, x.shape[2]
    rows, columns = power_of_two(per_group), power_of_two(count)
    elements, warps = next((b for b in budgets if rows * columns <= b[0]), budgets[-1])
    if x.stride(1) < x.stride(2) or count == 1:  # channels innermost
        rows = min(rows, elements)
        columns = min(columns, elements // rows)
    else:
        columns = min(columns, elements)
        rows = min(rows, elements // columns)
    sizes = {"PER_GROUP": per_group, "CHANNELS": rows, "POSITIONS": columns, "num_warps": warps}
    return {"ONE_TILE": rows >= per_group and columns >= count, **sizes}


def launch_group_norm_silu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int,
    eps: float, activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y like x, mean and rstd [B, groups] fp32)."""
    view = positions(x)
    y = torch.empty_like(view)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return y.view(x.shape), mean, rstd
    parameters, strides = _parameters(weight, bias, scale, shift)
    _group_norm_silu_kernel[(x.shape[0] * groups,)](
        view, *parameters, y, mean, rstd, groups, view.shape[2], *view.stride(), *y.stride(), *strides, eps,
        ACTIVATION=activation, INT64=needs_int64(view, y, *parameters),
        **_shape(view, groups, BUDGETS), **UNFUSED,
    )  # fmt: skip
    return y.view(x.shape), mean, rstd


def launch_group_norm_silu_backward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, mean: Tensor,
    rstd: Tensor, grad: Tensor | None, grad_mean: Tensor | None, grad_rstd: Tensor | None, groups: int, eps: float,
    activation: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dweight, dbias, dscale, dshift), each like its tensor; None where not needed.

    No caller differentiates mean and rstd, so that their gradients are None.
    """
    view = positions(x)
    g = positions(x.new_zeros(()).expand_as(x) if grad is None else grad)
    dx = torch.empty_like(view) if needs[0] else x.new_empty((0, 0, 0), dtype=torch.float32)
    sums = x.new_zeros if x.numel() == 0 else x.new_empty
    s1, s2 = (sums(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        parameters, strides = _parameters(weight, bias, scale, shift)
        _group_norm_silu_backward_kernel[(x.shape[0] * groups,)](
            view, *parameters, mean, rstd, g, dx, s1, s2, groups, view.shape[2],
            *view.stride(), *g.stride(), *dx.stride(), *strides,
            ACTIVATION=activation, SUMS=any(needs[1:]), INPUT=needs[0],
            INT64=needs_int64(view, g, dx, *parameters), **_shape(view, groups, BACKWARD_BUDGETS),
            **UNFUSED,
        )  # fmt: skip
    gradients = _parameter_gradients(s1, s2, (weight, bias, scale, shift), needs)
    return (dx.view(x.shape) if needs[0] else None, *gradients)


def _parameter_gradients(
    s1: Tensor, s2: Tensor, parameters: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(dweight, dbias, dscale, dshift) from S1 and S2 [B, C]; None where not needed."""
    weight, bias, scale, shift = parameters
    gain = 1.0 if scale is None else 1.0 + scale.float()
    dweight = (s2 * gain).sum(0).to(weight.dtype) if needs[1] and weight is not None else None
    dbias = (s1 * gain).sum(0).to(bias.dtype) if needs[2] and bias is not None else None
    dscale = None
    if needs[3] and scale is not None:
        dscale = s2 if weight is None else s2 * weight.float()
        dscale = (dscale if bias is None else dscale + s1 * bias.float()).to(scale.dtype)
    dshift = s1.to(shift.dtype) if needs[4] and shift is not None else None
    return dweight, dbias, dscale, dshift
