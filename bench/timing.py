"""Timing in turn: A B A B ..., so that what disturbs the machine disturbs every provider.

On a CPU a round is one call of each provider, by the wall clock. On a GPU a round is one
replay of a CUDA graph a provider, which holds one call for every input: no launch gaps, and
between two calls on one input all the others pass through the cache. A provider that cannot
be captured (it reads a value on the host, say) is timed call by call from the host, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from linfast.cuda_graph import CudaGraph

from .check import Outputs, as_tuple

__all__ = ["Timing", "in_turns", "time_interleaved"]

WARMUP_ROUNDS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 2000
LAUNCHED_CALLS = 11  # for the median of calls launched from Python

Call = Callable[..., Outputs]
_Name = TypeVar("_Name", bound=Hashable)


@dataclass
class Timing:
    """Milliseconds a call of each round, and what the last one returned for input ``last_input``.

    ``captured``: whether a CUDA graph was timed. ``launched_ms``: then, the median of a few
    calls launched one by one from Python, from an idle device to an idle device.
    """

    ms: list[float] = field(default_factory=list)
    last_outputs: tuple[Tensor, ...] = ()
    last_input: int = 0
    captured: bool = False
    launched_ms: float | None = None


def in_turns(
    calls: Mapping[_Name, Callable[[], object]], rounds: int, finish: Callable[[], None] = lambda: None
) -> dict[_Name, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each call in each round, after one round that is not counted.

    For calls of a second and more; ``finish`` waits for what a call has started.
    """
    times: dict[_Name, list[tuple[float, float]]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            finish()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            finish()
            if round_:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def time_interleaved(
    calls: Mapping[str, Call],
    inputs: Sequence[tuple[Tensor, ...]],
    device: torch.device,
    budget: float = 0.0,
    rounds: int | None = None,
) -> dict[str, Timing]:
    """Time every call once a round, for ``budget`` seconds in all and 5 to 2000 rounds, or ``rounds`` rounds.

    The inputs rotate from call to call, not from round to round: a provider does not
    find in cache what the one before it has just read. Two untimed rounds come first.
    """
    timings = {name: Timing() for name in calls}
    make = _cuda_round if device.type == "cuda" else _host_round
    runs = {name: make(call, inputs, timings[name]) for name, call in calls.items()}
    turn = 0
    for _ in range(WARMUP_ROUNDS):
        for run in runs.values():
            run(turn % len(inputs))
            turn += 1
    deadline = time.perf_counter() + budget
    for round_ in range(MAX_ROUNDS):
        if round_ >= MIN_ROUNDS and time.perf_counter() > deadline and rounds is None:
            break
        if round_ == rounds:
            break
        for name, run in runs.items():
            index = turn % len(inputs)
            ms, outputs = run(index)
            timings[name].ms.append(ms)
            timings[name].last_input, timings[name].last_outputs = index, as_tuple(outputs)
            turn += 1
    return timings


Round = Callable[[int], tuple[float, Outputs]]


def _host_round(call: Call, inputs: Sequence[tuple[Tensor, ...]], timing: Timing) -> Round:
    def run(index: int) -> tuple[float, Outputs]:
        start = time.perf_counter()
        outputs = call(*inputs[index])
        return 1e3 * (time.perf_counter() - start), outputs

    return run


def _cuda_round(call: Call, inputs: Sequence[tuple[Tensor, ...]], timing: Timing) -> Round:
    """Replays of the captured calls, or, where capture fails, calls from the host."""

    def launched(index: int) -> tuple[float, Outputs]:
        return _between_events(lambda: call(*inputs[index]))

    timing.launched_ms = median(launched(turn % len(inputs))[0] for turn in range(LAUNCHED_CALLS))
    try:
        graph = CudaGraph(lambda: [as_tuple(call(*arguments)) for arguments in inputs], (), inputs[0][0].device)
    except Exception:
        torch.cuda.synchronize()
        return launched
    timing.captured = True
    return lambda index: (_between_events(graph.replay)[0] / len(inputs), graph.result[index])


def _between_events(action: Callable[[], Outputs | None]) -> tuple[float, Outputs]:
    """From an event before the first launch to one after the last, on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    outputs = action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), () if outputs is None else outputs
