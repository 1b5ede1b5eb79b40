"""compile=True: each kind of conditioner compiled once, whatever else is compiled in the process."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import linfast as lf
from linfast.accelerate import compiled

from . import stand_in
from .test_libraries import relative


@pytest.fixture
def eager(monkeypatch):
    """Dynamo without Inductor; counts from zero."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="eager"))
    compiled._region_of.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    compiled._region_of.cache_clear()
    torch._dynamo.reset()


def _graphs():
    return counters["stats"]["unique_graphs"]


def _flow(depth, width=8):
    nf = pytest.importorskip("normflows")
    flows = [nf.flows.AffineCouplingBlock(nf.nets.MLP([3, width, 6])) for _ in range(depth)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(6), flows)


def test_twelve_alike_are_compiled_once(eager):
    model, x = _flow(12), torch.randn(4, 6)
    expected = model.log_prob(x)
    lf.accelerate(model, compile=True)
    with torch.no_grad():
        assert relative(model.log_prob(x), expected.detach()) < 1e-6
    assert _graphs() == 1
    assert relative(model.log_prob(x), expected) < 1e-6
    assert _graphs() == 3  # two more for gradients: the first conditioner's input needs none


@pytest.fixture
def strict():
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_kinds_do_not_displace_each_other(eager, strict):
    """Twelve kinds of MLP share nn.Sequential's forward, which Dynamo compiles eight times at most."""
    x = torch.randn(4, 6)
    for width in range(2, 14):
        model = _flow(1, width)
        lf.accelerate(model, compile=True)
        model.log_prob(x)
    assert _graphs() == 12


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_sizes_of_a_block_are_compiled_twice_in_each_mode(eager, strict):
    """The first as it is and all others as one."""
    block = stand_in.UNetBlock(8, 8, 4)
    original = copy.deepcopy(block).eval()
    assert not lf.accelerate(block, compile=True).left
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (4, 6, 3, 5):
            x, emb = torch.randn(n, 8, 4, 4), torch.randn(n, 4)
            block.train()(x, emb).square().sum().backward()
            block.eval()(x, emb).square().sum().backward()
            with torch.no_grad():
                assert relative(block(x, emb), original(x, emb)) < 2e-6
    assert _graphs() == 6


@pytest.mark.long
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_sizes_and_modes_stay_within_the_limit(eager, strict):
    torch.manual_seed(0)
    model = stand_in.build(1)
    with torch.no_grad():
        model.gx(torch.randn(8, 1, 8, 8))
    assert not lf.accelerate(model, compile=True).left
    for n in (4, 6, 3):
        x = torch.randn(n, 1, 8, 8)
        model.train()
        model.gx(x).square().sum().backward()
        model.eval()
        with torch.no_grad():
            assert relative(model.gx_inverse(model.gx(x)), x) < 1e-4
    assert _graphs() < 40


def test_rebuilding_runs_the_compiled_conditioners(eager):
    model, x = _flow(3), torch.randn(4, 6)
    results = []
    for options in ({"memory": "store"}, {"memory": "invert", "compile": True}):
        lf.accelerate(model, **options)
        model.zero_grad()
        model.forward_kld(x).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(*results) < 2e-6
    assert _graphs() <= 3  # without gradients, and with


def test_what_fails_to_compile_runs_and_says_so_once(monkeypatch):
    def fail(graph, inputs):
        raise TypeError("cannot determine truth value")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend=fail))
    compiled._region_of.cache_clear()
    model, x = _flow(3), torch.randn(4, 6)
    with torch.no_grad():
        expected = model.log_prob(x)
        lf.accelerate(model, compile=True)
        with pytest.warns(RuntimeWarning, match="MLP runs uncompiled: BackendCompilerFailed") as caught:
            actual = model.log_prob(x)
    compiled._region_of.cache_clear()
    assert relative(actual, expected) < 1e-6
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1


def test_compiled_models_copy_pickle_and_are_restored(eager):
    model, x = _flow(2), torch.randn(4, 6)
    lf.accelerate(model, compile=True)
    expected = model.log_prob(x)
    assert relative(copy.deepcopy(model).log_prob(x), expected) < 1e-6
    assert b"linfast" not in pickle.dumps(model)
    lf.restore(model)
    assert all(m._compiled_call_impl is None for m in model.modules())
    assert isinstance(model.flows[0].flows[1].param_map, nn.Module)


def test_only_the_batch_becomes_symbolic(monkeypatch):
    symbolic = []

    def backend(graph, inputs):
        shapes = [n.meta["example_value"].shape for n in graph.graph.nodes if n.op == "placeholder"
                  and isinstance(n.meta.get("example_value"), torch.Tensor)]  # fmt: skip
        symbolic.extend(any(isinstance(size, torch.SymInt) for size in shape[1:]) for shape in shapes)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend=backend))
    compiled._region_of.cache_clear()
    torch._dynamo.reset()
    block = stand_in.UNetBlock(8, 8, 4).eval()
    lf.accelerate(block, compile=True)
    with torch.no_grad():
        for shape in ((4, 8, 4, 4), (3, 8, 4, 4), (3, 8, 6, 6), (5, 8, 8, 8)):
            block(torch.randn(shape), torch.randn(shape[0], 4))
    compiled._region_of.cache_clear()
    assert symbolic
    assert not any(symbolic)
