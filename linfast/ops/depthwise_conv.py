"""Depthwise correlation with zero padding "same": a k x k kernel a channel, shared or one a sample.

    y[b, c, i, j] = sum_{u, v} w[b, c, u, v] x[b, c, i + u - l_h, j + v - l_w],  l = (k - 1) // 2

Its transpose is the same sum with the kernel flipped and the two paddings swapped,
which matters for even k, where they differ.

Shapes: x [B, C, H, W], weight [C, kh, kw] or [B, C, kh, kw], y like x.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["depthwise_conv"]


def depthwise_conv(x: Tensor, weight: Tensor, *, transpose: bool = False) -> Tensor:
    """Depthwise "same" correlation of x with weight, or its exact transpose.

    Args:
        x: [B, C, H, W].
        weight: [C, kh, kw], or [B, C, kh, kw] for one set of kernels a sample.
        transpose: apply the transposed linear map.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, weight)
    if x.numel() == 0:
        return x.clone()
    left_h, left_w = (weight.shape[-2] - 1) // 2, (weight.shape[-1] - 1) // 2
    right_h, right_w = weight.shape[-2] - 1 - left_h, weight.shape[-1] - 1 - left_w
    if transpose:
        weight = weight.flip((-2, -1))
        left_h, right_h, left_w, right_w = right_h, left_h, right_w, left_w
    groups = x.shape[1] if weight.ndim == 3 else x.shape[0] * x.shape[1]
    padded = F.pad(x, (left_w, right_w, left_h, right_h))
    rows = padded.reshape(-1, groups, *padded.shape[-2:])
    kernels = weight.reshape(groups, 1, *weight.shape[-2:])
    return F.conv2d(rows, kernels, groups=groups).reshape(x.shape)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W]; got {tuple(x.shape)}")
    leading = tuple(weight.shape[:-2])
    if weight.ndim not in (3, 4) or leading not in ((x.shape[1],), tuple(x.shape[:2])):
        raise ValueError(
            f"weight must be [{x.shape[1]}, kh, kw] or [{x.shape[0]}, {x.shape[1]}, kh, kw] "
            f"for x {tuple(x.shape)}; got {tuple(weight.shape)}"
        )
