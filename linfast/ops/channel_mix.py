"""Channel mix: y[b, o, p] = sum_c W[o, c] x[b, c, p], one C x C matrix over every position.

Shapes: x [B, C, ...], weight [C_out, C], y [B, C_out, ...]. A vector has one position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["channel_mix"]


def channel_mix(x: Tensor, weight: Tensor) -> Tensor:
    """y[b, o, p] = sum_c weight[o, c] x[b, c, p].

    Args:
        x: [B, C, ...].
        weight: [C_out, C].

    Raises:
        ValueError: weight is not a matrix whose columns match x's channels.
    """
    if weight.ndim != 2 or x.ndim < 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [B, C, ...] and weight [C_out, C]; got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    if x.ndim == 2:
        return F.linear(x, weight)
    out = torch.matmul(weight, x.flatten(2))
    return out.reshape(x.shape[0], weight.shape[0], *x.shape[2:])
