"""GroupNorm, a time embedding's scale and shift, SiLU, as a U-Net's block does them."""

from __future__ import annotations

from torch import Tensor

from linfast.ops import group_norm_silu

from ..harness import Case, Options, Problem, Size
from .common import BACKWARD, FORWARD, Source, cost, inputs, providers, run, sweep

__all__ = ["CASE"]

_OPERATIONS = 12  # an element: mean and variance 4, normalise 2, two affine maps 4, SiLU 2


def build(size: Size, options: Options) -> Problem:
    """y, or with the backward (y, dx, dweight, dbias, dscale, dshift)."""
    source, direction = Source(options, size), str(size["direction"])
    batch, channels, side, groups = (int(size[key]) for key in ("batch", "C", "side", "groups"))

    def function(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return group_norm_silu(x, groups, weight, bias, scale, shift)

    def make() -> tuple[Tensor, ...]:
        shapes = ((batch, channels, side, side), *2 * ((channels,),), *2 * ((batch, channels),))
        drawn = tuple(source.normal(*shape) for shape in shapes)
        return (*drawn, source.normal(*shapes[0])) if direction == BACKWARD else drawn

    call, drawn = run(direction), inputs(make, options)
    x = drawn[0][0]
    return Problem(
        inputs=drawn,
        truth=call(function),
        reference=call(function),
        providers=providers(function, options, call),
        cost=cost(direction, drawn[0][:5], [x], _OPERATIONS * x.numel()),
    )


_BASE: Size = {"direction": FORWARD, "dtype": "float32", "C": 64, "side": 16, "groups": 16, "batch": 32}
_GPU: Size = {**_BASE, "C": 128, "side": 32, "groups": 32, "batch": 256}
CASE = Case(
    "group_norm_silu",
    build,
    sizes={
        "tiny": [{"direction": BACKWARD, "dtype": "float32", "C": 4, "side": 4, "groups": 2, "batch": 2}],
        "quick": sweep(_BASE, batch=(32,)),
        "gpu": [{**_GPU, "direction": d, "dtype": t} for d in (FORWARD, BACKWARD) for t in ("float32", "bfloat16")],
        "full": [
            *sweep(_BASE, batch=[2**k for k in range(6, 15, 2)], side=(8, 16, 32, 64), C=(64, 128, 256)),
            *sweep({**_BASE, "direction": BACKWARD}, side=(8, 16, 32)),
        ],
    },
)
