"""Flows on vectors: MLP couplings with two hidden layers, 0.05 randn added to all weights.

Peer libraries, where they are installed, run the same architecture with their own weights and scale maps.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import linfast as lf

from ..harness import CONTROL, Case, Cost, Options, Problem, Provider, Size
from .common import (
    BACKWARD,
    FORWARD,
    INVERSE,
    TRAIN,
    Call,
    Function,
    Source,
    grid,
    inputs,
    ints,
    perturb,
    providers,
    run,
    seeded,
)  # fmt: skip
from .libraries import LIBRARIES, PEERS, library, peer


def architecture(size: Size) -> tuple[int, int, tuple[int, int]]:
    """Features, couplings, and the widths of their conditioners."""
    n, depth, hidden = ints(size, "D", "depth", "hidden")
    return n, depth, (hidden, hidden)


def flow_of(size: Size, memory: str = "auto") -> lf.Flow:
    return seeded(lambda: perturb(lf.coupling_flow(*architecture(size), memory=memory)))


def cost_of(size: Size) -> Cost:
    """Samples in and out once, weights in once, one multiply-add per weight and sample; thrice with gradients."""
    n, batch, depth, hidden = ints(size, "D", "batch", "depth", "hidden")
    weights = depth * (n // 2 * hidden + hidden * hidden + hidden * n)
    read, written = 4 * (batch * n + weights), 4 * batch * n
    if size["direction"] in (FORWARD, INVERSE):
        return Cost(read + written, 2 * batch * weights)
    return Cost(3 * read + 2 * written, 6 * batch * weights)


def timed(size: Size, model: nn.Module) -> Callable[[Function], Call]:
    """A map from a function of the model to the call that is timed, in the size's direction."""
    return run(str(size["direction"]), [weight for weight in model.parameters() if weight.requires_grad])


def call_of(size: Size, model: nn.Module, method: Function) -> Call:
    return timed(size, model)(functools.partial(method, model))


def in_float64(size: Size, model: nn.Module, method: Function) -> Call:
    """The call of a float64 copy of the model; tensors that the library creates are in float64 too."""
    call = call_of(size, copy.deepcopy(model).double(), method)

    def exact(*arguments: Tensor) -> tuple[Tensor, ...]:
        torch.set_default_dtype(torch.float64)
        try:
            return call(*arguments)
        finally:
            torch.set_default_dtype(torch.float32)

    return exact


def problem(
    size: Size,
    options: Options,
    model: nn.Module,
    method: Function,
    compared: Sequence[Provider],
    allowed: float | None = None,
    cost: Cost | None = None,
) -> Problem:
    """``method(model, x)`` for standard normal x [batch, D]; ``allowed`` defaults to the allowance for rounding."""
    source, count = Source(options, size), 2 if size["direction"] == BACKWARD else 1
    return Problem(
        inputs=inputs(lambda: tuple(source.normal(count, *ints(size, "batch", "D"))), options),
        truth=in_float64(size, model, method),
        reference=allowed or call_of(size, model, method),
        providers=compared,
        cost=cost or cost_of(size),
    )


# coupling_flow: density, inverse, and the training step by likelihood.


def _coupling_flow(size: Size, options: Options, control: bool = False) -> Problem:
    """(z, log_det), (x,), or (loss, *gradients of the weights).

    Most peers always compute a log-determinant with their inverse. With ``control`` our flow runs as its users run
    it, with the backend "auto", and a copy of it is another provider: its time divided by the flow's is the noise.
    """
    flow, inverse = flow_of(size).to(options.device), size["direction"] == INVERSE
    method = lf.Flow.inverse if inverse else lf.Flow.forward_and_log_det
    rivals = []
    for name in PEERS:
        if (made := peer(name, *architecture(size), inverse)) is not None:
            narrow, pick = made[0].to(options.device), made[1]
            rivals.append(Provider(name, call_of(size, narrow, pick), truth=in_float64(size, narrow, pick)))
    ours = providers(functools.partial(method, flow), options, timed(size, flow))
    if control:
        compiled = [provider for provider in ours[1:] if provider.name != "linfast"]
        ours = [Provider("linfast", call_of(size, flow, method), baseline=True), *compiled]
        again = Provider(CONTROL, call_of(size, copy.deepcopy(flow), method))
        rivals.insert(len(rivals) // 2, again)  # far from ours in turn, for the cache
    return problem(size, options, flow, method, [*ours, *rivals])


_BASE: Size = {"direction": FORWARD, "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_TINY: Size = {"D": 6, "depth": 2, "hidden": 8, "batch": 4}
_DIRECTIONS = (FORWARD, INVERSE, TRAIN)
_FLOW = Case(
    "coupling_flow",
    _coupling_flow,
    sizes={
        "tiny": [{"direction": TRAIN, **_TINY}],
        "quick": [
            *grid(_BASE, batch=(64, 256, 1024)),
            *grid({**_BASE, "direction": TRAIN, "batch": 128}, depth=(2, 4, 8)),
        ],
        "gpu": [
            *grid(_BASE, batch=(1024, 2**18)),
            *grid({**_BASE, "batch": 2**16}, direction=(INVERSE, TRAIN)),
            {**_BASE, "D": 256, "hidden": 512, "batch": 2**17},
        ],
        "full": [
            *grid(_BASE, direction=_DIRECTIONS, batch=(2**6, 2**10, 2**14, 2**18, 2**22)),
            *grid(_BASE, direction=_DIRECTIONS, depth=(2, 32)),
            *grid({**_BASE, "D": 256, "hidden": 512, "batch": 2**16}, direction=_DIRECTIONS),
        ],
    },
)
_AT = grid(_BASE, direction=_DIRECTIONS, batch=(1, 16, 64, 256, 1024))
_PEERS = Case(
    "peers",  # to decide whether coupling_flow is slower than the fastest library
    functools.partial(_coupling_flow, control=True),
    sizes={"tiny": _FLOW.sizes["tiny"], "quick": _AT[2:4], "gpu": _AT[2:4], "full": _AT},
    every_size=True,
)


# A library's flow after lf.accelerate, against the original and a second copy of the original.

# Relative errors allowed against float64: more for gradients, since a ReLU near zero may take the other branch,
# and for AllInOneBlock, whose log-determinants nearly cancel.
_WITHIN, _LOOSELY = 1e-4, 1e-3


def _libraries(size: Size, options: Options) -> Problem:
    """(z, log_det) or (z,), the same for the inverse, or (loss, *gradients of the weights)."""
    name, direction = str(size["library"]), size["direction"]
    model, method = library(name, *architecture(size), inverse=direction == INVERSE)
    model = model.to(options.device)
    models = {"original": model, "accelerated": copy.deepcopy(model), CONTROL: copy.deepcopy(model)}
    lf.accelerate(models["accelerated"])
    calls = {who: call_of(size, each, method) for who, each in models.items()}
    if options.compile:
        torch.compiler.reset()
        calls["compiled original"] = timed(size, model)(
            torch.compile(functools.partial(method, model), dynamic=False)
        )
    compared = [Provider(who, call, baseline=who == "original") for who, call in calls.items()]
    allowed = _LOOSELY if direction == TRAIN or "AllInOneBlock" in name else _WITHIN
    return problem(size, options, model, method, compared, allowed)


_ON_GPU = (  # one of each kind: all of them would take two minutes of a call's four
    *("normflows AffineCouplingBlock exp", "nflows PiecewiseRationalQuadraticCouplingTransform", "zuko RealNVP"),
    *("FrEIA AllInOneBlock", "nflows AffineCouplingTransform", "glasflow RealNVP"),
)
_LIBRARY: Size = {"library": "normflows AffineCouplingBlock exp", **_BASE}
_LIBRARIES = Case(
    "libraries",
    _libraries,
    sizes={
        "tiny": [{**_LIBRARY, **_TINY, "direction": TRAIN}],
        "quick": grid({**_LIBRARY, "batch": 256}, direction=_DIRECTIONS),
        "gpu": grid({**_LIBRARY, "batch": 2**16}, library=_ON_GPU, direction=_DIRECTIONS),
        "full": grid(_LIBRARY, library=LIBRARIES, batch=(1, 64, 1024), direction=_DIRECTIONS),
    },
    every_size=True,
)


# Memory of a flow's backward: a training step with memory="invert" against memory="store", at each depth.


def _reversible(size: Size, options: Options) -> Problem:
    """Forward with log_det and backward of ``coupling_flow``, as (z, log_det, dx, *dweights)."""
    whole: Size = {**size, "D": 64, "hidden": 128, "direction": TRAIN}
    source, stored = Source(options, whole), flow_of(whole, "store").to(options.device)
    inverted, exact = (copy.deepcopy(stored) for _ in range(2))
    inverted.memory = "invert"
    return Problem(
        inputs=[tuple(source.normal(2, int(size["batch"]), 64)) for _ in range(3)],
        truth=_step(exact.double()),
        reference=_step(stored),
        providers=[Provider("store", _step(stored), baseline=True), Provider("invert", _step(inverted))],
        cost=cost_of(whole),
    )


def _step(g: lf.Flow) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    weights = list(g.parameters())

    def step(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
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


CASES = [_FLOW, _PEERS, _LIBRARIES, _REVERSIBLE]
