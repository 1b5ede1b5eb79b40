"""Timing in turn: A B A B ..., so that what disturbs the machine disturbs every provider."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from .check import Outputs, as_tuple

__all__ = ["Timing", "time_interleaved"]

WARMUP_ROUNDS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 2000


@dataclass
class Timing:
    """Milliseconds of each timed call, and what the last one returned for input ``last_input``."""

    ms: list[float] = field(default_factory=list)
    last_outputs: tuple[Tensor, ...] = ()
    last_input: int = 0


def time_interleaved(
    calls: Mapping[str, Callable[..., Outputs]],
    inputs: Sequence[tuple[Tensor, ...]],
    device: torch.device,
    budget: float,
) -> dict[str, Timing]:
    """Time every call once a round, for ``budget`` seconds in all and 5 to 2000 rounds.

    The inputs rotate from call to call, not from round to round: a provider does not
    find in cache what the one before it has just read. Two untimed rounds come first.
    """
    clock = _cuda_ms if device.type == "cuda" else _host_ms
    timings = {name: Timing() for name in calls}
    turns = cycle(range(len(inputs)))
    for _ in range(WARMUP_ROUNDS):
        for call in calls.values():
            clock(call, inputs[next(turns)])
    deadline = time.perf_counter() + budget
    for round_ in range(MAX_ROUNDS):
        if round_ >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            index = next(turns)
            ms, outputs = clock(call, inputs[index])
            timings[name].ms.append(ms)
            timings[name].last_input, timings[name].last_outputs = index, as_tuple(outputs)
    return timings


def _host_ms(call: Callable[..., Outputs], arguments: tuple[Tensor, ...]) -> tuple[float, Outputs]:
    start = time.perf_counter()
    outputs = call(*arguments)
    return 1e3 * (time.perf_counter() - start), outputs


def _cuda_ms(call: Callable[..., Outputs], arguments: tuple[Tensor, ...]) -> tuple[float, Outputs]:
    """From an event before the first launch to one after the last, on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    outputs = call(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), outputs
