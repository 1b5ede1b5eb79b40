"""A 2-d convolution, fused with the group norm and SiLU before it and the bias and residual after it.

    where                                     runs
    CPU, float64                              plain torch
    GPU, C_in and C_out as in conv2d_configs  linfast.kernels.conv2d_fused: one kernel, and another for x's
                                              statistics if they are not given
    GPU, other sizes                          group_norm_silu and torch's convolution

Under backend("triton") the kernel runs at any size. Saved for the backward: x, the parameters and the [B, groups]
means and reciprocal standard deviations. The convolution's input is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count, check_flag, check_number, check_tensor
from ..dispatch import autocast_dtype, chosen_backend, uses_triton
from ..kernels.conv2d_configs import (
    CONV_SCHEMA,
    ConvSpec,
    empty_outputs,
    empty_statistics,
    handed_over,
    runs_fused,
    tile_rows_of,
)
from ..kernels.launch import like
from ..kernels.stack_configs import mode_on, target_of
from ..precision import half_dtype, resolve_precision
from .channel_mix import laid_out
from .group_norm_silu import group_norm_silu, group_norm_silu_reference, moments
from .register import define_op


def conv2d_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: bool = True,
    statistics: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    next_groups: int = 0,
    precision: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, statistics of y or None): y = conv(a, weight, padding k // 2) + bias + alpha residual.

    a = silu(group_norm(x) norm_weight + norm_bias), without the SiLU where activation is False; a = x where groups
    is 0. a, not x, is padded with zeros. y's dtype is weight's (autocast's under autocast), or residual's if wider.

    Args:
        x: [B, C_in, H, W], any strides; channels_last is fastest.
        weight: [C_out, C_in, k, k], k odd.
        bias: [C_out], or [B, C_out] for a bias per sample.
        groups: of channels in the norm before the convolution; 0 for neither norm nor SiLU.
        norm_weight, norm_bias: [C_in], as nn.GroupNorm's weight and bias; None means 1 and 0.
        eps: added to the norm's variance.
        activation: False omits the SiLU.
        statistics: of x in ``groups`` groups, as returned by the call that computed x; None computes them.
        residual: [B, C_out, H, W], added with the factor alpha.
        next_groups: groups of the norm that y is the input of, for the statistics of y; 0 for no statistics.
        precision: of the kernel's products, "exact", "high", "tf32" or "fast". None: as torch is set
            (linfast.precision), but "tf32" in place of "exact" and "high" where
            torch.backends.cudnn.conv.fp32_precision is "tf32", its default.

    Statistics carry no gradient: their part is in the gradient of x. Those of y are None where next_groups is 0,
    where torch's convolution ran, or where the kernel cannot sum such groups; pass them to the next call as is.

    Raises:
        ValueError: shapes or groups do not fit, or the precision is unknown.
        TypeError: an argument has the wrong type, or x and weight differ in dtype outside autocast.
    """
    check_number("eps", eps, 0.0)
    check_flag("activation", activation)
    check_number("alpha", alpha)
    _check(x, weight, bias, groups, norm_weight, norm_bias, statistics, residual, next_groups)
    given = [t for t in (weight, bias, norm_weight, norm_bias, residual) if t is not None]
    mode = _mode(x, weight, precision)
    n_out, n_in, k, _ = weight.shape
    if not uses_triton(x, *given) or not (
        chosen_backend() == "triton" or runs_fused(n_in, n_out, k, mode, target_of(x))
    ):
        a = group_norm_silu(x, groups, norm_weight, norm_bias, eps=eps, activation=activation) if groups else x
        return _convolved(a, weight, bias, residual, alpha), None
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        x = x if groups else x.to(dtype)
    sums = next_groups if next_groups and handed_over(weight.shape[0], next_groups) else 0
    tensors = (x, weight, bias, norm_weight, norm_bias, residual, statistics if groups else None)
    spec = ConvSpec(groups, eps, activation, alpha, sums, mode, half_dtype(weight))
    y, _, _, tiles = _conv2d_fused(*tensors, *spec)
    return y, tiles.detach() if sums else None


def _mode(x: Tensor, weight: Tensor, requested: str | None) -> str:
    mode = resolve_precision(x, requested)
    if requested is None and mode != "fast" and _tf32_convolutions():
        mode = "tf32"
    return mode_on(target_of(x), mode)


def _tf32_convolutions() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


# As torch.compiler.assume_constant_result marks it, but without importing Dynamo.
_tf32_convolutions._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _convolved(a: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, alpha: float) -> Tensor:
    """conv(a) + bias + alpha residual in plain torch."""
    bias = None if bias is None else bias.to(weight.dtype)
    per_sample = bias is not None and bias.ndim == 2
    y = F.conv2d(a, weight, None if per_sample else bias, padding=weight.shape[2] // 2)
    if bias is not None and per_sample:
        y = y + bias[:, :, None, None]
    return y if residual is None else torch.add(y, residual, alpha=alpha)


def conv2d_fused_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: Tensor | None, tiles: Tensor | None, *constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The raw op in plain torch: (y, x's mean and rstd [B, groups], y's statistics [B, tiles, next_groups, 2])."""
    spec, a = ConvSpec(*constants), x
    mean, rstd, next_tiles = empty_statistics(x, weight.shape[0], spec)
    if spec.groups:
        a = group_norm_silu_reference(x, norm_weight, norm_bias, None, None, *spec[:3])
        mean, rstd = moments(x, spec.groups, spec.eps)
    y = _convolved(a.to(weight.dtype), weight, bias, residual, spec.alpha)
    return laid_out(y, x), mean, rstd, _tiles(y, *next_tiles.shape[1:3]) if spec.next_groups else next_tiles


def _tiles(y: Tensor, tiles: int, groups: int) -> Tensor:
    """y's statistics (mean, sum of centred squares) [B, tiles, groups, 2]; see kernels/group_statistics.py."""
    grouped = y.float().unflatten(1, (groups, -1)).flatten(3)
    parts = grouped.split(tile_rows_of(tiles, grouped.shape[3]), dim=3)
    means = torch.stack([part.mean((2, 3)) for part in parts], 1)
    squares = [(part - part.mean((2, 3), keepdim=True)).square().sum((2, 3)) for part in parts]
    return torch.stack((means, torch.stack(squares, 1)), 3)


def _gradients(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    needs, grad, alpha = rest[-1], rest[5], rest[12]
    parameters = [None if t is None else torch.empty_like(t) for t in (weight, *rest[:3])]
    return like(x), *parameters, grad * alpha if needs[5] else None, None


_conv2d_fused = define_op(
    "conv2d_fused(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, "
    f"Tensor? tiles, {CONV_SCHEMA}) -> (Tensor y, Tensor mean, Tensor rstd, Tensor next_tiles)",
    lambda x, weight, *rest: empty_outputs(x, weight, rest[3], ConvSpec(*rest[5:])),
    conv2d_fused_reference,
    saves="x weight bias norm_weight norm_bias mean rstd",
    gradients=_gradients,
    backward_launch="conv2d_fused_backward:launch_conv2d_fused_backward",
)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, norm_weight: Tensor | None,
    norm_bias: Tensor | None, statistics: Tensor | None, residual: Tensor | None, next_groups: int,
) -> None:  # fmt: skip
    check_tensor("x", x)
    check_tensor("weight", weight, x)
    parameters = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor in {**parameters, "statistics": statistics, "residual": residual}.items():
        if tensor is not None:
            check_tensor(name, tensor, x)
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            "x must be [B, C_in, H, W] and weight [C_out, C_in, k, k]; "
            f"got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    (batch, n_in, height, width), (n_out, _, k, k_width) = x.shape, weight.shape
    if k != k_width or k % 2 == 0:
        raise ValueError(f"weight must be [C_out, C_in, k, k] with k odd; got {tuple(weight.shape)}")
    if x.dtype != weight.dtype and autocast_dtype(x.device.type) is None:
        raise TypeError(f"x and weight must have the same dtype; got x {x.dtype} and weight {weight.dtype}")
    if bias is not None and bias.shape not in ((n_out,), (batch, n_out)):
        raise ValueError(
            f"bias must be [{n_out}] or [{batch}, {n_out}] for weight {tuple(weight.shape)}; "
            f"got {tuple(bias.shape)}"
        )
    for name, value, channels in (("groups", groups, n_in), ("next_groups", next_groups, n_out)):
        check_count(name, value, 0)
        if value and channels % value:
            raise ValueError(f"{name} must be 0 or divide {channels} channels; got {value}")
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None and (not groups or parameter.shape != (n_in,)):
            raise ValueError(
                f"{name} must be ({n_in},) for x {tuple(x.shape)}, with groups; "
                f"got {tuple(parameter.shape)} with groups={groups}"
            )
    if statistics is not None and (
        statistics.ndim != 4 or statistics.shape[::2] != (batch, groups) or statistics.dtype != torch.float32
    ):
        raise ValueError(
            f"statistics must be those of x {tuple(x.shape)} for {groups} groups, "
            f"fp32 [{batch}, tiles, {groups}, 2]; got {statistics.dtype} {tuple(statistics.shape)}"
        )
    if residual is not None and residual.shape != (batch, n_out, height, width):
        raise ValueError(
            f"residual must be {(batch, n_out, height, width)} for x {tuple(x.shape)} and "
            f"weight {tuple(weight.shape)}; got {tuple(residual.shape)}"
        )
