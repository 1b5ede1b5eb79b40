"""The ops of image conditioners: a depthwise convolution, a GroupNorm with SiLU, and both with a convolution.

A depthwise "same" correlation has one k x k kernel per channel. The GroupNorm has the scale and shift of a time
embedding and SiLU, as a block of a U-Net does them. The last case is the block's second convolution: norm and SiLU,
3 x 3 convolution, bias and residual, in channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linfast import ops

from ..harness import Size
from .common import BACKWARD, BOTH, DTYPES, FP32, Function, Source, grid, ints, op_case

_GROUP_NORM = 12  # operations per element: mean and variance 4, normalise 2, two affine maps 4, SiLU 2
_DEPTHWISE: Size = {**FP32, "C": 8, "side": 32, "k": 5, "batch": 64}
_depthwise_conv = op_case(
    "depthwise_conv",
    lambda source, size: (source.image(size), source.normal(*ints(size, "C", "k", "k"))),
    lambda size: ops.depthwise_conv,
    lambda size, x: 2 * int(size["k"]) ** 2 * x.numel(),
    tiny=[{**_DEPTHWISE, "direction": BACKWARD, "C": 2, "side": 6, "k": 3, "batch": 2}],
    quick=[_DEPTHWISE],
    gpu=grid({**_DEPTHWISE, "C": 64, "batch": 512}, direction=BOTH, k=(3, 5, 9)),
    full=[*grid(_DEPTHWISE, direction=BOTH, k=(3, 5, 9, 17)), *grid(_DEPTHWISE, batch=(2**8, 2**10))],
)


def _normed(source: Source, size: Size) -> tuple[Tensor, ...]:
    batch, channels = ints(size, "batch", "C")
    shapes: Sequence[tuple[int, ...]] = (*2 * ((channels,),), *2 * ((batch, channels),))
    return source.image(size), *(source.normal(*shape) for shape in shapes)


_NORM: Size = {**FP32, "C": 64, "side": 16, "groups": 16, "batch": 32}
_group_norm_silu = op_case(
    "group_norm_silu",
    _normed,
    lambda size: lambda x, *rest: ops.group_norm_silu(x, int(size["groups"]), *rest),
    lambda size, x: _GROUP_NORM * x.numel(),
    tiny=[{**_NORM, "direction": BACKWARD, "C": 4, "side": 4, "groups": 2, "batch": 2}],
    quick=[_NORM],
    gpu=grid({**_NORM, "C": 128, "side": 32, "groups": 32, "batch": 256}, direction=BOTH, dtype=DTYPES),
    full=[*grid(_NORM, direction=BOTH, side=(8, 16, 32)), *grid(_NORM, batch=(2**6, 2**10))],
)


def _convolved(source: Source, size: Size) -> tuple[Tensor, ...]:
    channels = int(size["C"])
    weight = source.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
    x, weight, residual = (
        t.contiguous(memory_format=torch.channels_last) for t in (source.image(size), weight, source.image(size))
    )
    return x, weight, *(source.normal(channels) for _ in range(3)), residual


def _conv2d_fused(size: Size) -> Function:
    def fused(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        norm = {"groups": int(size["C"]) // 4, "norm_weight": scale, "norm_bias": shift}
        return ops.conv2d_fused(x, weight, bias, **norm, residual=residual, alpha=0.5**0.5)[0]  # type: ignore[arg-type]

    return fused


_CONV: Size = {**FP32, "C": 16, "side": 16, "batch": 16}
_fused = op_case(
    "conv2d_fused",
    _convolved,
    _conv2d_fused,
    lambda size, x: 18 * int(size["C"]) * x.numel(),
    tiny=[{**_CONV, "direction": BACKWARD, "C": 4, "side": 3, "batch": 2}],
    quick=[_CONV],
    gpu=grid({**_CONV, "batch": 256}, direction=BOTH, dtype=DTYPES, C=(16, 64, 128)),
    full=[*grid(_CONV, direction=BOTH, side=(8, 16, 32), C=(16, 64)), *grid(_CONV, batch=(2**6, 2**10))],
)

CASES = [_depthwise_conv, _group_norm_silu, _fused]
