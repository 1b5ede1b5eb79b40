"""Neural spline flows as programs in the field build them, before lf.accelerate and after.

dingo    gravitational waves: 15 features; per coupling a random permutation, an LU linear map and a rational-
         quadratic coupling of nflows, 8 bins, by a residual network of 5 blocks with ELU, batch norm and a context
nessai   nested sampling: glasflow's CouplingNSF, residual networks of 2 blocks, an LU map before each coupling
sbi      posteriors of simulators: nflows' rational-quadratic couplings, 10 bins, residual networks of 2 blocks
         with a context, an LU map after each, all between features and their z-scores
zuko     lampe's and zuko's NSF: autoregressive splines by a masked network
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linfast as lf

from ..harness import CONTROL, Case, Cost, Options, Problem, Provider, Size
from .common import FORWARD, INVERSE, TRAIN, Source, grid, inputs, ints, perturb, run, seeded

Run = Callable[[Any, Tensor, Tensor | None], Sequence[Tensor]]
Made = tuple[nn.Module, int, Run, Run]  # the model, its context's size, its density's direction and its samples'


def _dingo(features: int, depth: int, hidden: int) -> Made:
    import nflows.nn.nets as nets
    import nflows.transforms as transforms

    context = 129

    def mix() -> nn.Module:
        return transforms.CompositeTransform(
            [transforms.RandomPermutation(features), transforms.LULinear(features, identity_init=True)]
        )

    def net(n_in: int, n_out: int) -> nn.Module:
        return nets.ResidualNet(n_in, n_out, hidden, context, 5, F.elu, use_batch_norm=True)

    steps = []
    for i in range(depth):
        mask = torch.ones(features)
        mask[i % 2 :: 2] = -1
        spline = transforms.PiecewiseRationalQuadraticCouplingTransform
        steps += [mix(), spline(mask, net, 8, "linear", 3.0, apply_unconditional_transform=False)]
    return transforms.CompositeTransform([*steps, mix()]), context, _forward, _inverse


def _nessai(features: int, depth: int, hidden: int) -> Made:
    import glasflow

    model = glasflow.CouplingNSF(features, depth, n_neurons=hidden, n_blocks_per_transform=2, linear_transform="lu")
    return model, 0, lambda m, x, c: m.forward(x), lambda m, z, c: m.inverse(z)


def _sbi(features: int, depth: int, hidden: int) -> Made:
    import nflows.nn.nets as nets
    import nflows.transforms as transforms

    context = 8

    def net(n_in: int, n_out: int) -> nn.Module:
        return nets.ResidualNet(n_in, n_out, hidden, context, 2, F.relu)

    steps: list[nn.Module] = [transforms.PointwiseAffineTransform(0.5, 2.0)]
    for i in range(depth):
        mask = torch.arange(features).add(i).remainder(2)
        spline = transforms.PiecewiseRationalQuadraticCouplingTransform
        steps += [spline(mask, net, 10, "linear", 3.0), transforms.LULinear(features, identity_init=True)]
    return transforms.CompositeTransform(steps), context, _forward, _inverse


def _zuko(features: int, depth: int, hidden: int) -> Made:
    import zuko

    model = zuko.flows.NSF(features, 8, transforms=depth, hidden_features=(hidden, hidden))
    return (
        model,
        8,
        lambda m, x, c: m(c).transform.call_and_ladj(x),
        lambda m, z, c: (m(c).transform.inv(z),),
    )


def _forward(model: Any, x: Tensor, context: Tensor | None) -> Sequence[Tensor]:
    outputs: Sequence[Tensor] = model(x, context)
    return outputs


def _inverse(model: Any, z: Tensor, context: Tensor | None) -> Sequence[Tensor]:
    outputs: Sequence[Tensor] = model.inverse(z, context)
    return outputs


_MODELS: dict[str, Callable[[int, int, int], Made]] = {
    "dingo": _dingo,
    "nessai": _nessai,
    "sbi": _sbi,
    "zuko": _zuko,
}
# Relative errors allowed against float64: these flows are deep, and their inverses divide by slopes.
_WITHIN, _LOOSELY = 1e-3, 1e-2


def _program(size: Size, options: Options) -> Problem:
    """(z, log_det), (x, ..), or (loss, *gradients of the weights)."""
    direction = str(size["direction"])
    features, depth, hidden, batch = ints(size, "D", "depth", "hidden", "batch")
    model, context, forward, inverse = seeded(lambda: _MODELS[str(size["program"])](features, depth, hidden))
    model = seeded(lambda: perturb(model)).to(options.device).train(direction == TRAIN)
    method = inverse if direction == INVERSE else forward
    models = {"original": model, "accelerated": copy.deepcopy(model), CONTROL: copy.deepcopy(model)}
    lf.accelerate(models["accelerated"])

    def call(model: nn.Module, method: Run) -> Callable[..., tuple[Tensor, ...]]:
        weights = [p for p in model.parameters() if p.requires_grad]
        return run(direction, weights)(lambda x, *c: method(model, x, c[0] if c else None))

    exact = copy.deepcopy(model).double()
    compared = [Provider(who, call(each, method), baseline=who == "original") for who, each in models.items()]
    if options.compile:
        torch.compiler.reset()
        compiled: Run = torch.compile(method, dynamic=False)
        compared.append(Provider("compiled original", call(model, compiled)))
    source = Source(options, size)
    weights, passes = sum(p.numel() for p in model.parameters()), 3 if direction == TRAIN else 1
    draw = functools.partial(_drawn, source, batch, features, context)
    return Problem(
        inputs=inputs(draw, options),
        truth=call(exact, method),
        reference=_LOOSELY if direction == TRAIN else _WITHIN,
        providers=compared,
        cost=Cost(passes * 4 * (2 * batch * features + weights), passes * 2 * batch * weights),
    )


def _drawn(source: Source, batch: int, features: int, context: int) -> tuple[Tensor, ...]:
    x = source.normal(batch, features)
    return (x, source.normal(batch, context)) if context else (x,)


_BASE: Size = {"program": "sbi", "direction": FORWARD, "D": 5, "depth": 5, "hidden": 50, "batch": 512}
_OF: dict[str, Size] = {
    "sbi": _BASE,
    "nessai": {**_BASE, "program": "nessai", "D": 8, "depth": 4, "hidden": 32},
    "zuko": {**_BASE, "program": "zuko", "depth": 3, "hidden": 64},
    "dingo": {**_BASE, "program": "dingo", "D": 15, "depth": 30, "hidden": 512},
}
_DIRECTIONS = (FORWARD, INVERSE, TRAIN)
_EVERY = [
    size
    for name in ("sbi", "nessai", "zuko")
    for size in grid(_OF[name], batch=(64, 512, 4096, 65536), direction=_DIRECTIONS)
]
CASES = [
    Case(
        "programs",
        _program,
        sizes={
            "tiny": [{**size, "depth": 2, "hidden": 8, "batch": 8} for size in _OF.values()],
            "quick": grid(_BASE, direction=_DIRECTIONS),
            "gpu": [
                *grid(_OF["dingo"], batch=(4096,), direction=_DIRECTIONS),
                *grid(_OF["sbi"], batch=(512, 65536), direction=(FORWARD, INVERSE)),
                *grid(_OF["nessai"], batch=(512, 65536), direction=(FORWARD, INVERSE)),
            ],
            "full": [*_EVERY, *grid(_OF["dingo"], batch=(64, 1024), direction=_DIRECTIONS)],
        },
        every_size=True,
    )
]
