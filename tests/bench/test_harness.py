"""The benchmark harness refuses wrong providers, interleaves calls, and measures time and memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from linfast.bench import harness, timing
from linfast.bench.cases import CASES
from linfast.bench.harness import Case, Options, Problem, Provider, Size, measure
from linfast.bench.report import table
from linfast.bench.standard import Standard
from linfast.bench.timing import peak_bytes
from torch import Tensor

import linfast as lf
from linfast.dispatch import plain_torch
from tests.kernel_stand_in import FAULTS, Kernels

from .toy import COST, CPU, Call, Clock, run, softplus

# The check.


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: softplus(x) * (1 + 1e-5), "error 1e-05, allowed"),
        (lambda x: softplus(x) * math.nan, "error nan"),
        (lambda x: softplus(x.bfloat16()).float(), "error 0.00"),
        (lambda x: softplus(x)[:-1], "shapes [(31, 8)], where [(32, 8)] is right"),
        (lambda x: (softplus(x), x), "shapes"),
        (lambda x: x @ x, "it raised RuntimeError: mat1 and mat2"),
        (lambda x: softplus(x.add_(1e-9)) + 0 * x.zero_(), "it writes to its inputs"),
    ],
    ids=["scaled", "nan", "bfloat16", "short", "two outputs", "raises", "writes"],
)
def test_a_wrong_provider_is_refused_and_not_timed(wrong: Call, reason: str) -> None:
    calls = []
    result = run(wrong=lambda x: (calls.append(1), wrong(x))[1])["wrong"]
    assert result.refused is not None
    assert reason in result.refused
    assert result.p50_ms is None
    assert result.peak_bytes is None
    assert len(calls) <= 3, "called again after the check"
    assert "refused: " in table([result], {})


def test_a_right_provider_passes_and_the_reference_sets_its_allowance() -> None:
    results = run(other=lambda x: torch.nn.functional.softplus(x))
    eager, other = results["eager"], results["other"]
    eps = torch.finfo(torch.float32).eps
    assert eager.refused is None
    assert other.refused is None
    assert 0 < other.error < other.allowed < 10 * eps
    assert eager.allowed == other.allowed


@pytest.mark.parametrize("name", CASES)
def test_wrong_kernels_are_refused_where_auto_means_kernels(kernels: Kernels, name: str) -> None:
    """As on a GPU, for every provider that launches a kernel, in every case; no kernel is compared with itself."""
    problem = CASES[name].build(CASES[name].sizes["tiny"][0], Options(CPU, False))
    launching = set()
    for provider in problem.providers:
        before = kernels.launches
        provider.call(*problem.inputs[0])
        if kernels.launches > before:
            launching.add(provider.name)
    assert bool(launching) == (name != "collapse")  # torch computes its products
    assert {n for n, verdict in harness.judged(problem).items() if verdict.refused is not None} == set()
    for fault in FAULTS.values():
        kernels.fault = fault
        refused = {n for n, verdict in harness.judged(problem).items() if verdict.refused is not None}
        assert refused == launching


def _asks_for_kernels(x: Tensor) -> Tensor:
    with lf.backend("triton"):
        return lf.ops.channel_mix(x, torch.eye(4, dtype=x.dtype))


@pytest.mark.parametrize("where", ["truth", "reference", "a peer's truth"])
def test_the_reference_side_runs_no_kernel(where: str) -> None:
    """Whatever backend it chooses itself."""

    def build(size: Size, options: Options) -> Problem:
        right = partial(lf.ops.channel_mix, weight=torch.eye(4))
        exact = partial(lf.ops.channel_mix, weight=torch.eye(4).double())
        given = {"truth": exact, "reference": right, "a peer's truth": exact} | {where: _asks_for_kernels}
        providers = [
            Provider("op", right, baseline=True),
            Provider("peer", right, truth=given["a peer's truth"]),
        ]
        return Problem([(torch.randn(2, 4, 8),)], given["truth"], given["reference"], providers, COST)

    with pytest.raises(RuntimeError, match="backend 'triton' was chosen inside plain_torch"):
        measure(Case("op", build, {}), {}, Options(CPU, False), 0.01)


def test_a_kernel_that_bypasses_the_backend_is_found(kernels: Kernels) -> None:
    x, weight = torch.randn(2, 4, 8), torch.eye(4, requires_grad=True)
    y = lf.ops.channel_mix(x, weight)
    with plain_torch(), pytest.raises(RuntimeError, match="channel_mix_backward was launched inside plain_torch"):
        y.sum().backward()
    y.sum().backward()


def test_an_allowance_that_zeros_would_fit_refuses() -> None:
    standard = Standard([(torch.ones(3).double(),)], [2.0])
    assert standard.verdict(0, (torch.zeros(3),)).refused == "error 1, allowed 2: zeros would pass"


def test_one_wrong_output_of_two_is_refused() -> None:
    def build(size: Size, options: Options) -> Problem:
        providers = [
            Provider("eager", lambda x: (x.exp(), x.sin()), baseline=True),
            Provider("wrong", lambda x: (x.exp(), x.cos())),
        ]
        return Problem([(torch.randn(9),)], providers[0].call, providers[0].call, providers, COST)

    eager, wrong = measure(Case("two", build, {}), {}, Options(CPU, False), 0.01)
    assert eager.refused is None
    assert wrong.refused is not None


def test_a_provider_that_turns_wrong_while_timed_is_refused() -> None:
    outputs: list[Tensor] = []

    def stale(x: Tensor) -> Tensor:
        outputs.append(softplus(x))
        return outputs[-1] if len(outputs) <= 3 else outputs[-2]

    result = run(stale=stale)["stale"]
    assert result.refused is not None
    assert result.refused.startswith("when timed, error")
    assert result.p50_ms is None


def test_a_wrong_baseline_leaves_no_ratio() -> None:
    def build(size: Size, options: Options) -> Problem:
        providers = [Provider("base", torch.exp, baseline=True), Provider("right", softplus)]
        return Problem([(torch.randn(9),)], softplus, softplus, providers, COST)

    base, right = measure(Case("base", build, {}), {}, Options(CPU, False), 0.01)
    assert base.refused is not None
    assert right.p50_ms is not None
    assert right.ratio is None


def test_a_truth_that_is_not_float64_is_an_error() -> None:
    def build(size: Size, options: Options) -> Problem:
        provider = Provider("eager", softplus, baseline=True)
        return Problem([(torch.ones(3),)], lambda x: softplus(x.float()), softplus, [provider], COST)

    with pytest.raises(ValueError, match="truth must be in float64"):
        measure(Case("single", build, {}), {}, Options(CPU, False))


@pytest.mark.parametrize(
    ("inputs", "names", "message"),
    [
        ([], ["a"], "at least one tuple"),
        ([(torch.ones(1),)], ["a", "a"], "different names"),
        ([(torch.ones(1),)], ["b"], "exactly one provider"),
    ],
)
def test_a_malformed_problem_is_an_error(inputs: list, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(inputs, softplus, softplus, [Provider(n, softplus, baseline=n == "a") for n in names], COST)


def test_a_peer_is_held_to_its_own_float64() -> None:
    """Another library computes another function, and a wrong precision of it is found too."""

    def build(size: Size, options: Options) -> Problem:
        providers = [
            Provider("eager", softplus, baseline=True),
            Provider("peer", lambda x: (x.exp(), x.cos()), truth=lambda x: (x.exp(), x.cos())),
            Provider("rounded peer", lambda x: x.bfloat16().exp().float(), truth=torch.exp),
        ]
        return Problem([(torch.randn(99),)], softplus, softplus, providers, COST)

    eager, peer, rounded = measure(Case("peers", build, {}), {}, Options(CPU, False), 0.01)
    assert eager.refused is None
    assert peer.refused is None
    assert peer.allowed == harness.PEER_FACTOR * eager.allowed
    assert rounded.refused is not None
    assert rounded.p50_ms is None


def test_a_check_times_nothing_but_the_first_call(clock: Clock) -> None:
    def build(size: Size, options: Options) -> Problem:
        providers = [
            Provider("eager", clock.taking(softplus, (3.0, 1.0)), baseline=True),
            Provider("wrong", torch.exp),
        ]
        return Problem([(torch.randn(9),)], softplus, softplus, providers, COST)

    eager, wrong = measure(Case("checked", build, {}), {}, Options(CPU, False), None)
    assert eager.first_s == 3.0
    assert eager.p50_ms is None
    assert eager.refused is None
    assert wrong.refused is not None


# The clock.


def test_providers_take_turns_and_inputs_rotate() -> None:
    log: list[tuple[str, int]] = []
    inputs = [(torch.tensor(float(i)),) for i in range(3)]
    calls = {name: lambda x, name=name: log.append((name, int(x))) or x for name in "AB"}
    timings = timing.time_interleaved(calls, inputs, CPU, budget=0.0)
    rounds = timing.WARMUP_ROUNDS + timing.MIN_ROUNDS
    assert "".join(name for name, _ in log) == "AB" * rounds
    assert [i for _, i in log] == [turn % 3 for turn in range(2 * rounds)]
    assert {i for name, i in log if name == "A"} == {0, 1, 2}
    assert [len(t.ms) for t in timings.values()] == [timing.MIN_ROUNDS] * 2


def test_a_larger_budget_gives_more_rounds(clock: Clock) -> None:
    def rounds(budget: float) -> int:
        call = clock.taking(softplus, [2**-10])
        return len(timing.time_interleaved({"A": call}, [(torch.ones(1),)], CPU, budget)["A"].ms)

    assert rounds(2**-20) == timing.MIN_ROUNDS
    assert rounds(2**-3) == 2**7 + 1
    assert rounds(2**10) == timing.MAX_ROUNDS


def test_rounds_can_be_given() -> None:
    timings = timing.time_interleaved({"A": torch.exp}, [(torch.ones(1),)], CPU, rounds=3)
    assert len(timings["A"].ms) == 3


def test_medians_and_ratios_are_of_the_times(clock: Clock) -> None:
    def build(size: Size, options: Options) -> Problem:
        providers = [
            Provider("eager", clock.taking(softplus, [0.002]), baseline=True),
            Provider("slow", clock.taking(softplus, (0.004, 0.005, 0.006, 0.007, 0.008))),
        ]
        return Problem([(torch.randn(9),)], softplus, softplus, providers, COST)

    eager, slow = measure(Case("timed", build, {}), {}, Options(CPU, False), 1e-9)
    assert (eager.rounds, slow.rounds) == (timing.MIN_ROUNDS,) * 2 == (5, 5)
    assert (eager.p50_ms, eager.ratio) == (pytest.approx(2.0), 1.0)
    assert (slow.p50_ms, slow.ratio) == (pytest.approx(6.0), pytest.approx(3.0))
    assert 4.0 <= slow.p20_ms < slow.p50_ms < slow.p80_ms <= 8.0


# Memory.


def test_the_peak_of_a_call_counts_its_temporary_and_not_its_inputs() -> None:
    mib = 2**20
    x = torch.ones(mib // 4)
    one = peak_bytes(lambda x: x.repeat(8).sum(), (x,), CPU)
    two_in_turn = peak_bytes(lambda x: x.repeat(8).sum() + x.repeat(8).sum(), (x,), CPU)
    two_at_once = peak_bytes(lambda x: (x.repeat(8) + x.repeat(8)).sum(), (x,), CPU)
    assert 8 * mib <= one < 9 * mib
    assert 8 * mib <= two_in_turn < 9 * mib
    assert 24 * mib <= two_at_once < 25 * mib
