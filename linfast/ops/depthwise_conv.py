"""Depthwise correlation with zero padding "same": one kh x kw kernel per channel, shared or per sample.

    y[b, c, i, j] = sum_{u, v} w[b, c, u, v] x[b, c, i + u - l_h, j + v - l_w],  l = (k - 1) // 2

The transpose flips the kernel and swaps the paddings of opposite sides, which differ where k is even. On a CPU and
in float64 the op runs in plain torch; on a GPU it is one kernel forward and two backward
(linfast.kernels.depthwise_conv). x and weight are saved for the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_flag, check_tensor
from ..dispatch import uses_triton
from .register import define_op


def depthwise_conv(x: Tensor, weight: Tensor, *, transpose: bool = False) -> Tensor:
    """y[b, c] = the "same" correlation of x[b, c] with weight[c] or weight[b, c] (formula above), or its transpose.

    Args:
        x: [B, C, H, W].
        weight: [C, kh, kw], or [B, C, kh, kw] for one set of kernels per sample.
        transpose: apply the transpose of the linear map x -> y.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit together.
    """
    _check(x, weight, transpose)
    if uses_triton(x, weight):
        return _depthwise_conv(x, weight, transpose)
    return depthwise_conv_reference(x, weight, transpose)


def depthwise_conv_reference(x: Tensor, weight: Tensor, transpose: bool) -> Tensor:
    """``depthwise_conv`` in plain torch, in fp32 or wider; y has x's dtype."""
    if x.numel() == 0:
        return x * weight.sum().to(x.dtype)
    compute = torch.promote_types(x.dtype, torch.float32)
    if transpose:
        weight = weight.flip((-2, -1))
    groups = x.shape[1] if weight.ndim == 3 else x.shape[0] * x.shape[1]
    padding = []
    for k in (weight.shape[-1], weight.shape[-2]):
        left = (k - 1) // 2
        padding += [k - 1 - left, left] if transpose else [left, k - 1 - left]
    rows = F.pad(x.to(compute), padding).reshape(
        -1, groups, x.shape[2] + weight.shape[-2] - 1, x.shape[3] + weight.shape[-1] - 1
    )
    kernels = weight.to(compute).reshape(groups, 1, *weight.shape[-2:])
    return F.conv2d(rows, kernels, groups=groups).reshape(x.shape).to(x.dtype)


_depthwise_conv = define_op(
    "depthwise_conv(Tensor x, Tensor weight, bool transpose) -> Tensor",
    lambda x, *_: torch.empty_like(x),
    depthwise_conv_reference,
    saves="x weight",
    gradients=lambda x, weight, *_: (torch.empty_like(x), weight.new_empty(weight.shape)),
)


def _check(x: Tensor, weight: Tensor, transpose: bool) -> None:
    check_tensor("x", x)
    check_tensor("weight", weight, x)
    check_flag("transpose", transpose)
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W]; got {tuple(x.shape)}")
    leading = tuple(weight.shape[:-2])
    if weight.ndim not in (3, 4) or 0 in weight.shape[-2:] or leading not in ((x.shape[1],), tuple(x.shape[:2])):
        raise ValueError(
            f"weight must be [{x.shape[1]}, kh, kw] or [{x.shape[0]}, {x.shape[1]}, kh, kw] "
            f"for x {tuple(x.shape)}; got {tuple(weight.shape)}"
        )
