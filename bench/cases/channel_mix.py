"""Channel mix: one C x C matrix and a bias over every pixel of [B, C, side, side]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linfast.ops import channel_mix

from ..harness import Case, Options, Problem, Provider, Size
from .common import BACKWARD, FORWARD, Source, cost, inputs, providers, run, sweep

__all__ = ["CASE"]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The usual way to write it."""
    return F.conv2d(x, weight[:, :, None, None], bias)


def build(size: Size, options: Options) -> Problem:
    """y, or with the backward (y, dx, dweight, dbias)."""
    source, direction = Source(options, size), str(size["direction"])
    batch, channels, side = (int(size[key]) for key in ("batch", "C", "side"))

    def make() -> tuple[Tensor, ...]:
        shapes = ((batch, channels, side, side), (channels, channels), (channels,))
        drawn = tuple(source.normal(*shape) for shape in shapes)
        return (*drawn, source.normal(*shapes[0])) if direction == BACKWARD else drawn

    call, drawn = run(direction), inputs(make, options)
    x = drawn[0][0]
    return Problem(
        inputs=drawn,
        truth=call(channel_mix),
        reference=call(channel_mix),
        providers=[*providers(channel_mix, options, call), Provider("conv2d 1x1", call(_convolve))],
        cost=cost(direction, drawn[0][:3], [x], 2 * channels * x.numel()),
    )


_BASE: Size = {"direction": FORWARD, "dtype": "float32", "C": 12, "side": 16, "batch": 64}
_GPU: Size = {**_BASE, "side": 32, "batch": 2048}
CASE = Case(
    "channel_mix",
    build,
    sizes={
        "tiny": [{"direction": BACKWARD, "dtype": "float32", "C": 3, "side": 4, "batch": 2}],
        "quick": [_BASE],
        "gpu": [
            *sweep(_GPU, C=(4, 12, 64)),
            {**_GPU, "direction": BACKWARD},
            {**_GPU, "C": 64, "direction": BACKWARD},
        ],
        "full": [
            *sweep(_BASE, batch=[2**k for k in range(6, 17, 2)], C=(4, 12, 48, 96, 192), side=(8, 16, 32, 64)),
            *sweep({**_BASE, "direction": BACKWARD}, C=(4, 12, 48, 192)),
        ],
    },
)
