"""Flows and Linearizers on vectors: MLP couplings with two hidden layers, weights 0.05 randn off their defaults.

Peer libraries, where they are installed, run the same architecture with weights and scale maps of their own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

import linfast as lf

from ..harness import CONTROL, Case, Cost, Options, Problem, Provider, Size
from ..library_models import PEERS, peer
from .common import BACKWARD, FORWARD, INVERSE, Source, grid, inputs, ints, perturb, providers, run

__all__ = ["CASES"]

_TRAIN = "training step"
Outputs = tuple[Tensor, ...]
_Made = TypeVar("_Made")


def _seeded(make: Callable[[], _Made]) -> _Made:
    """Make a model with the same weights in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _flow(size: Size, memory: str = "auto") -> lf.Flow:
    n, depth, hidden = ints(size, "D", "depth", "hidden")
    return _seeded(lambda: perturb(lf.coupling_flow(n, depth, (hidden, hidden), memory=memory)))


def _cost(size: Size) -> Cost:
    """Samples in and out once, the weights once, one multiply-add per weight and sample; thrice with gradients."""
    n, batch, depth, hidden = ints(size, "D", "batch", "depth", "hidden")
    weights = depth * (n // 2 * hidden + hidden * hidden + hidden * n)
    read, written = 4 * (batch * n + weights), 4 * batch * n
    if size["direction"] in (FORWARD, INVERSE):
        return Cost(read + written, 2 * batch * weights)
    return Cost(3 * read + 2 * written, 6 * batch * weights)


# coupling_flow: density, inverse, and the training step by likelihood, whose loss is mean(|z|^2 / 2 - log_det). The
# optimiser's update is the same for every provider and left out.


def _coupling_flow(size: Size, options: Options, control: bool = False) -> Problem:
    """(z, log_det), (x,), or (loss, *gradients of the weights).

    Most peers give a log-determinant with their inverse, needed or not. With ``control`` our flow runs as its users
    run it, with the backend "auto", and a copy of it is among the providers: its time over the flow's is the noise.
    """
    direction = str(size["direction"])
    shape = int(size["D"]), int(size["depth"]), (int(size["hidden"]),) * 2
    source, flow = Source(options, size), _flow(size).to(options.device)
    exact, method = copy.deepcopy(flow).double(), _method(direction)
    rivals = []
    for name in PEERS:
        if (made := _seeded(functools.partial(peer, name, *shape))) is not None:
            narrow = made[0].to(options.device)
            if name != "glasflow":  # of moved weights its inverse divides by scales near 0.001, and float32 is lost
                _seeded(functools.partial(perturb, narrow))
            wide, pick = copy.deepcopy(narrow).double(), made[2 if direction == INVERSE else 1]
            call, truth = (_run(direction, m)(functools.partial(pick, m)) for m in (narrow, wide))
            rivals.append(Provider(name, call, truth=_in_float64(truth)))
    ours = providers(functools.partial(method, flow), options, _run(direction, flow))
    if control:
        again = copy.deepcopy(flow)
        call, same = (_run(direction, m)(functools.partial(method, m)) for m in (flow, again))
        compiled = [provider for provider in ours[1:] if provider.name != "linfast"]
        ours = [Provider("linfast", call, baseline=True), *compiled]
        rivals.insert(len(rivals) // 2, Provider(CONTROL, same))  # its code is not in the cache from ours
    return Problem(
        inputs=inputs(lambda: (source.normal(int(size["batch"]), shape[0]),), options),
        truth=_run(direction, exact)(functools.partial(method, exact)),
        reference=_run(direction, flow)(functools.partial(method, flow)),
        providers=[*ours, *rivals],
        cost=_cost(size),
    )


def _method(direction: str) -> Callable[..., Tensor | Outputs]:
    return lf.Flow.inverse if direction == INVERSE else lf.Flow.forward_and_log_det


def _in_float64(call: Callable[[Tensor], Outputs]) -> Callable[[Tensor], Outputs]:
    """The call with float64 as the default dtype, for the zeros that a library creates."""

    def exact(x: Tensor) -> Outputs:
        torch.set_default_dtype(torch.float64)
        try:
            return call(x)
        finally:
            torch.set_default_dtype(torch.float32)

    return exact


def _run(direction: str, model: nn.Module) -> Callable[..., Callable[[Tensor], Outputs]]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def density(function: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
        with torch.no_grad():
            outputs = function(x)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def train(function: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
        z, log_det = function(x)
        loss = (0.5 * z.square().sum(1) - log_det).mean()
        return (loss.detach(), *torch.autograd.grad(loss, weights))

    step = train if direction == _TRAIN else density
    return lambda function: functools.partial(step, function)


_BASE: Size = {"direction": FORWARD, "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_TINY: Size = {"D": 6, "depth": 2, "hidden": 8, "batch": 4}


_DIRECTIONS = (FORWARD, INVERSE, _TRAIN)
_FLOW = Case(
    "coupling_flow",
    _coupling_flow,
    sizes={
        "tiny": [{"direction": _TRAIN, **_TINY}],
        "quick": [
            *grid(_BASE, batch=(64, 256, 1024)),
            *grid({**_BASE, "direction": _TRAIN, "batch": 128}, depth=(2, 4, 8)),
        ],
        "gpu": [*grid(_BASE, batch=(1024, 2**18)), *grid({**_BASE, "batch": 2**16}, direction=(INVERSE, _TRAIN))],
        "full": [
            *grid(_BASE, direction=_DIRECTIONS, batch=(2**6, 2**10, 2**14, 2**18, 2**22)),
            *grid(_BASE, direction=_DIRECTIONS, depth=(2, 32)),
        ],
    },
)
_AT = grid(_BASE, direction=_DIRECTIONS, batch=(1, 16, 64, 256, 1024))
_PEERS = Case(
    "peers",  # at the sizes of one question: is coupling_flow slower than the fastest library?
    functools.partial(_coupling_flow, control=True),
    sizes={"tiny": _FLOW.sizes["tiny"], "quick": _AT[2:4], "gpu": _AT[2:4], "full": _AT},
    every_size=True,
)


# A Linearizer, f(x) = g^{-1}(A g(x)), with a dense A.


def _linearizer(size: Size, options: Options) -> Problem:
    """y of standard normal inputs, or with the backward (y, dx, *dweights)."""
    direction, (batch, n) = str(size["direction"]), ints(size, "batch", "D")
    depth, hidden = int(size["depth"]), (int(size["hidden"]),) * 2
    model = _seeded(lambda: perturb(lf.Linearizer(lf.coupling_flow(n, depth, hidden), lf.Dense(n))))
    model = model.to(options.device)
    source, exact = Source(options, size), copy.deepcopy(model).double()
    count = 2 if direction == BACKWARD else 1
    method = lf.Linearizer.inverse if direction == INVERSE else lf.Linearizer.forward
    call, truth = (run(direction, list(m.parameters())) for m in (model, exact))
    one, passes = _cost(size), 3 if direction == BACKWARD else 1
    return Problem(
        inputs=inputs(lambda: tuple(source.normal(count, batch, n)), options),
        truth=truth(functools.partial(method, exact)),
        reference=call(functools.partial(method, model)),
        providers=providers(functools.partial(method, model), options, call),
        cost=Cost(one.bytes + passes * 4 * n * n, 2 * one.operations + passes * 2 * batch * n * n),
    )


_LINEARIZER = Case(
    "linearizer",
    _linearizer,
    sizes={
        "tiny": [{"direction": BACKWARD, **_TINY}],
        "quick": grid({**_BASE, "batch": 256}, direction=(INVERSE, BACKWARD)),
        "gpu": [*grid({**_BASE, "batch": 65536}, direction=(FORWARD, INVERSE, BACKWARD)), _BASE],
        "full": grid(_BASE, direction=(FORWARD, INVERSE, BACKWARD), batch=(2**6, 2**10, 2**14, 2**18)),
    },
)


# What a flow's backward keeps: a training step with memory="invert" against "store", one flow of each depth.


def _reversible(size: Size, options: Options) -> Problem:
    """Forward with log_det and backward of ``coupling_flow``, as (z, log_det, dx, *dweights)."""
    whole: Size = {**size, "D": 64, "hidden": 128, "direction": _TRAIN}
    source, stored = Source(options, whole), _flow(whole, "store").to(options.device)
    inverted, exact = (copy.deepcopy(stored) for _ in range(2))
    inverted.memory = "invert"
    return Problem(
        inputs=[tuple(source.normal(2, int(size["batch"]), 64)) for _ in range(3)],
        truth=_step(exact.double()),
        reference=_step(stored),
        providers=[Provider("store", _step(stored), baseline=True), Provider("invert", _step(inverted))],
        cost=_cost(whole),
    )


def _step(g: lf.Flow) -> Callable[[Tensor, Tensor], Outputs]:
    weights = list(g.parameters())

    def step(x: Tensor, v: Tensor) -> Outputs:
        x = x.detach().requires_grad_()
        z, log_det = g.forward_and_log_det(x)
        return z.detach(), log_det.detach(), *torch.autograd.grad((z, log_det), [x, *weights], (v, v[:, 0]))

    return step


_REVERSIBLE = Case(
    "reversible",
    _reversible,
    sizes={
        "tiny": [{"batch": 4, "depth": 2}],
        "quick": grid({"batch": 1024}, depth=(4, 16)),
        "gpu": grid({"batch": 2**16}, depth=(8, 32)),
        "full": grid({"batch": 1024}, depth=(4, 16, 64)),
    },
)

CASES = [_FLOW, _PEERS, _LINEARIZER, _REVERSIBLE]
