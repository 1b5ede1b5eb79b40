"""GroupNorm followed by SiLU, with a time embedding's scale and shift between them.

    h = (x - mean) / sqrt(var + eps)           over each group of C / groups channels of a sample
    u = (h weight + bias) (1 + scale) + shift
    y = u sigmoid(u)

The order of scale and shift is that of ADM (Dhariwal and Nichol, 2021) and EDM (Karras et al., 2022). On a CPU and
in float64 the op runs in plain torch; on a GPU it is one kernel forward and one backward
(linfast.kernels.group_norm_silu). Saved for the backward: x, the parameters, means and reciprocal deviations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count, check_flag, check_number, check_tensor
from ..dispatch import uses_triton
from ..kernels.launch import like
from .register import define_op


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: bool = True,
) -> Tensor:
    """y = silu(group_norm(x) (1 + scale) + shift).

    Args:
        x: [B, C, ...].
        groups: number of groups of channels; divides C.
        weight, bias: [C], as those of nn.GroupNorm; None means 1 and 0.
        scale, shift: [B, C], from a time embedding; None means 0.
        eps: added to the variance.
        activation: False omits the SiLU.

    The op is computed in fp32 or wider; y has x's dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: groups do not divide C, or the shape of a parameter does not fit x.
    """
    _check(x, groups, weight, bias, scale, shift)
    check_number("eps", eps, 0.0)
    check_flag("activation", activation)
    parameters = (weight, bias, scale, shift)
    if uses_triton(x, *(t for t in parameters if t is not None)):
        y, _, _ = _group_norm_silu(x, *parameters, groups, eps, activation)
        return y
    return group_norm_silu_reference(x, *parameters, groups, eps, activation)


def group_norm_silu_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int,
    eps: float, activation: bool,
) -> Tensor:  # fmt: skip
    """``group_norm_silu`` in plain torch."""
    compute = torch.promote_types(x.dtype, torch.float32)
    if weight is None and bias is not None:  # torch.group_norm gives no gradient to a bias alone
        weight = torch.ones_like(bias)
    w, b = (None if t is None else t.to(compute) for t in (weight, bias))
    # Not F.group_norm, which raises an error where a group has one value, so that its variance is 0.
    if w is None or x.device.type != "cpu" or x.is_contiguous() or not torch.is_grad_enabled():
        out = torch.group_norm(x.to(compute), groups, w, b, eps)
    else:
        # In channels_last the backward of torch 2.13's group norm writes through a null pointer if the gradients of
        # the parameters are requested without x's, which autograd.grad may do even where x requires a gradient.
        out = torch.group_norm(x.to(compute), groups, None, None, eps) * _per_channel(w, x, compute)
        out = out if b is None else out + _per_channel(b, x, compute)
    if scale is not None:
        out = out * (1 + _per_channel(scale, x, compute))
    if shift is not None:
        out = out + _per_channel(shift, x, compute)
    return (F.silu(out, inplace=not torch.is_grad_enabled()) if activation else out).to(x.dtype)


def _per_channel(parameter: Tensor, x: Tensor, compute: torch.dtype) -> Tensor:
    """A parameter [C] or [B, C] in the compute dtype, shaped to broadcast against x."""
    return parameter.to(compute).reshape(*parameter.shape, *(1,) * (x.ndim - 2))


def _raw_reference(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu_reference(x, *rest), *moments(x, *rest[4:6])


def moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) of each group, [B, groups] in fp32."""
    shape = (x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(shape)
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    return mean.float(), (variance + eps).rsqrt().float()


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], rest[4]), dtype=torch.float32) for _ in range(2))
    return like(x), mean, rstd


def _gradients(x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return like(x), *(None if t is None else t.new_empty(t.shape) for t in rest[:4])


_group_norm_silu = define_op(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, "
    "bool activation) -> (Tensor y, Tensor mean, Tensor rstd)",
    _fake,
    _raw_reference,
    saves="x weight bias scale shift mean rstd",
    gradients=_gradients,
)


def _check(x: Tensor, groups: int, *parameters: Tensor | None) -> None:
    check_tensor("x", x)
    check_count("groups", groups)
    if x.ndim < 2:
        raise ValueError(f"x must be [B, C, ...]; got {tuple(x.shape)}")
    if x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x {tuple(x.shape)}; got {groups}")
    names, shapes = ("weight", "bias", "scale", "shift"), (x.shape[1:2],) * 2 + (x.shape[:2],) * 2
    for name, tensor, shape in zip(names, parameters, shapes, strict=True):
        if tensor is None:
            continue
        check_tensor(name, tensor, x)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} for x {tuple(x.shape)}; got {tuple(tensor.shape)}")
