"""What a flow's backward keeps: a training step with memory="invert" against "store", one flow of each depth."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import linfast as lf

from ..harness import Case, Options, Problem, Provider, Size
from .coupling_flow import TRAIN, flow_cost

__all__ = ["CASE"]

FEATURES, HIDDEN = 64, (128, 128)
N_INPUTS = 3  # a prime other than the number of providers: each gets every input

Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def build(size: Size, options: Options) -> Problem:
    """Forward with log_det and backward of ``coupling_flow``, as (z, log_det, dx, *dweights).

    Default weights plus 0.05 randn, standard normal inputs and cotangents; the same numbers every run.
    """
    depth, batch = int(size["depth"]), int(size["batch"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stored = lf.coupling_flow(FEATURES, depth, HIDDEN, memory="store")
        with torch.no_grad():
            for parameter in stored.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        pairs = [torch.randn(2, batch, FEATURES).to(options.device) for _ in range(N_INPUTS)]
    stored.to(options.device)
    inverted = copy.deepcopy(stored)
    inverted.memory = "invert"
    return Problem(
        inputs=[(x, v) for x, v in pairs],
        truth=_step(copy.deepcopy(stored).double()),
        reference=_step(stored),
        providers=[Provider("store", _step(stored), baseline=True), Provider("invert", _step(inverted))],
        cost=flow_cost({**size, "D": FEATURES, "hidden": HIDDEN[0], "direction": TRAIN}),
    )


def _step(g: lf.Flow) -> Run:
    weights = list(g.parameters())

    def run(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        z, log_det = g.forward_and_log_det(x)
        return z.detach(), log_det.detach(), *torch.autograd.grad((z, log_det), [x, *weights], (v, v[:, 0]))

    return run


_DEPTHS: list[Size] = [{"depth": depth, "batch": 1024} for depth in (4, 16, 64)]
CASE = Case(
    "reversible",
    build,
    sizes={
        "tiny": [{"depth": 2, "batch": 4}],
        "quick": _DEPTHS[:2],
        "gpu": [{"depth": depth, "batch": 2**16} for depth in (8, 32)],
        "full": _DEPTHS,
    },
)
