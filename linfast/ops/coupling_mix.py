"""An affine coupling and the channel mix after it as one op, which reads x and params once and writes y once.

    runs as       where
    one launch    on a GPU, C and O <= 128
    two ops       on a GPU, C or O > 128; or under autocast, x not of autocast's dtype; or vectors [B, C] with C
                  or O > 64, for which cuBLAS's product is faster: from about 20 FLOP per byte on, the product
                  takes longer than the memory traffic
    plain torch   on a CPU and in float64

x, params and W are saved for the backward, which recomputes u, the coupling's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import autocast_dtype, uses_triton
from ..kernels.launch import COUPLING_SCHEMA, like, with_channels
from ..scale_maps import ScaleMap
from .affine_coupling import check_coupling, coupled, coupling_constants, raw_coupling_reference
from .channel_mix import channel_mix, channel_mix_reference, check_mix, laid_out
from .register import define_op

_WIDEST = 128  # one program computes all outputs
_WIDEST_VECTOR = 64  # at C = O = 64: 8192 FLOP and 768 bytes per row


def coupling_mix(
    x: Tensor,
    params: Tensor,
    scale_map: ScaleMap,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: str = "shift_first",
    layout: str = "halves",
    moves: str = "first",
    inverse: bool = False,
    log_det: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| or None): y = W u + bias over channels, u = affine_coupling(x, params) or its inverse.

    Args:
        x: [B, C, ...], C >= 2.
        params, scale_map, order, layout, moves: as in ``affine_coupling``.
        weight: [O, C], any strides.
        bias: [O], or None for 0.
        inverse: apply the coupling's inverse; weight and bias are used as given.
        log_det: also return log|det| of the coupling without W's, [B], in fp32 or wider.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown, or shapes do not fit.
    """
    check_coupling(x, params, scale_map, order, layout, moves, inverse, log_det)
    check_mix(x, weight, bias)
    spec = coupling_constants(scale_map, order, layout, moves, inverse, log_det)
    if not (uses_triton(x, params, weight) and _fuses(x, weight)):
        u, total = coupled(x, params, scale_map, spec)
        return channel_mix(u, weight, bias), total
    weight = weight if autocast_dtype(x.device.type) is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(weight.dtype)
    y, total = _coupling_mix(x, params, weight, bias, *spec)
    return y, total if log_det else None


def _fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether one launch computes both; see the table at the top of this file."""
    if autocast_dtype(x.device.type) not in (None, x.dtype):
        return False
    return min(weight.shape) > 0 and max(weight.shape) <= (_WIDEST if x.ndim > 2 else _WIDEST_VECTOR)


def _raw_reference(
    x: Tensor, params: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor | None]:
    u, log_det = raw_coupling_reference(x, params, *constants)
    return laid_out(channel_mix_reference(u, weight, bias), x), log_det


def _fake(x: Tensor, params: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any) -> tuple[Tensor, Tensor]:
    return with_channels(x, weight.shape[0]), x.new_empty(x.shape[0] if constants[-1] else 0, dtype=torch.float32)


def _gradients(x: Tensor, params: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dweight, dbias = weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])
    return with_channels(x, x.shape[1]), like(params), dweight, dbias


_coupling_mix = define_op(
    f"coupling_mix(Tensor x, Tensor params, Tensor weight, Tensor? bias, {COUPLING_SCHEMA}) "
    "-> (Tensor y, Tensor log_det)",
    _fake,
    _raw_reference,
    saves="x params weight",
    gradients=_gradients,
    backward_launch="coupling_mix_backward:launch_coupling_mix_backward",
)
