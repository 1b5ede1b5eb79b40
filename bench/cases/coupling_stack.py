"""A stack of couplings with MLP conditioners as one op, on packed weights or packed at every call.

Modes "exact" and "fast" only: what an fp32 reference allows does not say what is right for
"tf32" and "high", and the check before the clock has no other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from linfast.ops import coupling_stack
from linfast.ops.stack_weights import CouplingLayer
from linfast.scale_maps import ScaleMap

from ..harness import Case, Options, Problem, Size
from .common import BACKWARD, FORWARD, INVERSE, Source, inputs, providers, run, sweep
from .coupling_flow import flow_cost

__all__ = ["CASE"]

_MAP = ScaleMap("smooth", bound=0.5)
_N_LINEAR = 3


def _shapes(size: Size) -> list[tuple[int, ...]]:
    """Of one layer's weights and biases, in turn."""
    n, hidden = int(size["D"]), int(size["hidden"])
    widths = (n // 2, hidden, hidden, n)
    return [shape for i in range(_N_LINEAR) for shape in ((widths[i + 1], widths[i]), (widths[i + 1],))]


def _stack(x: Tensor, tensors: Sequence[Tensor], precision: str, inverse: bool) -> tuple[Tensor, Tensor]:
    step = 2 * _N_LINEAR
    layers = [
        CouplingLayer(tensors[i : i + step : 2], tensors[i + 1 : i + step : 2])
        for i in range(0, len(tensors), step)
    ]
    y, log_det = coupling_stack(
        x, layers, activation="silu", scale_map=_MAP, inverse=inverse, log_det=True, precision=precision
    )
    assert log_det is not None
    return y, log_det


def build(size: Size, options: Options) -> Problem:
    """(y, log_det), or with the backward (y, dx, *dweights)."""
    source, direction = Source(options, size), str(size["direction"])
    batch, n, depth = (int(size[key]) for key in ("batch", "D", "depth"))

    def make() -> tuple[Tensor, ...]:
        weights = tuple(source.normal(*s) / s[-1] ** 0.5 for _ in range(depth) for s in _shapes(size))
        drawn = (source.normal(batch, n), *weights)
        return (*drawn, source.normal(batch, n)) if direction == BACKWARD else drawn

    def function(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return _stack(x, tensors, str(size["precision"]), direction == INVERSE)

    def exact(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return _stack(x, tensors, "exact", direction == INVERSE)

    call = run(direction)
    return Problem(
        inputs=inputs(make, options),
        truth=call(exact),
        reference=call(function),
        providers=providers(function, options, call),
        cost=flow_cost({**size, "direction": "training step" if direction == BACKWARD else FORWARD}),
    )


_BASE: Size = {"direction": FORWARD, "precision": "exact", "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_MODES = ("exact", "fast")
_GPU = [{**_BASE, "direction": d, "precision": p, "batch": 2**16} for d in (FORWARD, BACKWARD) for p in _MODES]
CASE = Case(
    "coupling_stack",
    build,
    sizes={
        "tiny": [{**_BASE, "direction": BACKWARD, "D": 6, "depth": 2, "hidden": 8, "batch": 4}],
        "quick": [{**_BASE, "batch": 256}],
        "gpu": [_BASE, *_GPU],
        "full": [
            size
            for base in [*_GPU, {**_BASE, "direction": INVERSE}]
            for size in sweep(
                base, batch=[2**k for k in range(6, 21, 2)], hidden=(32, 64, 128, 256), D=(8, 64, 128)
            )
        ],
    },
)
