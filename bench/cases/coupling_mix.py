"""Coupling and channel mix: half of [B, C, side, side] moves by given parameters, then C x C and a bias."""

from __future__ import annotations

from torch import Tensor

from linfast.ops import affine_coupling, channel_mix, coupling_mix
from linfast.scale_maps import ScaleMap

from ..harness import Case, Options, Problem, Provider, Size
from .affine_coupling import OPERATIONS
from .common import BACKWARD, FORWARD, INVERSE, Source, cost, inputs, providers, run, sweep

__all__ = ["CASE"]

_MAP = ScaleMap("smooth")


def build(size: Size, options: Options) -> Problem:
    """(y, log_det), or with the backward (y, dx, dparams, dweight, dbias)."""
    source, direction = Source(options, size), str(size["direction"])
    batch, channels, side = (int(size[key]) for key in ("batch", "C", "side"))
    shape = (batch, channels, *(2 * (side,) if side != 1 else ()))

    def make() -> tuple[Tensor, ...]:
        shapes = (shape, shape, (channels, channels), (channels,))
        drawn = tuple(source.normal(*s) for s in shapes)
        return (*drawn, source.normal(*shape)) if direction == BACKWARD else drawn

    inverse = direction == INVERSE

    def one(x: Tensor, params: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = coupling_mix(x, params, _MAP, weight, bias, inverse=inverse, log_det=True)
        assert log_det is not None
        return y, log_det

    def two(x: Tensor, params: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The same as two ops."""
        u, log_det = affine_coupling(x, params, _MAP, inverse=inverse, log_det=True)
        assert log_det is not None
        return channel_mix(u, weight, bias), log_det

    call, drawn = run(direction), inputs(make, options)
    x = drawn[0][0]
    on_gpu = options.device.type == "cuda"  # elsewhere both are the same torch
    return Problem(
        inputs=drawn,
        truth=call(two),
        reference=call(two),
        providers=[*providers(one, options, call), *([Provider("two ops", call(two))] if on_gpu else [])],
        cost=cost(direction, drawn[0][:4], [x], (2 * channels + OPERATIONS // 2) * x.numel()),
    )


_BASE: Size = {"direction": FORWARD, "dtype": "float32", "C": 12, "side": 16, "batch": 64}
_TRAIN: Size = {**_BASE, "direction": BACKWARD}
_GPU: Size = {**_BASE, "side": 32, "batch": 2048}
CASE = Case(
    "coupling_mix",
    build,
    sizes={
        "tiny": [{**_TRAIN, "C": 4, "side": 3, "batch": 2}],
        "quick": [_BASE],
        "gpu": [*sweep(_GPU, C=(4, 12, 64)), *sweep({**_GPU, "direction": BACKWARD}, C=(12, 64))],
        "full": [
            *sweep(_BASE, batch=[2**k for k in range(6, 17, 2)], C=(4, 12, 48, 96), side=(8, 16, 32, 64)),
            {**_BASE, "direction": INVERSE},
            *sweep(_TRAIN, C=(4, 12, 48, 96)),
        ],
    },
)
