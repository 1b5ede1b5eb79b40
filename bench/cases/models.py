"""Models made of flows and networks: Linearizers, streams of their samples, densities, residual networks."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import linfast as lf

from ..harness import Case, Cost, Options, Problem, Provider, Size
from .common import (
    BACKWARD,
    FORWARD,
    INVERSE,
    TOLERANCES,
    TRAIN,
    Call,
    Function,
    grid,
    in_precision,
    ints,
    kernel_backend,
    perturb,
    providers,
    seeded,
    under,
)  # fmt: skip
from .flows import architecture, call_of, cost_of, flow_of, problem, timed

# A Linearizer, f(x) = g^{-1}(A g(x)), with a dense A. "linfast frozen" keeps its packed weights between calls.


def _linearizer(size: Size, options: Options) -> Problem:
    """y for standard normal inputs, or with the backward (y, dx, *dweights)."""
    direction, mode, (batch, n) = size["direction"], str(size["precision"]), ints(size, "batch", "D")
    model = seeded(lambda: perturb(lf.Linearizer(lf.coupling_flow(*architecture(size)), lf.Dense(n))))
    model = model.to(options.device)
    method = lf.Linearizer.inverse if direction == INVERSE else lf.Linearizer.forward
    compared = providers(functools.partial(method, model), options, timed(size, model))
    if direction != BACKWARD and (backend := kernel_backend(options)) is not None:
        compared.append(Provider("linfast frozen", under(backend, call_of(size, _frozen(model), method))))
    compared = [replace(provider, call=_in_mode(mode, options, provider.call)) for provider in compared]
    one, passes = cost_of(size), 3 if direction == BACKWARD else 1
    cost = Cost(one.bytes + passes * 4 * n * n, 2 * one.operations + passes * 2 * batch * n * n)
    return problem(size, options, model, method, compared, None if mode == "exact" else TOLERANCES[mode], cost)


def _frozen(model: nn.Module) -> nn.Module:
    """A copy of the model, frozen until the process ends."""
    frozen = copy.deepcopy(model)
    contextlib.ExitStack().enter_context(lf.freeze(frozen))
    return frozen


def _in_mode(mode: str, options: Options, call: Function) -> Call:
    """The call in this mode: "fast" by autocast to bf16, so that plain torch has it too."""
    fast, kind = mode == "fast", options.device.type

    def chosen(*arguments: Tensor) -> tuple[Tensor, ...]:
        with in_precision("" if fast else mode), torch.autocast(kind, torch.bfloat16, fast, cache_enabled=False):
            return call(*arguments)

    return chosen


_BASE: Size = {"direction": FORWARD, "precision": "exact", "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_TINY: Size = {"D": 6, "depth": 2, "hidden": 8, "batch": 4}
_FLAGSHIP: Size = {**_BASE, "batch": 2**20}
_MODES = ("exact", "fast", "tf32", "high")
_LINEARIZER = Case(
    "linearizer",
    _linearizer,
    sizes={
        "tiny": [{**_BASE, **_TINY, "direction": BACKWARD}],
        "quick": grid({**_BASE, "batch": 256}, direction=(INVERSE, BACKWARD)),
        "gpu": [  # the first are in the tables of docs/roofline.md, the most important first
            *grid(_FLAGSHIP, precision=_MODES),
            *grid({**_BASE, "batch": 64}, precision=_MODES),
            *grid({**_FLAGSHIP, "D": 128, "hidden": 256}, precision=("fast", "tf32")),
            *grid({**_BASE, "direction": BACKWARD, "batch": 2**16}, precision=("exact", "fast")),
            {**_BASE, "direction": INVERSE, "batch": 2**16},
            *grid(_BASE, batch=(1024, 2**14)),
        ],
        "full": grid(_BASE, direction=(FORWARD, INVERSE, BACKWARD), batch=(2**6, 2**10, 2**14, 2**18, 2**20)),
    },
)


# ``sample_stream`` into a tensor: with its CUDA graph replayed, and with each block launched from Python.


def _streams(size: Size, options: Options) -> Problem:
    """The samples of a Linearizer in one step, for a seed."""
    n, rows, block, rank = ints(size, "D", "batch", "block", "r")
    flow, device = flow_of(size), options.device
    f = lf.Linearizer(flow, seeded(lambda: perturb(lf.TimeLowRank(n, rank)))).to(device)
    exact = lf.generator(copy.deepcopy(f).double())
    noise = nn.PReLU(init=1.0).to(device)  # the identity; its parameter sets the noise's device and dtype

    def stream(model: nn.Module, captured: bool, seed: Tensor) -> Tensor:
        options = {"noise_shape": (n,), "block_size": block, "cuda_graph": captured, "progress": False}
        return lf.sample_stream(model, rows, block, torch.empty(rows, n), int(seed), **options)  # type: ignore[arg-type]

    names = {"launched": False, "captured": True} if device.type == "cuda" else {"launched": False}
    return Problem(
        inputs=[(torch.tensor(seed),) for seed in range(3)],
        truth=lambda seed: exact(stream(noise, False, seed).to(device).double()).cpu(),
        reference=1e-4,
        providers=[
            Provider(name, functools.partial(stream, f, captured), baseline=not captured)
            for name, captured in names.items()
        ],
        cost=cost_of({**size, "direction": INVERSE}),
    )


_STREAM: Size = {"D": 64, "depth": 8, "hidden": 128, "r": 8, "block": 2**8, "batch": 2**10}
_STREAMS = Case(
    "streams",
    _streams,
    sizes={
        "tiny": [{**_STREAM, **_TINY, "r": 2, "block": 2}],
        "quick": [_STREAM],
        "gpu": [{**_STREAM, "block": 2**14, "batch": 2**21}],
        "full": grid(_STREAM, block=(2**8, 2**12), batch=(2**10, 2**14)),
    },
)


# A Density of affine or spline couplings: log p(x), and a training step by likelihood.


def _density(size: Size, options: Options) -> Problem:
    """(log p,), or (loss, *gradients of the weights), where the loss is the mean of -log p."""
    transform: Any = size["transform"]
    model = seeded(lambda: perturb(lf.Density(lf.coupling_flow(*architecture(size), transform=transform))))
    model = model.to(options.device).eval()  # in training mode it looks at the scale of the data

    def method(p: lf.Density, x: Tensor) -> tuple[Tensor, ...]:
        log_p = p.log_prob(x)
        return (x.new_zeros(len(x), 1), log_p) if size["direction"] == TRAIN else (log_p,)

    compared = providers(functools.partial(method, model), options, timed(size, model))
    return problem(size, options, model, method, compared)


_DENSITY: Size = {"direction": FORWARD, "transform": "spline", "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_DENSITIES = Case(
    "density",
    _density,
    sizes={
        "tiny": [{**_DENSITY, **_TINY, "direction": TRAIN}],
        "quick": [_DENSITY],
        "gpu": grid({**_DENSITY, "batch": 2**16}, transform=("affine", "spline"), direction=(FORWARD, TRAIN)),
        "full": grid(_DENSITY, transform=("affine", "spline"), direction=(FORWARD, TRAIN), batch=(64, 1024)),
    },
)


# A residual network with batch norm and a context that gates its blocks. In training mode the gradients of biases
# before a norm would be zero up to rounding, so that running statistics are used here.


def _residual_mlp(size: Size, options: Options) -> Problem:
    """(y,), or (y, dx, *dweights)."""
    n, blocks, hidden, batch = ints(size, "D", "depth", "hidden", "batch")
    make = functools.partial(lf.ResidualMLP, activation="elu", batch_norm=True, context_features=n)
    model = seeded(lambda: perturb(make(n, n, hidden, blocks))).to(options.device).eval()

    def method(net: lf.ResidualMLP, x: Tensor) -> Tensor:
        return net(x, context=x)

    compared = providers(functools.partial(method, model), options, timed(size, model))
    weights = 3 * n * hidden + blocks * hidden * (2 * hidden + n)
    passes = 3 if size["direction"] == BACKWARD else 1
    cost = Cost(passes * 4 * (2 * batch * n + weights), passes * 2 * batch * weights)
    return problem(size, options, model, method, compared, cost=cost)


_RESIDUAL: Size = {"direction": FORWARD, "D": 32, "depth": 2, "hidden": 128, "batch": 1024}
_RESIDUAL_MLP = Case(
    "residual_mlp",
    _residual_mlp,
    sizes={
        "tiny": [{**_RESIDUAL, **_TINY, "direction": BACKWARD}],
        "quick": [_RESIDUAL],
        "gpu": [*grid(_RESIDUAL, direction=(FORWARD, BACKWARD), batch=(4096, 2**16)), {**_RESIDUAL, "batch": 64}],
        "full": grid(_RESIDUAL, direction=(FORWARD, BACKWARD), batch=(64, 1024, 2**14)),
    },
)

CASES = [_LINEARIZER, _STREAMS, _DENSITIES, _RESIDUAL_MLP]
