"""Cases, providers, and one measurement: check against float64, then time interleaved.

A ``Case`` is a name, lists of sizes and a ``build`` that turns one size into a
``Problem``: inputs, the float64 truth, the eager reference, the ``Provider``s to compare
and the least that any of them must do. ``measure`` checks every provider and refuses the
wrong ones, times the rest in turn (A B A B ...), measures their peak memory, and gives one
``Result`` each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .check import Outputs, Standard, Verdict, as_tuple, judge, own_standard, set_standard
from .timing import Timing, peak_bytes, ratio, time_interleaved

__all__ = [
    *("CONTROL", "SCALES", "Case", "Cost", "Options", "Problem", "Provider", "Result", "Size", "UsageError"),
    *("check", "judged", "measure"),
]

Size = Mapping[str, int | str]
SCALES = ("tiny", "quick", "gpu", "full")
CONTROL = "linfast again"  # a copy of ours among the providers: its time over ours is the noise
PEER_FACTOR = 16  # another scale map and other initial weights round differently; tf32 or bf16 stay outside


class UsageError(Exception):
    """What was asked for cannot be done; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a problem's outputs: ``call(*inputs)`` gives a tensor or a sequence of them.

    ``truth``: another library's model has other weights, so other outputs; then these are its
    own in float64, and it is allowed ``PEER_FACTOR`` times the reference's largest allowance.
    """

    name: str
    call: Callable[..., Outputs]
    baseline: bool = False
    truth: Callable[..., Outputs] | None = None


@dataclass(frozen=True)
class Cost:
    """The least that a correct program does in one call.

    Args:
        bytes: every input and weight read once from memory, every output written once.
        operations: a multiply-add is two.
    """

    bytes: int
    operations: int


@dataclass(frozen=True)
class Problem:
    """One size of a case.

    Args:
        inputs: argument tuples, all alike in shape and dtype; calls rotate through them.
            A count that shares no factor with the number of providers gives each
            provider every one.
        truth: the outputs in float64; it gets the inputs with floating tensors in float64.
        reference: the eager computation in the inputs' dtype, in plain torch. What rounding may
            cost it sets what every provider is allowed.
        providers: what to compare; exactly one is the baseline.
        cost: what the shares of the machine's ceilings are counted from.

    Raises:
        ValueError: no inputs, two providers of one name, or not exactly one baseline.
    """

    inputs: Sequence[tuple[Tensor, ...]]
    truth: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    providers: Sequence[Provider]
    cost: Cost

    def __post_init__(self) -> None:
        names = [provider.name for provider in self.providers]
        if not self.inputs:
            raise ValueError("a problem needs at least one tuple of inputs")
        if len(set(names)) < len(names):
            raise ValueError(f"providers of one problem need different names; got {names}")
        if sum(provider.baseline for provider in self.providers) != 1:
            raise ValueError(f"exactly one provider must be the baseline; got {names}")

    @property
    def device(self) -> torch.device:
        """Where the problem runs."""
        return self.inputs[0][0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is measured."""
        return self.inputs[0][0].dtype


@dataclass(frozen=True)
class Options:
    """What a front end asks of every case: the device, and whether to add torch.compile'd providers.

    ``kernels``: linfast is among the providers on every device, by its kernels or not at all: on a CPU in Triton's
    interpreter, to be checked and never to be timed.
    """

    device: torch.device
    compile: bool = False
    kernels: bool = False


@dataclass(frozen=True)
class Case:
    """A benchmark: ``build(size, options)``, and its sizes at each scale.

    Args:
        sizes: "tiny" (a check that it runs, seconds), "quick" (two CPU cores, under half a
            minute), "gpu" (what bench/gpu.sh times) and "full" (sweeps, smallest first).
    """

    name: str
    build: Callable[[Size, Options], Problem]
    sizes: Mapping[str, Sequence[Size]]


@dataclass(frozen=True)
class Result:
    """What one provider did at one size.

    Args:
        against: the name of the baseline.
        error, allowed: relative L2 errors against float64; see ``check``.
        refused: why the provider was not timed, where it was not.
        first_s: seconds of the first call, compilation included.
        p20_ms, p50_ms, p80_ms: quantiles of one call in milliseconds over ``rounds`` rounds.
        cpu_ms: the median CPU time of one call.
        ratio, cpu_ratio: medians over the rounds of this provider's time divided by the baseline's in the same
            round, below 1 where it is faster; None where the baseline was refused.
        captured, launched_ms: see ``timing.Timing``.
        peak_bytes: see ``memory.peak_bytes``.
        bytes, operations: the problem's ``Cost``.
        input_bytes: of all the inputs that calls rotate through.
    """

    case: str
    size: Size
    provider: str
    baseline: bool
    against: str
    dtype: str
    error: float | None
    allowed: float | None
    refused: str | None = None
    first_s: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    cpu_ms: float | None = None
    ratio: float | None = None
    cpu_ratio: float | None = None
    rounds: int = 0
    captured: bool = False
    launched_ms: float | None = None
    peak_bytes: int | None = None
    bytes: int = 0
    operations: int = 0
    input_bytes: int = 0


def judged(problem: Problem) -> dict[str, Verdict]:
    """The verdict on every provider."""
    standards = _standards(problem)
    return {p.name: judge(p.call, problem.inputs, standards[p.name]) for p in problem.providers}


def check(case: Case, size: Size, options: Options) -> list[Result]:
    """One Result per provider at one size with its verdict; nothing is timed but the first call."""
    problem = case.build(size, options)
    verdicts = judged(problem)
    return [_untimed(case, size, problem, p, verdicts[p.name]) for p in problem.providers]


def measure(case: Case, size: Size, options: Options, budget: float = 1.0) -> list[Result]:
    """One Result per provider at one size, in the problem's order.

    Args:
        budget: seconds of timing for each provider that passes its check.
    """
    problem = case.build(size, options)
    standards = _standards(problem)
    verdicts = {p.name: judge(p.call, problem.inputs, standards[p.name]) for p in problem.providers}
    calls = {p.name: p.call for p in problem.providers if verdicts[p.name].refused is None}
    timings = time_interleaved(calls, problem.inputs, problem.device, budget * len(calls))
    for name, timing in timings.items():  # the check again, on what was timed
        after = standards[name].verdict(timing.last_input, as_tuple(timing.last_outputs))  # type: ignore[arg-type]
        if after.refused is not None:
            verdicts[name] = replace(after, refused=f"when timed, {after.refused}")
    baseline = next(p.name for p in problem.providers if p.baseline)
    base = None if verdicts[baseline].refused else timings[baseline]
    results = []
    for provider in problem.providers:
        result = _untimed(case, size, problem, provider, verdicts[provider.name])
        if result.refused is None:
            peak = peak_bytes(provider.call, problem.inputs[0], problem.device)
            result = _timed(result, timings[provider.name], base, peak)
        results.append(result)
    return results


def _standards(problem: Problem) -> dict[str, Standard]:
    """What each provider is held to."""
    shared = set_standard(problem.truth, problem.reference, problem.inputs)
    allowed = PEER_FACTOR * max(shared.allowed)
    return {
        p.name: shared if p.truth is None else own_standard(p.truth, problem.inputs, allowed)
        for p in problem.providers
    }


def _untimed(case: Case, size: Size, problem: Problem, provider: Provider, verdict: Verdict) -> Result:
    return Result(
        case=case.name,
        size=size,
        provider=provider.name,
        baseline=provider.baseline,
        against=next(p.name for p in problem.providers if p.baseline),
        dtype=str(problem.dtype).removeprefix("torch."),
        error=verdict.error,
        allowed=verdict.allowed,
        refused=verdict.refused,
        first_s=verdict.first_s,
        bytes=problem.cost.bytes,
        operations=problem.cost.operations,
        input_bytes=sum(tensor.nbytes for arguments in problem.inputs for tensor in arguments),
    )


def _timed(result: Result, timing: Timing, base: Timing | None, peak: int) -> Result:
    p20, p50, p80 = (float(q) for q in np.percentile(timing.ms, (20, 50, 80)))
    return replace(
        result,
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        cpu_ms=float(np.median(timing.cpu_ms)),
        ratio=None if base is None else ratio(timing.ms, base.ms),
        cpu_ratio=None if base is None else ratio(timing.cpu_ms, base.cpu_ms),
        rounds=len(timing.ms),
        captured=timing.captured,
        launched_ms=timing.launched_ms,
        peak_bytes=peak,
    )
