"""The one timer of the benchmarks, and the peak memory of a call.

Calls run in turn, A B A B ..., and are timed by the clock and by the CPU time of the process. Other work on the
machine then slows all providers alike, and changes the process's own CPU time least.

On a CPU a round is one call of each provider. On a GPU a round is one replay per provider of a CUDA graph with one
call for every input: there are no gaps between launches, and between two calls on one input all other inputs pass
through the cache. A provider that cannot be captured is launched from the host, and its result says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median
from typing import cast

import torch
from torch import Tensor

WARMUP_ROUNDS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 2000
LAUNCHED_CALLS = 11  # for the median of calls that are launched from Python

Outputs = Tensor | Sequence[Tensor]  # of a provider's function
Call = Callable[..., object]
Round = Callable[[int], tuple[float, object]]


@dataclass
class Timing:
    """Milliseconds per call of each round, and the outputs of the last call, which had the input ``last_input``.

    Args:
        ms: by the clock.
        cpu_ms: by the CPU time of the process, all its threads together.
        captured: whether a CUDA graph was timed.
        launched_ms: on a GPU, the median of a few calls that are launched one by one from Python.
    """

    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    last_outputs: object = ()
    last_input: int = 0
    captured: bool = False
    launched_ms: float | None = None


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One tensor or several as a tuple, detached."""
    return tuple(o.detach() for o in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of ``times / base``, so that drift of the machine cancels."""
    return median(t / max(b, 1e-9) for t, b in zip(times, base, strict=True))


def time_interleaved(
    calls: Mapping[str, Call],
    inputs: Sequence[tuple[Tensor, ...]] = ((),),
    device: torch.device | None = None,
    budget: float = 0.0,
    rounds: int | None = None,
    warmup: int = WARMUP_ROUNDS,
) -> dict[str, Timing]:
    """Time every call once per round, for ``rounds`` rounds, or for ``budget`` seconds and 5 to 2000 rounds.

    The inputs rotate from call to call, not from round to round, so that a provider does not find in the cache the
    input that the previous provider has just read. ``warmup`` untimed rounds come first.

    Args:
        device: where the calls run; the CPU by default.
    """
    timings = {name: Timing() for name in calls}
    make = _host_round if device is None or device.type == "cpu" else _cuda_round
    runs = {name: make(call, inputs, timings[name]) for name, call in calls.items()}
    turn, deadline = 0, 0.0
    for round_ in range(-warmup, MAX_ROUNDS if rounds is None else rounds):
        if round_ == 0:
            deadline = time.perf_counter() + budget
        if rounds is None and round_ >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name, run in runs.items():
            index, timing = turn % len(inputs), timings[name]
            cpu = time.process_time()
            ms, outputs = run(index)
            cpu_ms = 1e3 * (time.process_time() - cpu)
            turn += 1
            if round_ >= 0:
                timing.ms.append(ms)
                timing.cpu_ms.append(cpu_ms)
                timing.last_input, timing.last_outputs = index, outputs
    return timings


def _host_round(call: Call, inputs: Sequence[tuple[Tensor, ...]], timing: Timing) -> Round:
    def run(index: int) -> tuple[float, object]:
        start = time.perf_counter()
        outputs = call(*inputs[index])
        return 1e3 * (time.perf_counter() - start), outputs

    return run


def _cuda_round(call: Call, inputs: Sequence[tuple[Tensor, ...]], timing: Timing) -> Round:
    """Replays of the captured calls, or, where the capture fails, calls from the host."""
    from linfast.cuda_graph import CudaGraph

    def outputs() -> list[tuple[Tensor, ...]]:
        return [as_tuple(cast(Outputs, call(*arguments))) for arguments in inputs]

    def launched(index: int) -> tuple[float, object]:
        return _between_events(lambda: call(*inputs[index]))

    timing.launched_ms = median(launched(turn % len(inputs))[0] for turn in range(LAUNCHED_CALLS))
    try:
        graph = CudaGraph(outputs, (), inputs[0][0].device)
    except Exception:
        torch.cuda.synchronize()
        return launched
    timing.captured = True
    return lambda index: (_between_events(graph.replay)[0] / len(inputs), graph.result[index])


def _between_events(action: Callable[[], object]) -> tuple[float, object]:
    """(milliseconds from before the action's first launch to after its last, by events; the action's result)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    outputs = action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), outputs


def peak_bytes(call: Call, arguments: tuple[Tensor, ...], device: torch.device) -> int:
    """Bytes of tensors at the peak of one call, above what was allocated when it began.

    Outputs and temporaries count; weights and inputs, which were there before, do not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(*arguments)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The largest running sum of what torch's allocator reports to its profiler.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        outputs = call(*arguments)
    del outputs
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
