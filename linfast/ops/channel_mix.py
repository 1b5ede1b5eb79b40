"""Channel mix, a 1 x 1 convolution: y[b, o, p] = sum_c W[o, c] x[b, c, p] + bias[o] at every position p.

    x                              runs
    [B, C]                         F.linear, in torch's precision of products
    [B, C, ...] on a CPU, float64  torch.matmul
    [B, C, ...] on a GPU           linfast.kernels.channel_mix: any strides, exact fp32 products

For a square W the inverse is the same op with W^-1 and -W^-1 bias. x and W are saved for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensor
from ..dispatch import autocast_dtype, uses_triton
from ..kernels.launch import with_channels
from .register import define_op


def channel_mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[b, o, p] = sum_c weight[o, c] x[b, c, p] + bias[o].

    Args:
        x: [B, C, ...].
        weight: [O, C], any strides.
        bias: [O], or None for 0.

    y [B, O, ...] has x's dtype. Autocast casts x, weight and bias as it does for torch.matmul.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: x, weight or bias does not have these shapes.
    """
    check_mix(x, weight, bias)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.ndim > 2 and uses_triton(x, weight):
        return _channel_mix(x, weight, None if bias is None else bias.to(weight.dtype))
    return channel_mix_reference(x, weight, bias)


def channel_mix_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``channel_mix`` in plain torch."""
    compute = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(compute)
    if x.ndim == 2:
        return F.linear(x.to(compute), weight.to(compute), bias).to(x.dtype)
    out = torch.matmul(weight.to(compute), x.to(compute).flatten(2))
    out = out if bias is None else out + bias[:, None]
    return out.reshape(x.shape[0], weight.shape[0], *x.shape[2:]).to(x.dtype)


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """y, copied where necessary into the strides of ``with_channels``; differentiable."""
    if x.stride(1) == 1 and x.stride(-1) != 1:
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y.contiguous()


def _gradients(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return with_channels(x, x.shape[1]), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


_channel_mix = define_op(
    "channel_mix(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: with_channels(x, weight.shape[0]),
    lambda x, weight, bias: laid_out(channel_mix_reference(x, weight, bias), x),
    saves="x weight",
    gradients=_gradients,
)


def check_mix(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x)
    check_tensor("weight", weight, x)
    if bias is not None:
        check_tensor("bias", bias, x)
    if weight.ndim != 2 or x.ndim < 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [B, C, ...] and weight [C_out, C]; got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [{weight.shape[0]}] for weight {tuple(weight.shape)}; got {tuple(bias.shape)}"
        )
