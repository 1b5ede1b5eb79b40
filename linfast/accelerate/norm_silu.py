"""GroupNorm and SiLU of a U-Net, keeping only the input for the backward.

On a GPU this is ``ops.group_norm_silu``. On a CPU, where that op is plain torch and autograd keeps the
normalised values too, they are computed again in the backward: one more normalisation, a third less memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import uses_triton
from ..flows.memory import inverts
from ..ops.group_norm_silu import group_norm_silu

__all__ = ["norm_silu"]


def norm_silu(
    x: Tensor, norm: Any, scale: Tensor | None = None, shift: Tensor | None = None, activation: bool = True
) -> Tensor:
    """silu(norm(x) (1 + scale) + shift) for a GroupNorm with num_groups, eps, weight [C] and bias [C]."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    plain = not uses_triton(x, weight, bias)
    if plain:
        x = x.contiguous()  # of others torch's group norm has no forward derivative
    if plain and scale is None and shift is None and activation and inverts("invert", x, 0.0):
        return _NormSiLU.apply(x, weight, bias, norm.num_groups, norm.eps)
    return group_norm_silu(x, norm.num_groups, weight, bias, scale, shift, norm.eps, activation)


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        y, mean, rstd = _normalise(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(y, inplace=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (grad,) = gradients
        if torch.is_grad_enabled():  # create_graph: through plain torch
            given = x, weight, bias = [
                t.view_as(t) for t in ctx.saved_tensors[:3]
            ]  # whose history is not gone into
            y = F.silu(F.group_norm(x, ctx.groups, weight, bias, ctx.eps))
            wanted = [t for t, need in zip(given, ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return (*(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None)
        y, _, _ = _normalise(x, weight, bias, ctx.groups, ctx.eps)
        grad = torch.ops.aten.silu_backward(grad, y)
        results = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x, mean, rstd, weight, *_sizes(x), ctx.groups, list(ctx.needs_input_grad[:3])
        )
        return (*results, None, None)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """B, C and positions."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])
