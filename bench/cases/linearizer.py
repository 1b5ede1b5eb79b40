"""A Linearizer on vectors: f(x) = g^{-1}(A g(x)) with D = 64, 8 couplings, hidden (128, 128), a dense A."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import linfast as lf

from ..harness import Case, Options, Problem, Provider, Size

__all__ = ["CASE"]

FEATURES, DEPTH, HIDDEN = 64, 8, (128, 128)
N_INPUTS = 5  # a prime: every provider gets every input, whatever their number

Map = Callable[[Tensor], Tensor]
Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def build(size: Size, options: Options) -> Problem:
    """The eager Linearizer, and torch.compile of it where asked, at ``size``'s direction and batch.

    Default weights plus 0.05 randn (default conditioners end in zeros, which is no
    work to get wrong), standard normal inputs and cotangents; the same numbers every run.
    """
    direction, batch = str(size["direction"]), int(size["batch"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model().to(options.device)
        pairs = [torch.randn(2, batch, FEATURES).to(options.device) for _ in range(N_INPUTS)]
    eager = _run(model, direction)
    providers = [Provider("eager", eager, baseline=True)]
    if options.compile:
        torch.compiler.reset()  # else the recompile limit, counted over all sizes, falls back to eager
        providers.append(Provider("compiled", _run(model, direction, compiled=True)))
    return Problem(
        inputs=[(x, v) for x, v in pairs],
        truth=_run(copy.deepcopy(model).double(), direction),
        reference=eager,
        providers=providers,
    )


def _model() -> lf.Linearizer:
    model = lf.Linearizer(lf.coupling_flow(FEATURES, DEPTH, HIDDEN), lf.Dense(FEATURES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _run(model: lf.Linearizer, direction: str, compiled: bool = False) -> Run:
    """(x, v) -> (y,), or with the backward (y, dx, *dweights) for the cotangent v of y."""
    function: Map = model.inverse if direction == "inverse" else model.forward
    if compiled:
        function = torch.compile(function, dynamic=False)
    if direction == "forward+backward":
        return lambda x, v: _forward_backward(function, list(model.parameters()), x, v)
    return lambda x, v: _no_grad(function, x)


def _no_grad(function: Map, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (function(x),)


def _forward_backward(function: Map, weights: list[torch.nn.Parameter], x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    y = function(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *weights], v))


def _grid(batches: tuple[int, ...]) -> list[Size]:
    directions = ("forward", "inverse", "forward+backward")
    return [{"direction": direction, "batch": batch} for direction in directions for batch in batches]


CASE = Case("linearizer", sizes=_grid((64, 1024, 8192)), quick=_grid((64, 1024)), build=build)
