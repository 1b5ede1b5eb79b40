"""Masked autoregressive transforms of other libraries, before lf.accelerate and after; tanh, two hidden blocks.

"one pass" is the original's other direction, one evaluation of the network: what an inverse should cost.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import linfast as lf

from ..harness import CONTROL, Case, Cost, Options, Problem, Provider, Size
from .common import FORWARD, INVERSE, TRAIN, Source, grid, inputs, ints, perturb, run, seeded

Run = Callable[[Any, Tensor], Sequence[Tensor]]
Made = tuple[nn.Module, Run, Run]  # the model, and its density's direction and its samples'


def _nflows(features: int, hidden: int) -> Made:
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    model = MaskedAffineAutoregressiveTransform(
        features, hidden, num_blocks=2, use_residual_blocks=False, activation=torch.tanh
    )
    return model, lambda m, x: m(x), lambda m, z: m.inverse(z)


def _normflows(features: int, hidden: int) -> Made:
    from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive

    model = MaskedAffineAutoregressive(features, hidden, activation=torch.tanh)
    return model, lambda m, x: m(x), lambda m, z: m.inverse(z)


def _zuko(name: str) -> Callable[[int, int], Made]:
    def make(features: int, hidden: int) -> Made:
        import zuko

        flow = getattr(zuko.flows, name)(features, transforms=1, hidden_features=(hidden,) * 3, activation=nn.Tanh)
        return (
            flow,
            lambda m, x: m().transform.call_and_ladj(x),
            lambda m, z: (m().transform.inv(z),),
        )

    return make


_MODELS: dict[str, Callable[[int, int], Made]] = {
    "nflows MAF": _nflows,
    "normflows MAF": _normflows,
    "zuko MAF": _zuko("MAF"),
    "zuko NSF": _zuko("NSF"),
}
# Relative errors allowed against float64. A gradient's is larger: inverses divide by scales.
_WITHIN, _LOOSELY = 1e-4, 1e-3


def _autoregressive(size: Size, options: Options) -> Problem:
    """(z, log_det), (x, ..), or (loss, *gradients of the weights) of one transform."""
    name, direction = str(size["library"]), str(size["direction"])
    features, hidden, batch = ints(size, "D", "hidden", "batch")
    model, forward, inverse = seeded(lambda: _MODELS[name](features, hidden))
    model = seeded(lambda: perturb(model)).to(options.device).eval()
    method = inverse if direction == INVERSE else forward
    models = {"original": model, "accelerated": copy.deepcopy(model), CONTROL: copy.deepcopy(model)}
    lf.accelerate(models["accelerated"])

    def call(model: nn.Module, method: Run) -> Callable[..., tuple[Tensor, ...]]:
        return run(direction, [p for p in model.parameters() if p.requires_grad])(functools.partial(method, model))

    def exact(method: Run) -> Callable[..., tuple[Tensor, ...]]:
        return call(copy.deepcopy(model).double(), method)

    compared = [Provider(who, call(each, method), baseline=who == "original") for who, each in models.items()]
    if options.compile:
        torch.compiler.reset()
        compiled: Run = torch.compile(method, dynamic=False)
        compared.append(Provider("compiled original", call(model, compiled)))
    if direction == INVERSE:
        compared.append(Provider("one pass", call(model, forward), truth=exact(forward)))
    weights, source = sum(p.numel() for p in model.parameters()), Source(options, size)
    passes = 3 if direction == TRAIN else 1
    return Problem(
        inputs=inputs(lambda: tuple(source.normal(1, batch, features)), options),
        truth=exact(method),
        reference=_LOOSELY if direction == TRAIN else _WITHIN,
        providers=compared,
        cost=Cost(passes * 4 * (2 * batch * features + weights), passes * 2 * batch * weights),
    )


_BASE: Size = {"library": "nflows MAF", "direction": INVERSE, "D": 8, "hidden": 50, "batch": 10_000}
_OTHERS = grid(_BASE, library=("normflows MAF", "zuko MAF", "zuko NSF"), batch=(100, 2_000, 10_000))
_SIZES = ((8, 50, 10_000), (32, 128, 10_000), (64, 256, 2_000), (8, 50, 500), (2, 50, 100))
_AT: list[Size] = [{**_BASE, "D": n, "hidden": hidden, "batch": batch} for n, hidden, batch in _SIZES]
_DENSITY = grid(_BASE, library=("nflows MAF", "zuko MAF"), direction=(FORWARD, TRAIN), batch=(1, 64, 1024))
CASES = [
    Case(
        "autoregressive",
        _autoregressive,
        sizes={
            "tiny": [{**_BASE, "D": 4, "hidden": 8, "batch": 4}],
            "quick": _AT[3:],
            "gpu": grid({**_BASE, "D": 16, "hidden": 128, "batch": 2**16}, direction=(FORWARD, INVERSE)),
            "full": [*_AT, *_OTHERS, *_DENSITY],
        },
        every_size=True,
    )
]
