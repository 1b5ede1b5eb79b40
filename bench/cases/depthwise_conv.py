"""Depthwise "same" correlation with a k x k kernel a channel."""

from __future__ import annotations

from torch import Tensor

from linfast.ops import depthwise_conv

from ..harness import Case, Options, Problem, Size
from .common import BACKWARD, FORWARD, Source, cost, inputs, providers, run, sweep

__all__ = ["CASE"]


def build(size: Size, options: Options) -> Problem:
    """y, or with the backward (y, dx, dweight)."""
    source, direction = Source(options, size), str(size["direction"])
    batch, channels, side, k = (int(size[key]) for key in ("batch", "C", "side", "k"))

    def make() -> tuple[Tensor, ...]:
        x, weight = source.normal(batch, channels, side, side), source.normal(channels, k, k)
        return (x, weight, source.normal(*x.shape)) if direction == BACKWARD else (x, weight)

    call, drawn = run(direction), inputs(make, options)
    x = drawn[0][0]
    return Problem(
        inputs=drawn,
        truth=call(depthwise_conv),
        reference=call(depthwise_conv),
        providers=providers(depthwise_conv, options, call),
        cost=cost(direction, drawn[0][:2], [x], 2 * k * k * x.numel()),
    )


_BASE: Size = {"direction": FORWARD, "dtype": "float32", "C": 8, "side": 32, "k": 5, "batch": 64}
_GPU: Size = {**_BASE, "C": 64, "batch": 512}
CASE = Case(
    "depthwise_conv",
    build,
    sizes={
        "tiny": [{"direction": BACKWARD, "dtype": "float32", "C": 2, "side": 6, "k": 3, "batch": 2}],
        "quick": sweep(_BASE, batch=(64,)),
        "gpu": [*sweep(_GPU, k=(3, 5, 9)), {**_GPU, "direction": BACKWARD}],
        "full": [
            *sweep(_BASE, batch=[2**k for k in range(6, 15, 2)], k=(3, 5, 9, 17), side=(8, 16, 32, 64, 128)),
            *sweep({**_BASE, "direction": BACKWARD}, k=(3, 5, 9)),
        ],
    },
)
