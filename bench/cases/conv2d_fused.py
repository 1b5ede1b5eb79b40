"""A U-Net block's second convolution: norm and SiLU, 3 x 3 convolution, bias and residual, in channels_last."""

from __future__ import annotations

import torch
from torch import Tensor

from linfast.ops import conv2d_fused

from ..harness import Case, Options, Problem, Size
from .common import BACKWARD, FORWARD, Source, cost, inputs, providers, run, sweep

__all__ = ["CASE"]


def build(size: Size, options: Options) -> Problem:
    """y, or with the backward (y, dx, dweight, dbias, dnorm_weight, dnorm_bias, dresidual)."""
    source, direction = Source(options, size), str(size["direction"])
    batch, channels, side = (int(size[key]) for key in ("batch", "C", "side"))

    def function(
        x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, residual: Tensor
    ) -> Tensor:
        norm = {"groups": channels // 4, "norm_weight": norm_weight, "norm_bias": norm_bias}
        return conv2d_fused(x, weight, bias, **norm, residual=residual, alpha=0.5**0.5)[0]  # type: ignore[arg-type]

    def make() -> tuple[Tensor, ...]:
        image = (batch, channels, side, side)
        weight = source.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
        x, weight, residual, v = (
            t.contiguous(memory_format=torch.channels_last)
            for t in (source.normal(*image), weight, source.normal(*image), source.normal(*image))
        )
        drawn = (x, weight, *(source.normal(channels) for _ in range(3)), residual)
        return (*drawn, v) if direction == BACKWARD else drawn

    call, drawn = run(direction), inputs(make, options)
    x = drawn[0][0]
    return Problem(
        inputs=drawn,
        truth=call(function),
        reference=call(function),
        providers=providers(function, options, call),
        cost=cost(direction, drawn[0][:6], [x], 18 * channels * x.numel()),
    )


_BASE: Size = {"direction": FORWARD, "dtype": "float32", "C": 16, "side": 16, "batch": 16}
_GPU: Size = {**_BASE, "batch": 256}
CASE = Case(
    "conv2d_fused",
    build,
    sizes={
        "tiny": [{"direction": BACKWARD, "dtype": "float32", "C": 4, "side": 3, "batch": 2}],
        "quick": sweep(_BASE, batch=(16,)),
        "gpu": [
            {**_GPU, "direction": d, "dtype": t, "C": c}
            for d in (FORWARD, BACKWARD)
            for t in ("float32", "bfloat16")
            for c in (16, 64, 128)
        ],
        "full": [
            *sweep(_BASE, batch=[2**k for k in range(4, 13, 2)], side=(8, 16, 32), C=(8, 16, 32, 64, 128)),
            *sweep({**_BASE, "direction": BACKWARD}, side=(8, 16, 32), C=(16, 64)),
        ],
    },
)
