"""A coupling flow on vectors: density forward, inverse, and the likelihood's training step.

Peer libraries, where installed, run the same architecture with weights and scale maps of their own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import linfast as lf

from ..harness import Case, Cost, Options, Problem, Provider, Size
from ..library_models import PEERS, peer
from .common import FORWARD, Source, inputs, perturb, providers, sweep

__all__ = ["CASE", "PEERS_CASE", "TRAIN", "flow_cost"]

INVERSE, TRAIN = "inverse", "training step"
Outputs = tuple[Tensor, ...]
CONTROL = "linfast again"


def build(size: Size, options: Options, control: bool = False) -> Problem:
    """(z, log_det), (x,), or (loss, *gradients of the weights) for loss = mean(|z|^2 / 2 - log_det).

    The optimiser's update is the same for every provider and left out. Most peers give a log-determinant with
    their inverse, needed or not. With ``control`` our flow runs as its users run it, with the backend "auto", and
    a copy of it is among the providers: what it takes over the flow is the noise of the timing.
    """
    direction, batch, n = str(size["direction"]), int(size["batch"]), int(size["D"])
    shape = n, int(size["depth"]), (int(size["hidden"]),) * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = lf.coupling_flow(*shape)
        perturb(flow)
        peers = {name: made for name in PEERS if (made := peer(name, *shape)) is not None}
        for model, _, _ in peers.values():
            perturb(model)
    source, exact = Source(options, size), copy.deepcopy(flow).double().to(options.device)
    flow = flow.to(options.device)
    rivals = []
    for name, (model, forward, inverse) in peers.items():
        narrow, wide = model.to(options.device), copy.deepcopy(model).double().to(options.device)
        pick = inverse if direction == INVERSE else forward
        calls = [_run(direction, m.parameters())(_bound(pick, m)) for m in (narrow, wide)]
        rivals.append(Provider(name, calls[0], truth=_in_float64(calls[1])))
    call = _run(direction, flow.parameters())
    ours = providers(_method(flow, direction), options, call)
    if control:
        again = copy.deepcopy(flow)
        compiled = [provider for provider in ours[1:] if provider.name != "linfast"]
        ours = [Provider("linfast", call(_method(flow, direction)), baseline=True), *compiled]
        same = Provider(CONTROL, _run(direction, again.parameters())(_method(again, direction)))
        rivals.insert(len(rivals) // 2, same)  # not beside ours, whose code would still be in the cache
    return Problem(
        inputs=inputs(lambda: (source.normal(batch, n),), options),
        truth=_run(direction, exact.parameters())(_method(exact, direction)),
        reference=call(_method(flow, direction)),
        providers=[*ours, *rivals],
        cost=flow_cost(size),
    )


def _in_float64(call: Callable[[Tensor], Outputs]) -> Callable[[Tensor], Outputs]:
    """With zeros that the library makes in float64 too."""

    def exact(x: Tensor) -> Outputs:
        torch.set_default_dtype(torch.float64)
        try:
            return call(x)
        finally:
            torch.set_default_dtype(torch.float32)

    return exact


def _bound(pick: Callable[..., Outputs], model: torch.nn.Module) -> Callable[[Tensor], Outputs]:
    return lambda x: pick(model, x)


def _method(flow: lf.Flow, direction: str) -> Callable[[Tensor], Tensor | Outputs]:
    return flow.inverse if direction == INVERSE else flow.forward_and_log_det


def _run(direction: str, weights: Iterable[Tensor]) -> Callable[..., Callable[[Tensor], Outputs]]:
    parameters = [weight for weight in weights if weight.requires_grad]

    def density(function: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
        with torch.no_grad():
            outputs = function(x)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def train(function: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
        z, log_det = function(x)
        loss = (0.5 * z.square().sum(1) - log_det).mean()
        return (loss.detach(), *torch.autograd.grad(loss, parameters))

    step = train if direction == TRAIN else density
    return lambda function: lambda x: step(function, x)


def flow_cost(size: Size) -> Cost:
    """Each sample in and out once, weights once, a multiply-add of every weight a sample; see ``common.cost``."""
    n, batch, depth, hidden = (int(size[key]) for key in ("D", "batch", "depth", "hidden"))
    weights = depth * (n // 2 * hidden + hidden * hidden + hidden * n)
    read, written = 4 * (batch * n + weights), 4 * batch * n
    if size["direction"] in (FORWARD, INVERSE):
        return Cost(read + written, 2 * batch * weights)
    return Cost(3 * read + 2 * written, 6 * batch * weights)


_BASE: Size = {"direction": FORWARD, "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_DIRECTIONS = (FORWARD, INVERSE, TRAIN)
CASE = Case(
    "coupling_flow",
    build,
    sizes={
        "tiny": [{"direction": TRAIN, "D": 6, "depth": 2, "hidden": 8, "batch": 4}],
        "quick": [
            *sweep(_BASE, batch=(64, 256, 1024)),
            *sweep({**_BASE, "direction": TRAIN, "batch": 128}, depth=(2, 4, 8)),
        ],
        "gpu": [
            *sweep(_BASE, batch=(1024, 2**18)),
            *sweep({**_BASE, "batch": 2**16}, direction=(INVERSE, TRAIN)),
        ],
        "full": [
            size
            for direction in _DIRECTIONS
            for size in sweep(
                {**_BASE, "direction": direction},
                batch=[2**k for k in range(6, 23, 2)],
                depth=(2, 4, 8, 16, 32),
                hidden=(32, 128, 512),
                D=(8, 64, 256),
            )
        ],
    },
)

_PEERS = [{**_BASE, "direction": d, "batch": b} for d in _DIRECTIONS for b in (1, 16, 64, 256, 1024)]
PEERS_CASE = Case(
    "peers",
    functools.partial(build, control=True),
    sizes={"tiny": CASE.sizes["tiny"], "quick": _PEERS[2:4], "gpu": _PEERS[2:4], "full": _PEERS},
)
"""The same at the sizes of one question: is ``coupling_flow`` slower than the fastest library?"""
