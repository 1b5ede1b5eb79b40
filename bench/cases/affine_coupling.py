"""Affine coupling with its log-determinant: one half of [B, D, side, side] moves by given parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from linfast.ops import affine_coupling
from linfast.scale_maps import ScaleMap

from ..harness import Case, Options, Problem, Size
from .common import BACKWARD, FORWARD, INVERSE, Source, cost, inputs, providers, run, sweep

__all__ = ["CASE", "OPERATIONS"]

_MAP = ScaleMap("smooth")
OPERATIONS = 8  # an element that moves: the map 3, exp 1, (x + t) e^s 2, its sum into log_det 1, a negation 1


def build(size: Size, options: Options) -> Problem:
    """(y, log_det), or with the backward (y, dx, dparams)."""
    source, direction = Source(options, size), str(size["direction"])
    shape = (int(size["batch"]), int(size["D"]), *(2 * (int(size["side"]),) if size["side"] != 1 else ()))

    def make() -> tuple[Tensor, ...]:
        return tuple(source.normal(*shape) for _ in range(3 if direction == BACKWARD else 2))

    def couple(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = affine_coupling(x, params, _MAP, inverse=direction == INVERSE, log_det=True)
        assert log_det is not None
        return y, log_det

    call, drawn = run(direction), inputs(make, options)
    return Problem(
        inputs=drawn,
        truth=call(couple),
        reference=call(couple),
        providers=providers(couple, options, call),
        cost=cost(direction, drawn[0][:2], [torch.Size(shape)], OPERATIONS * drawn[0][0].numel() // 2),
    )


_BASE: Size = {"direction": FORWARD, "dtype": "float32", "D": 64, "side": 1, "batch": 4096}
_TRAIN: Size = {**_BASE, "direction": BACKWARD}
_IMAGE: Size = {**_BASE, "D": 12, "side": 32, "batch": 64}
_GPU = [{**base, "dtype": dtype, "batch": 2**20} for base in (_BASE, _TRAIN) for dtype in ("float32", "bfloat16")]
CASE = Case(
    "affine_coupling",
    build,
    sizes={
        "tiny": [{**_TRAIN, "batch": 8, "D": 6}],
        "quick": sweep(_BASE, batch=(64, 1024, 16384)),
        "gpu": [*_GPU, {**_IMAGE, "batch": 4096}],
        "full": [
            *sweep(_BASE, batch=[2**k for k in range(6, 23, 2)], D=(8, 512)),
            *sweep(_TRAIN, batch=[2**k for k in range(6, 23, 4)]),
            *sweep(_IMAGE, side=(8, 16, 32, 64, 128), direction=(INVERSE,)),
        ],
    },
)
