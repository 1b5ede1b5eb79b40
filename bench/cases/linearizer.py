"""A Linearizer on vectors: f(x) = g^{-1}(A g(x)), MLP couplings with two hidden layers, a dense A."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import linfast as lf

from ..harness import Case, Cost, Options, Problem, Size
from .common import BACKWARD, FORWARD, Call, Source, inputs, perturb, providers, run, sweep
from .coupling_flow import flow_cost

__all__ = ["CASE"]


def build(size: Size, options: Options) -> Problem:
    """y of standard normal inputs, or with the backward (y, dx, *dweights)."""
    direction, batch, n = str(size["direction"]), int(size["batch"]), int(size["D"])
    model = _model(size).to(options.device)
    source, exact = Source(options, size), copy.deepcopy(model).double()
    count = 2 if direction == BACKWARD else 1
    return Problem(
        inputs=inputs(lambda: tuple(source.normal(count, batch, n)), options),
        truth=_call(exact, direction)(_function(exact, direction)),
        reference=_call(model, direction)(_function(model, direction)),
        providers=providers(_function(model, direction), options, _call(model, direction)),
        cost=_cost(size),
    )


def _call(model: lf.Linearizer, direction: str) -> Callable[..., Call]:
    return run(BACKWARD if direction == BACKWARD else FORWARD, list(model.parameters()))


def _function(model: lf.Linearizer, direction: str) -> Callable[..., Tensor]:
    return model.inverse if direction == "inverse" else model.forward


def _model(size: Size) -> lf.Linearizer:
    n, hidden = int(size["D"]), (int(size["hidden"]),) * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = lf.Linearizer(lf.coupling_flow(n, int(size["depth"]), hidden), lf.Dense(n))
        perturb(model)
    return model


def _cost(size: Size) -> Cost:
    """g, A and g^{-1}, each with its weights; x and y once."""
    one = flow_cost(size)
    n, passes = int(size["D"]), 3 if size["direction"] == BACKWARD else 1
    return Cost(one.bytes + passes * 4 * n * n, 2 * one.operations + passes * 2 * int(size["batch"]) * n * n)


_BASE: Size = {"direction": FORWARD, "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_DIRECTIONS = (FORWARD, "inverse", BACKWARD)
CASE = Case(
    "linearizer",
    build,
    sizes={
        "tiny": [{"direction": BACKWARD, "D": 6, "depth": 2, "hidden": 8, "batch": 4}],
        "quick": sweep({**_BASE, "batch": 256}, direction=("inverse", BACKWARD)),
        "gpu": [
            *sweep({**_BASE, "batch": 65536}, direction=_DIRECTIONS),
            *sweep({**_BASE, "batch": 1024}, direction=(FORWARD,)),
        ],
        "full": [
            size
            for direction in _DIRECTIONS
            for size in sweep(
                {**_BASE, "direction": direction},
                batch=[2**k for k in range(6, 23, 2)],
                depth=(2, 8, 32),
                hidden=(32, 128, 512),
                D=(8, 64, 256),
            )
        ],
    },
)
