"""Training by inversion: memory that does not grow with depth, gradients as good as stored, the same losses."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import linfast as lf
from linfast.flows import drift
from linfast.sampling.workers import process_group
from tests.laws.test_reversible import Dropped, all_of, gradients
from tests.laws.zoo import perturb, relative
from tests.processes import results_of_two

STEPS = 50


def _allocated(call: Callable[[], object]) -> tuple[int, int]:
    """(bytes of tensors at the end of a call whose result is alive, the maximum during the call)."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    del result
    events = sorted(
        (e for e in profile.kineto_results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns()
    )
    running = list(accumulate(event.nbytes() for event in events))
    return running[-1], max(running)


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_memory_does_not_grow_with_depth(kind: str) -> None:
    kept, peaks, weights = {}, {}, {}
    for depth in (4, 16, 64):
        if kind == "vectors":
            g, x = lf.coupling_flow(32, depth, (32,), memory="invert"), torch.randn(1024, 32)
        else:
            g, x = lf.image_flow(2, 16, depth, 8, memory="invert"), torch.randn(64, 2, 16, 16)
        x.requires_grad_()
        kept[depth], _ = _allocated(lambda g=g, x=x: g.forward_and_log_det(x))
        _, peaks[depth] = _allocated(lambda g=g, x=x: g(x).square().sum().backward())
        weights[depth] = sum(p.nbytes for p in g.parameters())
    assert kept[64] < 1.05 * kept[4]
    assert kept[16] < 1.05 * kept[4]
    for depth in (16, 64):
        assert peaks[depth] - weights[depth] < 1.1 * (peaks[4] - weights[4])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: lf.coupling_flow(64, 64, (32,)), (64, 64)),
        (lambda: lf.image_flow(2, 8, 64, 8), (8, 2, 8, 8)),
    ],
)
@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_gradients_of_deep_default_flows(make: Callable[[], lf.Flow], shape: tuple[int, ...], method: str) -> None:
    g, x = perturb(make()), torch.randn(shape)
    truth = all_of(gradients(copy.deepcopy(g).double(), x.double(), method))
    stored = relative(all_of(gradients(g, x, method)), truth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing strays
        inverted = relative(all_of(gradients(g, x, method, "invert")), truth)
    assert inverted < 20 * stored
    assert inverted < 1e-4


def _badly_scaled(scale_map: str, depth: int, factor: float) -> lf.Flow:
    g = lf.coupling_flow(16, depth, (32,), scale_map=scale_map)
    with torch.no_grad():
        for layer in g.bijections:
            last = layer.conditioner.layers[-1]
            last.reset_parameters()
            for parameter in last.parameters():
                parameter.mul_(factor)
    return g


@pytest.mark.parametrize(
    ("scale_map", "depth", "factor"),
    [("clamp", 4, 3), ("clamp", 8, 6), ("smooth", 64, 6)],
)
def test_the_guard_redoes_badly_scaled_stacks(scale_map: str, depth: int, factor: float) -> None:
    g, x = _badly_scaled(scale_map, depth, factor), torch.randn(64, 16)
    truth = all_of(gradients(copy.deepcopy(g).double(), x.double()))
    stored = relative(all_of(gradients(g, x)), truth)
    with pytest.warns(RuntimeWarning, match=r"strayed at bijections\[\d+\] \(AffineCoupling\)"):
        inverted = relative(all_of(gradients(g, x, mode="invert")), truth)
    assert inverted <= 2 * stored
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a module
        assert relative(all_of(gradients(g, x, mode="invert")), truth) <= 2 * stored


def test_the_guard_names_the_layer_and_replays_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [lf.AffineCoupling(Dropped(3, 6), 6, ("first", "second")[i % 2]) for i in range(7)]
    g = perturb(lf.Flow(layers)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    step = type(layers[0])._uncouple

    def wrong_in_layer_2(self, *args):
        undone, *rest = step(self, *args)
        return (undone + 1e-3 if self is layers[2] else undone), *rest

    monkeypatch.setattr(lf.AffineCoupling, "_uncouple", wrong_in_layer_2)
    found = []
    for mode in ("store", "invert"):
        torch.manual_seed(3)
        with (
            pytest.warns(RuntimeWarning, match=r"bijections\[2\]") if mode == "invert" else contextlib.nullcontext()
        ):
            found.append(all_of(gradients(g, x, mode=mode)))
    assert relative(*found) < 1e-14


def test_under_capture_the_guard_reports_at_the_next_eager_call(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, x, names = drift.DriftGuard(), torch.randn(8, 4), ["a", "b", "c"]
    capturing = [False]
    monkeypatch.setattr(drift, "capturing", lambda x: capturing[0])
    kept = torch.stack([drift.Checksum(x).with_norm(x)] * 3)
    strayed = kept[:, :-1] * torch.tensor([[1.0], [1.01], [1.0]])
    guard.report(x, names)
    capturing[0] = True
    assert not guard.strayed(strayed, kept, 1e-5, names)
    assert not guard.strayed(kept[:, :-1], kept, 1e-5, names)  # a later replay that is right does not hide it
    capturing[0] = False
    with pytest.warns(RuntimeWarning, match="captured CUDA graph.*strayed at b"):
        guard.report(x, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.report(x, names)
        copy.deepcopy(guard).report(x, names)


def _losses(mode: str) -> list[float]:
    """Losses of STEPS steps of two micro-batches: dropout, bf16 autocast, fused AdamW, accumulated gradients."""
    torch.manual_seed(0)
    layers = [lf.AffineCoupling(Dropped(4, 8), 8, ("first", "second")[i % 2]) for i in range(4)]
    model = DistributedDataParallel(_NegativeLogLikelihood(lf.Flow([lf.ActNorm(8), *layers], memory=mode)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    data = torch.Generator().manual_seed(torch.distributed.get_rank())
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for last in (False, True):
            x = torch.randn(32, 8, generator=data) * torch.linspace(0.5, 2, 8)
            waits = contextlib.nullcontext if last else model.no_sync
            with waits():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(x)
                loss.backward()
            losses.append(float(loss))
        optimizer.step()
    return losses


class _NegativeLogLikelihood(nn.Module):
    def __init__(self, g: lf.Flow) -> None:
        super().__init__()
        self.g = g

    def forward(self, x: Tensor) -> Tensor:
        z, log_det = self.g.forward_and_log_det(x)
        return (0.5 * z.square().sum(1) - log_det).mean()


def _train_as_one_of_two() -> dict[str, list[float]]:
    with process_group(torch.device("cpu")):
        return {mode: _losses(mode) for mode in ("store", "invert")}


def test_losses_of_two_processes_are_those_of_stored_training() -> None:
    found = results_of_two(_train_as_one_of_two)
    for losses in found:
        stored, inverted = (torch.tensor(losses[mode]) for mode in ("store", "invert"))
        assert stored[-10:].mean() < stored[:10].mean()
        torch.testing.assert_close(inverted, stored, rtol=1e-5, atol=1e-5)
    assert found[0]["store"] != found[1]["store"]
