"""The conditioners of the reference repository: the DDPM++ U-Net (Song et al., 2021) in EDM's form.

    block   h = conv0(silu(norm0(x)));  h = silu(norm1(h + affine(emb))), or silu(norm1(h) (1 + scale) + shift)
            x = (skip(x) + conv1(dropout(h))) skip_scale;  x = (x + proj(attention(norm2(x)))) skip_scale

What is different from the original:
attention by scaled_dot_product_attention, which keeps no N x N weights; GroupNorm and SiLU in one op, or on
a CPU computed again in the backward and not kept; biases inside the convolutions, and a time that is the same
for the whole batch embedded once and added to the bias; resampling with the filter [1, 1] as mean and
nearest-neighbour. Dropout draws the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter, Draw, Options, Plan, Unfit
from .identity import original_class
from .norm_silu import norm_silu
from .reference import LIBRARY, has

__all__ = ["ADAPTERS"]


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
    params = block.affine(emb).to(x.dtype)
    h = norm_silu(x, block.norm0)
    if block.adaptive_scale:
        scale, shift = params.chunk(2, 1)
        h = norm_silu(_convolve(block.conv0, h, None), block.norm1, _rows(scale, x), _rows(shift, x))
    else:
        shared = params.shape[0] == 1
        h = _convolve(block.conv0, h, params[0] if shared else None)
        h = norm_silu(h if shared else h + params[:, :, None, None], block.norm1)
    h = _convolve(block.conv1, F.dropout(h, p=block.dropout, training=block.training), None)
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
    shape = (x.shape[0], block.num_heads, x.shape[1] // block.num_heads, 3, -1)
    q, k, v = qkv.reshape(shape).permute(3, 0, 1, 4, 2).contiguous().unbind(0)
    a = F.scaled_dot_product_attention(q, k, v)
    return _convolve(block.proj, a.transpose(2, 3).reshape(x.shape), None)


def _probe_block(block: Any, draw: Draw) -> Sequence[Tensor]:
    # Fresh blocks end in weights of 1e-5, which would hide what comes before them.
    for conv in (block.conv1, *((block.proj,) if block.num_heads else ())):
        conv.weight = nn.Parameter(0.3 * draw(*conv.weight.shape).detach())
    emb = block.affine.in_features
    x = (block.in_channels, 4, 4)
    return [block.forward(draw(2, *x), draw(2, emb)), block.forward(draw(2, *x), draw(1, emb))]


# The whole U-Net


def _plan_wrapper(wrapper: Any, options: Options) -> Plan:
    if original_class(wrapper.net).__qualname__ != "SongUNet":
        raise Unfit(f"its net is a {type(wrapper.net).__name__}, not the repository's SongUNet")
    if any(
        name in wrapper.net._modules and wrapper.net._modules[name] is not None
        for name in ("map_label", "map_augment")
    ):
        raise Unfit("its net embeds labels")
    return Plan("a time of the whole batch embedded once")


def _wrapper(wrapper: Any, x: Tensor, t: Tensor | None) -> Tensor:
    if t is None:
        t = torch.zeros(1, device=x.device).expand(x.shape[0])
    same = t.ndim == 1 and t.shape[0] > 1 and t.stride(0) == 0
    return wrapper.net(x, t[:1] if same else t, None)


class _Net(nn.Module):
    """x (1 + t) of t [B] or [1], in the U-Net's place."""

    def forward(self, x: Tensor, t: Tensor, label: None) -> Tensor:
        return x * (1 + t.to(x)).reshape(-1, 1, 1, 1)


def _probe_wrapper(wrapper: Any, draw: Draw) -> Sequence[Tensor]:
    wrapper._modules["net"] = _Net()
    x = (3, 2, 2, 2)
    times = (None, draw(3), draw(1).expand(3))
    return [wrapper.forward(draw(*x), t) for t in times]


def _adapter(name: str, *attributes: str, **what: Any) -> Adapter:
    return Adapter(library=LIBRARY, where=None, name=name, recognises=has(*attributes), **what)


ADAPTERS = (
    _adapter("Conv2d", "resample_filter", methods={"forward": _conv}, plan=_plan_conv, probe=_probe_conv),
    _adapter(
        "UNetBlock",
        *(
            "norm0",
            "conv0",
            "affine",
            "norm1",
            "conv1",
            "skip",
            "skip_scale",
            "adaptive_scale",
            "num_heads",
            "dropout",
        ),
        methods={"forward": _block},
        plan=_plan_block,
        probe=_probe_block,
        inner=_inner,
        compiles=lambda block: (block,),
        tolerance=1e-6,  # the original's attention drops to float32
    ),
    _adapter(
        "SongUNetWrapper",
        "net",
        methods={"forward": _wrapper},
        plan=_plan_wrapper,
        probe=_probe_wrapper,
        hollow=lambda wrapper: (wrapper.net,),
    ),
)
