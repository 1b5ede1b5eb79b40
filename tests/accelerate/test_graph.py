"""cuda_graph=True: what is captured, when, and what a replay sees. On a CPU torch.cuda is a stand-in."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import linfast as lf
from linfast.accelerate import graph

from . import stand_in
from .test_libraries import relative
from .zoo import KINDS, make

ON_GPU = torch.cuda.is_available()


@pytest.fixture
def recorder(monkeypatch, cuda):
    monkeypatch.setattr(graph, "capturable", lambda tensor: True)
    return cuda


def _reference():
    torch.manual_seed(0)
    model = stand_in.build(1)
    with torch.no_grad():
        model.gx(torch.randn(8, 1, 8, 8))
    return model.eval()


def _accelerated():
    model = _reference()
    original = copy.deepcopy(model)
    assert not lf.accelerate(model, cuda_graph=True).left
    return model, original


def test_one_graph_for_each_kind_of_call(recorder):
    model, original = _accelerated()
    with torch.no_grad():
        for x in torch.randn(3, 2, 1, 8, 8):
            assert relative(model.gx(x), original.gx(x)) < 2e-6
        assert recorder.counts == (1, 3)
        model.gy(x), model.gx_inverse(x)
        assert recorder.counts == (3, 5)
        model.gx(x[:1]), model.gx(x.mT), model.gx(x)
        assert recorder.counts == (5, 8)
        with lf.backend("reference"):
            model.gx(x)
        assert recorder.counts == (6, 9)


def test_outputs_are_the_callers(recorder):
    model, _ = _accelerated()
    first, second = torch.randn(2, 2, 1, 8, 8)
    with torch.no_grad():
        y = model.gx(first)
        before = y.clone()
        model.gx(second)
        assert torch.equal(y, before)
        assert not torch.equal(model.gx(second), before)


def test_weights_written_in_place_are_seen_and_replaced_ones_captured_anew(recorder):
    model, original = _accelerated()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), lf.freeze(model):
        model.gx_inverse(x)
    for f in (model, original):
        with torch.no_grad():
            for parameter in f.net_gx.parameters():
                parameter.data.mul_(1.1)
    with torch.no_grad():
        assert relative(model.gx_inverse(x), original.gx_inverse(x)) < 2e-6
        assert recorder.counts == (1, 2)
        mix = model.net_gx.g.blocks[0].mix
        mix.W = torch.nn.Parameter(mix.W * 2)
        original.net_gx.g.blocks[0].mix.W.mul_(2)
        assert relative(model.gx_inverse(x), original.gx_inverse(x)) < 2e-6
        assert recorder.counts == (2, 3)
        model.gx_inverse(x)
        assert recorder.counts == (2, 4)


def test_what_no_graph_holds(recorder):
    model, _ = _accelerated()
    x = torch.randn(2, 1, 8, 8)
    model.gx(x).sum().backward()
    assert model.net_gx.g.blocks[0].mix.W.grad is not None
    with torch.no_grad():
        model.net_gx.g.blocks[0].F.cond.train()
        model.gx(x)
        model.eval()
        assert recorder.counts == (0, 0)
        with pytest.raises(NotImplementedError):
            model.net_gx(x, mode="g")
        copied = copy.deepcopy(model)
        lf.restore(model)
        model.gx(x)
        assert recorder.counts[0] == 0  # the wrong mode raised
        copied.gx(x)
        assert recorder.counts == (1, 1)


def test_work_that_cannot_be_captured_runs_without_and_says_so_once(recorder, monkeypatch):
    model, original = _accelerated()
    tried = []

    class Failing:
        def __init__(self, *arguments):
            tried.append(1)
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "CudaGraph", Failing)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="InverseUnet runs without a CUDA graph: operation not permitted"):
            y = model.gx(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.gx(x)
        assert relative(y, original.gx(x)) < 2e-6
    assert tried == [1]


def test_old_graphs_are_let_go(recorder):
    model, _ = _accelerated()
    with torch.no_grad():
        for n in range(1, 10):
            model.gx(torch.randn(n, 1, 8, 8))
        model.gx(torch.randn(9, 1, 8, 8))
        assert recorder.counts[0] == 9
        model.gx(torch.randn(1, 1, 8, 8))
        assert recorder.counts[0] == 10
    assert len(model.net_gx._linfast_plan.graphs._captured) == 8


def test_the_matcher_samples_through_them(recorder):
    model = _reference()
    matcher = stand_in.FlowMatcher(model)
    x = torch.randn(2, 1, 8, 8)
    expected = matcher.sample(x, "cpu", 8, "rk")
    assert not lf.accelerate(matcher, cuda_graph=True).left
    for _ in range(2):
        assert relative(matcher.sample_one_step(x, "cpu", "rk", 8), expected) < 1e-5
    assert recorder.counts == (2, 4)  # g_y and the inverse of g_x


@pytest.mark.parametrize(
    "name", ["nflows Affine alternate", "normflows exp channel", "FrEIA GLOWCouplingBlock ATAN"]
)
@pytest.mark.parametrize("memory", ["store", "invert"])
def test_chains_of_libraries(recorder, name, memory):
    kind = KINDS[name]
    model, x, c = make(kind, 0).eval(), torch.randn(5, *kind.shape), torch.randn(5, *kind.context)
    with torch.no_grad():
        expected = kind.run(model, x, c)
        report = lf.accelerate(model, cuda_graph=True, memory=memory)
        runs = "captured whole" if memory == "store" else "rebuilt in the backward"
        assert report.rows[0].runs.endswith(runs)
        for _ in range(2):
            for a, b in zip(kind.run(model, x, c), expected, strict=True):
                torch.testing.assert_close(a, b)
    assert recorder.counts == (2, 4)


def test_normflows_samples_through_them(recorder):
    model = make(KINDS["normflows exp channel"], 0).eval()
    lf.accelerate(model, cuda_graph=True)
    with torch.no_grad():
        x, log_q = model.sample(4)
        torch.testing.assert_close(model.log_prob(x), log_q)
    assert recorder.counts == (1, 1)


def test_autocast_has_graphs_of_its_own(recorder):
    model, _ = _accelerated()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = model.gx(x)
        for parameter in model.net_gx.parameters():
            parameter.data.mul_(1.05)
        assert not torch.equal(model.gx(x), first)
    assert recorder.counts == (1, 2)
    with torch.no_grad():
        model.gx(x)
    assert recorder.counts[0] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_on_a_gpu():
    model = _reference().cuda()
    matcher, original = stand_in.FlowMatcher(model), stand_in.FlowMatcher(copy.deepcopy(model))
    assert not lf.accelerate(matcher, cuda_graph=True).left
    for scale in (1.0, 1.1):
        for f in (matcher.linearizer, original.linearizer):
            with torch.no_grad():
                for parameter in f.parameters():
                    parameter.mul_(scale)
        for x in torch.randn(3, 4, 1, 8, 8, device="cuda"):
            with torch.no_grad():
                assert relative(matcher.linearizer.gx(x), original.linearizer.gx(x)) < 1e-4
                z = original.linearizer.gy(x)
                assert relative(matcher.linearizer.gy_inverse(z), x) < 1e-4
            steps = original.sample(x, "cuda", 8, "euler")
            assert relative(matcher.sample_one_step(x, "cuda", "euler", 8), steps) < 1e-4
    graphs = matcher.linearizer.net_gx._linfast_plan.graphs
    assert len(graphs._captured) == 4
    assert not graphs._failed
