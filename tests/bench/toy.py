"""A toy benchmark: softplus written out, and the providers that are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle

import torch
from linfast.bench.harness import Case, Cost, Options, Problem, Provider, Result, Size, measure
from torch import Tensor

CPU = torch.device("cpu")
COST = Cost(bytes=1000, operations=4000)
Call = Callable[[Tensor], Tensor]


class Clock:
    """Stands in for the module ``time``: time passes only when the tests say so."""

    def __init__(self) -> None:
        self.now = 1024.0

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter

    def taking(self, call: Call, seconds: Iterable[float]) -> Call:
        """The call, which takes these numbers of seconds in turn, repeatedly."""
        each = cycle(seconds)

        def timed(x: Tensor) -> Tensor:
            self.now += next(each)
            return call(x)

        return timed


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def run(budget: float = 0.01, **calls: Call) -> dict[str, Result]:
    """Measure softplus and these providers; results by provider."""

    def build(size: Size, options: Options) -> Problem:
        providers = [Provider("eager", softplus, baseline=True), *(Provider(n, c) for n, c in calls.items())]
        xs = [(torch.randn(int(size["batch"]), 8),) for _ in range(3)]
        return Problem(xs, truth=softplus, reference=softplus, providers=providers, cost=COST)

    results = measure(Case("softplus", build, {}), {"batch": 32}, Options(CPU, False), budget)
    return {result.provider: result for result in results}
