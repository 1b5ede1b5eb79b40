"""The conditioners of the reference repository: the DDPM++ U-Net (Song et al., 2021) in EDM's form.

    block   h = conv0(silu(norm0(x)));  h = silu(norm1(h + affine(emb))), or silu(norm1(h) (1 + scale) + shift)
            x = (skip(x) + conv1(dropout(h))) skip_scale;  x = (x + proj(attention(norm2(x)))) skip_scale

What is different from the original:
attention by scaled_dot_product_attention, which keeps no N x N weights; GroupNorm and SiLU in one op, or on
a CPU computed again in the backward and not kept; biases inside the convolutions, and a time that is the same
for the whole batch embedded once and added to the bias; resampling with the filter [1, 1] as mean and
nearest-neighbour. Dropout draws the same masks. What is around the blocks is in ``reference_song``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..flows.memory import inverts
from .adapter import Draw, Options, Plan, Unfit
from .norm_silu import norm_silu
from .reference import has, reference_adapter

__all__ = ["ADAPTERS", "AFFINE", "last_convs", "move_off_zero"]

AFFINE = "_linfast_affine"
"""Attribute of an embedding: every block's ``affine`` of it, where that was computed once for many calls."""


# Convolution with resampling


def _plan_conv(conv: Any, options: Options) -> Plan:
    _check_conv(conv)
    return Plan("convolution with its bias")


def _check_conv(conv: Any) -> None:
    if not has("up", "down", "resample_filter", "weight", "bias")(conv):
        raise Unfit(f"its {type(conv).__name__} is not the repository's Conv2d")
    if conv.up or conv.down:
        if getattr(conv, "fused_resample", False):
            raise Unfit("resampling fused into the convolution")
        if conv.resample_filter.shape != (1, 1, 2, 2) or not bool((conv.resample_filter == 0.25).all()):
            raise Unfit("a resampling filter other than [1, 1]")


def _conv(conv: Any, x: Tensor) -> Tensor:
    return _convolve(conv, x, None)


def _convolve(conv: Any, x: Tensor, extra_bias: Tensor | None) -> Tensor:
    """Resample, convolve, add the bias, and with it ``extra_bias`` [C]."""
    if conv.up:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    if conv.down:
        x = F.avg_pool2d(x, 2)
    if conv.weight is None:
        return x
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    if extra_bias is not None:
        bias = extra_bias if bias is None else bias + extra_bias
    return F.conv2d(x, conv.weight.to(x.dtype), bias, padding=conv.weight.shape[-1] // 2)


def _probe_conv(conv: Any, draw: Draw) -> Sequence[Tensor]:
    return [conv.forward(draw(2, conv.in_channels, 4, 6))]


# U-Net block


def _plan_block(block: Any, options: Options) -> Plan:
    for conv in (block.conv0, block.conv1, block.skip, *((block.qkv, block.proj) if block.num_heads else ())):
        if conv is not None:
            _check_conv(conv)
    for norm in _norms(block):
        if not has("num_groups", "eps", "weight", "bias")(norm):
            raise Unfit(f"its {type(norm).__name__} is not the repository's GroupNorm")
    return Plan("GroupNorm + SiLU, attention by SDPA" if block.num_heads else "GroupNorm + SiLU")


def _norms(block: Any) -> tuple[nn.Module, ...]:
    return (block.norm0, block.norm1, *((block.norm2,) if block.num_heads else ()))


def _inner(block: Any) -> tuple[nn.Module, ...]:
    convs = (block.conv0, block.conv1, block.skip, *((block.qkv, block.proj) if block.num_heads else ()))
    return (*_norms(block), *(conv for conv in convs if conv is not None))


def _block(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    ready = getattr(emb, AFFINE, None)
    params = (block.affine(emb) if ready is None else ready[block]).to(x.dtype)
    h = norm_silu(x, block.norm0)
    if block.adaptive_scale:
        scale, shift = params.chunk(2, 1)
        h = norm_silu(_convolve(block.conv0, h, None), block.norm1, _rows(scale, x), _rows(shift, x))
    else:
        shared = params.shape[0] == 1
        h = _convolve(block.conv0, h, params[0] if shared else None)
        h = norm_silu(h if shared else h + params[:, :, None, None], block.norm1)
    if block.training and block.dropout:  # the mask follows the order in memory, which without gradients may differ
        h = F.dropout(h.contiguous(), p=block.dropout)
    h = _convolve(block.conv1, h, None)
    skip = x if block.skip is None else _convolve(block.skip, x, None)
    x = h.add_(skip).mul_(block.skip_scale)
    if block.num_heads:
        x = _attend(block, x).add_(x).mul_(block.skip_scale)
    return x


def _rows(params: Tensor, x: Tensor) -> Tensor:
    return params.expand(x.shape[0], -1)


def _attend(block: Any, x: Tensor) -> Tensor:
    """proj(attention(norm2(x))); the channels of qkv are q, k and v in turn."""
    qkv = _convolve(block.qkv, norm_silu(x, block.norm2, activation=False), None)
    shape = (x.shape[0], block.num_heads, x.shape[1] // block.num_heads, 3, x.shape[2:].numel())
    q, k, v = qkv.reshape(shape).permute(3, 0, 1, 4, 2).contiguous().unbind(0)
    if inverts("invert", x, 0.0):
        a = _Attention.apply(q, k, v)
    else:
        a = _attention(q, k, v, plain=torch.is_grad_enabled() and not torch.compiler.is_compiling())
    return _convolve(block.proj, a.transpose(2, 3).reshape(x.shape), None)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, plain: bool = False) -> Tensor:
    """``plain``: by torch's own operations; the other kernels have no forward and no second derivatives."""
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


class _Attention(torch.autograd.Function):
    """One kernel's first derivatives, whose graph serves one backward; any others are computed again."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        ctx.kept = ctx.needs_input_grad[0] and _with_graph(given)
        return ctx.kept[0].detach() if ctx.kept else _attention(*given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # create_graph
            given = [t.view_as(t) for t in ctx.saved_tensors]
            return torch.autograd.grad(_attention(*given, plain=True), given, gradients, create_graph=True)
        a, given = ctx.kept or _with_graph(ctx.saved_tensors)
        ctx.kept = None
        return torch.autograd.grad(a, given, gradients)


def _with_graph(given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    own = [t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        return _attention(*own), own


def last_convs(block: Any) -> tuple[nn.Module, ...]:
    return (block.conv1, block.proj) if block.num_heads else (block.conv1,)


def move_off_zero(draw: Draw, *convs: Any) -> None:
    """Fresh networks end in weights of 1e-5, which would hide what comes before them."""
    for conv in convs:
        conv.weight = nn.Parameter(0.3 * draw(*conv.weight.shape).detach())


def _probe_block(block: Any, draw: Draw) -> Sequence[Tensor]:
    move_off_zero(draw, *last_convs(block))
    emb = block.affine.in_features
    x = (block.in_channels, 4, 4)
    return [block.forward(draw(2, *x), draw(2, emb)), block.forward(draw(2, *x), draw(1, emb))]


_LAYERS = ("norm0", "conv0", "affine", "norm1", "conv1", "skip")
_SETTINGS = ("skip_scale", "adaptive_scale", "num_heads", "dropout")

ADAPTERS = (
    reference_adapter(
        "Conv2d", has("resample_filter"), methods={"forward": _conv}, plan=_plan_conv, probe=_probe_conv
    ),
    reference_adapter(
        "UNetBlock",
        has(*_LAYERS, *_SETTINGS),
        methods={"forward": _block},
        plan=_plan_block,
        probe=_probe_block,
        inner=_inner,
        tolerance=1e-6,  # the original's attention drops to float32
    ),
)
