"""Cases, providers, and one measurement: every provider is checked (``standard.py``), then timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .standard import Standard, Verdict, judge, own_standard, reference_errors
from .timing import Outputs, Timing, as_tuple, peak_bytes, ratio, time_interleaved

Size = Mapping[str, int | str]
SCALES = ("tiny", "quick", "gpu", "full")
CONTROL = "again"  # a copy of the baseline: its time divided by the baseline's is the noise
PEER_FACTOR = 16  # other scale maps and weights round differently; tf32 and bf16 still exceed it


class UsageError(Exception):
    """A request that cannot be carried out; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a problem's outputs: ``call(*inputs)`` gives a tensor or a sequence of them.

    ``truth`` is given for another library's model, which has other weights and therefore other outputs: it returns
    that model's outputs in float64. The allowance is then ``PEER_FACTOR`` times the reference's largest.
    """

    name: str
    call: Callable[..., Outputs]
    baseline: bool = False
    truth: Callable[..., Outputs] | None = None


@dataclass(frozen=True)
class Cost:
    """The least memory traffic and arithmetic of one call of a correct program.

    Args:
        bytes: every input and weight read once from memory, every output written once.
        operations: arithmetic operations; a multiply-add counts as two.
    """

    bytes: int
    operations: int


@dataclass(frozen=True)
class Problem:
    """One size of a case.

    Args:
        inputs: argument tuples, all alike in shape and dtype; calls rotate through them. Every provider gets every
            tuple where their number has no common factor with the number of providers.
        truth: computes the outputs in float64, from inputs whose floating-point tensors are in float64.
        reference: the eager computation in the inputs' dtype, in plain torch, whose rounding errors set the
            allowance of every provider; or a number, the allowance of every output.
        providers: the ways to compare; exactly one is the baseline.
        cost: the cost of one call, from which shares of the machine's ceilings are computed.

    Raises:
        ValueError: no inputs, two providers of one name, or not exactly one baseline.
    """

    inputs: Sequence[tuple[Tensor, ...]]
    truth: Callable[..., Outputs]
    reference: Callable[..., Outputs] | float
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


@dataclass(frozen=True)
class Options:
    """The options of a run for every case: the device, and whether to add providers under torch.compile.

    With ``kernels``, linfast's kernels are among the providers on every device. On a CPU Triton interprets them:
    they can be checked there, but their time means nothing.
    """

    device: torch.device
    compile: bool = False
    kernels: bool = False


@dataclass(frozen=True)
class Case:
    """A benchmark: ``build(size, options)``, and its sizes at each scale.

    Args:
        sizes: "tiny" (checks that the case runs, in seconds), "quick" (under half a minute on two CPU cores), "gpu"
            (timed by bench/gpu.sh) and "full" (smallest first).
        every_size: whether sizes are measured however long they are expected to take.
    """

    name: str
    build: Callable[[Size, Options], Problem]
    sizes: Mapping[str, Sequence[Size]]
    every_size: bool = False


@dataclass(frozen=True)
class Result:
    """The measurement of one provider at one size.

    Args:
        against: the name of the baseline.
        error, allowed: relative L2 errors against float64, as standard.py defines them.
        refused: why the provider was not timed, where it was not.
        first_s: seconds of the first call, compilation included.
        p20_ms, p50_ms, p80_ms: quantiles of one call in milliseconds over ``rounds`` rounds.
        cpu_ms: the median CPU time of one call.
        ratio, cpu_ratio: medians over the rounds of this provider's time divided by the baseline's in the same
            round, below 1 where it is faster; None where the baseline was refused.
        captured, launched_ms: see ``timing.Timing``.
        peak_bytes: see ``timing.peak_bytes``.
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


def judged(problem: Problem, standards: Mapping[str, Standard] | None = None) -> dict[str, Verdict]:
    """The verdict on every provider, by name."""
    standards = _standards(problem) if standards is None else standards
    return {p.name: judge(p.call, problem.inputs, standards[p.name]) for p in problem.providers}


def measure(case: Case, size: Size, options: Options, budget: float | None = 1.0) -> list[Result]:
    """One Result per provider at one size, in the problem's order.

    Args:
        budget: seconds of timing for each provider that passes its check; with None nothing but the first call
            is timed.
    """
    problem = case.build(size, options)
    standards = _standards(problem)
    verdicts = judged(problem, standards)
    timings = {}
    if budget is not None:
        calls = {p.name: p.call for p in problem.providers if verdicts[p.name].refused is None}
        timings = time_interleaved(calls, problem.inputs, problem.device, budget * len(calls))
    for name, timing in timings.items():  # check the outputs of the last timed call too
        after = standards[name].verdict(timing.last_input, as_tuple(timing.last_outputs))  # type: ignore[arg-type]
        if after.refused is not None:
            verdicts[name] = replace(after, refused=f"when timed, {after.refused}")
    against = next(p.name for p in problem.providers if p.baseline)
    base = None if verdicts[against].refused else timings.get(against)
    results = []
    for provider in problem.providers:
        verdict = verdicts[provider.name]
        result = Result(
            case=case.name,
            size=size,
            provider=provider.name,
            baseline=provider.baseline,
            against=against,
            dtype=str(problem.inputs[0][0].dtype).removeprefix("torch."),
            input_bytes=sum(tensor.nbytes for arguments in problem.inputs for tensor in arguments),
            **vars(verdict),
            **vars(problem.cost),
        )
        if verdict.refused is None and (timed := timings.get(provider.name)) is not None:
            peak = peak_bytes(provider.call, problem.inputs[0], problem.device)
            result = replace(result, peak_bytes=peak, **_summary(timed, base))
        results.append(result)
    return results


def _summary(timed: Timing, base: Timing | None) -> dict[str, Any]:
    """The fields of a Result that come from the times of a provider and of the baseline."""
    p20, p50, p80 = np.percentile(timed.ms, (20, 50, 80)).tolist()
    return {
        **{"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "cpu_ms": median(timed.cpu_ms)},
        "ratio": None if base is None else ratio(timed.ms, base.ms),
        "cpu_ratio": None if base is None else ratio(timed.cpu_ms, base.cpu_ms),
        **{"rounds": len(timed.ms), "captured": timed.captured, "launched_ms": timed.launched_ms},
    }


def _standards(problem: Problem) -> dict[str, Standard]:
    """The standard that each provider is judged by.

    Raises:
        ValueError: the truth is not in float64, or the reference's outputs differ from it in number or shape.
    """
    inputs, reference = problem.inputs, problem.reference
    shared = own_standard(problem.truth, inputs, reference if isinstance(reference, float) else 0.0)
    if not isinstance(reference, float):
        shared = replace(shared, allowed=reference_errors(reference, inputs, shared.truth))
    of_peers = PEER_FACTOR * max(shared.allowed)
    return {
        p.name: shared if p.truth is None else own_standard(p.truth, inputs, of_peers) for p in problem.providers
    }
