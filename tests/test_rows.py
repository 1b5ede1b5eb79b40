"""Cutting batches on a CPU gives the same results, and happens only where rows are independent."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf
from linfast import rows

FEATURES, BATCH = 6, 517  # the last part is shorter
FEW = rows._Sizes(bytes=64 * 16 * 8, weights=0, fewest=8)  # 64 rows at a time of layers 16 wide in fp64


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr(rows, "_SIZES", FEW)


class Longest(TorchDispatchMode):
    """Records the maximum number of rows of a product."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.rows = max([self.rows, *[a.shape[0] for a in args if isinstance(a, torch.Tensor) and a.ndim == 2]])
        return function(*args, **(kwargs or {}))


def longest(model, *given, **context):
    with torch.no_grad(), Longest() as seen:
        model(*given, **context)
    return seen.rows


def flow(**options):
    g = lf.coupling_flow(features=FEATURES, depth=3, hidden=(16, 16), **options).double()
    with torch.no_grad():
        for p in g.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return g


def values(g, x, direction, **context):
    """Output, log-determinant and all gradients."""
    x = x.clone().requires_grad_()
    y, log_det = getattr(g, direction)(x, **context)
    loss = (y * torch.arange(y.numel()).sin().view_as(y)).sum() + (log_det * torch.arange(len(y)).cos()).sum()
    return [y, log_det, *torch.autograd.grad(loss, [x, *g.parameters()])]


@pytest.mark.parametrize("memory", ["store", "invert"])
@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_a_flow_by_rows_gives_what_it_gives_at_once(memory, direction, monkeypatch):
    g, x = flow(memory=memory), torch.randn(BATCH, FEATURES).double()
    assert longest(g, x) == BATCH
    expected = values(g, x, direction)
    monkeypatch.setattr(rows, "_SIZES", FEW)
    assert longest(g, x) == 64
    for a, b in zip(values(g, x, direction), expected, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("make", [lf.coupling_flow, lf.autoregressive_flow])
@pytest.mark.parametrize("memory", ["store", "invert"])
def test_a_context_is_cut_with_its_rows(make, memory, monkeypatch):
    g = make(FEATURES, 2, (16, 16), "silu", context_features=3, memory=memory).double()
    with torch.no_grad():
        for p in g.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x, context = torch.randn(BATCH, FEATURES).double(), torch.randn(BATCH, 3).double()
    expected = values(g, x, "forward_and_log_det", context=context)
    inverted = g.inverse(x, context=context)
    monkeypatch.setattr(rows, "_SIZES", FEW)
    assert longest(g, x, context=context) == 64
    for a, b in zip(values(g, x, "forward_and_log_det", context=context), expected, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
    assert (g.inverse(x, context=context) - inverted).norm() <= 1e-12 * inverted.norm()


@pytest.mark.parametrize(("threads", "expected"), [(1, 64), (2, 128)])
def test_each_thread_has_its_rows(few_at_once, threads, expected):
    torch.set_num_threads(threads)
    assert longest(flow(), torch.randn(BATCH, FEATURES).double()) == expected


def test_a_short_batch_stays_whole(few_at_once):
    assert longest(flow(), torch.randn(127, FEATURES).double()) == 127


def test_a_time_for_each_sample_stays_with_its_row(few_at_once):
    g = flow(time_features=8)
    x, t = torch.randn(BATCH, FEATURES).double(), torch.rand(BATCH).double()
    assert longest(g, x, t=t) == BATCH
    assert longest(g, x, t=0.5) == 64


def test_hooks_and_dropout_see_the_whole_batch(few_at_once):
    seen, x = [], torch.randn(BATCH, FEATURES).double()
    g = flow()
    g.bijections[0].register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
    g(x)
    assert seen == [BATCH]
    g = lf.Flow([lf.AffineCoupling(nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5)), features=FEATURES)]).double()
    assert longest(g, x) == BATCH


def test_a_compiled_flow_is_one_graph_for_the_whole_batch(few_at_once):
    g, x = flow(), torch.randn(BATCH, FEATURES).double()
    products = []

    def backend(graph, example):
        products.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    torch.compile(g, backend=backend, fullgraph=True)(x)
    assert products == [9]  # 3 couplings of 3 linear layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_flow_is_one_graph_for_the_whole_batch(few_at_once):
    traced = torch.jit.trace(flow().eval(), torch.randn(BATCH, FEATURES).double())
    assert str(traced.inlined_graph).count("aten::linear") == 9


def mlp(*between):
    return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), *between, nn.Linear(16, 6))


@pytest.mark.parametrize(
    ("between", "expected"), [((), 64), ((nn.BatchNorm1d(16),), BATCH), ((nn.Dropout(0.5),), BATCH)],
    ids=["MLP", "batch norm", "dropout"],
)  # fmt: skip
def test_accelerated_couplings_by_rows(few_at_once, between, expected):
    normflows = pytest.importorskip("normflows")
    model = normflows.flows.AffineCouplingBlock(mlp(*between)).double()
    original, x = copy.deepcopy(model), torch.randn(BATCH, FEATURES).double()
    assert lf.accelerate(model).swapped
    assert longest(model, x) == expected
    state = torch.get_rng_state()
    for direction in ("forward", "inverse"):
        torch.set_rng_state(state)
        ours = getattr(model, direction)(x)
        torch.set_rng_state(state)
        for a, b in zip(ours, getattr(original, direction)(x), strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize(
    ("between", "expected"), [((), 64), ((nn.Dropout(0.5),), BATCH)], ids=["MLPs", "one is not"]
)
def test_both_sides_by_rows(few_at_once, between, expected):
    memcnn = pytest.importorskip("memcnn")
    block = memcnn.AffineCoupling(mlp(), mlp(*between), adapter=memcnn.AffineAdapterSigmoid).double()
    original, x = copy.deepcopy(block), torch.randn(BATCH, FEATURES).double()
    assert lf.accelerate(block).swapped
    assert longest(block, x) == expected
    block.eval(), original.eval()
    for a, b in ((block(x), original(x)), (block.inverse(x), original.inverse(x))):
        assert (a - b).norm() <= 1e-12 * b.norm()
