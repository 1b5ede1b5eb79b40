"""A context of one row is that row for every sample: values, gradients, launches, errors, samplers."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import linfast as lf
from linfast import rows
from tests.laws.zoo import perturb, relative
from tests.ops.budget import COMPILED, DEVICE

D, C, B = 6, 3, 40


@pytest.fixture(params=[2, 1000], ids=["apart", "joined"], autouse=True)
def _from_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short batch has the row's product computed apart, or the row joined to every sample."""
    monkeypatch.setattr(rows, "_SIZES", replace(rows._SIZES, apart=request.param))


def _residual(**options: Any) -> lf.Flow:
    nets = [lf.ResidualMLP(3, 6, 8, activation="elu", context_features=C, **options) for _ in range(2)]
    layers = [lf.AffineCoupling(n, D, m) for n, m in zip(nets, ("first", "second"), strict=True)]
    return lf.Flow(layers, shape=(D,))


def _images(transform: str = "affine", **options: Any) -> lf.Flow:
    return lf.image_flow(2, 2, 2, 4, transform=transform, context_features=C, **options)


def _unets(transform: str = "affine", **options: Any) -> lf.Flow:
    unet = {"blocks": 1, "channel_mult": (1,), "dropout": 0.0}
    return _images(transform, conditioner="unet", unet_options=unet, **options)


FLOWS: dict[str, tuple[Callable[[], lf.Flow], dict[str, Any]]] = {
    "couplings": (lambda: lf.coupling_flow(D, 3, (8, 8), context_features=C), {}),
    "couplings, time": (lambda: lf.coupling_flow(D, 3, (8,), context_features=C, time_features=4), {"t": 0.3}),
    "couplings, times": (
        lambda: lf.coupling_flow(D, 2, (8,), context_features=C, time_features=4),
        {"t": torch.linspace(0, 1, B).double()},
    ),
    "additive, mixed": (
        lambda: lf.coupling_flow(D, 2, (8,), coupling="additive", mix="lu", context_features=C),
        {},
    ),
    "masked": (lambda: lf.autoregressive_flow(D, 2, (8, 8), context_features=C), {}),
    "masked, time": (lambda: lf.autoregressive_flow(D, 2, (8,), context_features=C, time_features=4), {"t": 0.3}),
    "residual": (_residual, {}),
    "residual, time": (lambda: _residual(time_features=4), {"t": 0.3}),
    "images": (lambda: _images("additive"), {}),
    "images, time": (lambda: _images("spline", time_features=4), {"t": 0.3}),
    "images, times": (lambda: _images(time_features=4), {"t": torch.linspace(0, 1, B).double()}),
    "images, UNets": (lambda: _unets("spline"), {}),
    "images, UNets, time": (lambda: _unets(time_features=4), {"t": 0.3}),
    "images, UNets, times": (
        lambda: _unets("additive", time_features=4),
        {"t": torch.linspace(0, 1, B).double()},
    ),
}


def _flow(name: str) -> tuple[lf.Flow, dict[str, Any]]:
    make, context = FLOWS[name]
    return perturb(make(), 0.2).double(), context  # type: ignore[return-value]


def _values(g: lf.Flow, method: str, x: Tensor, context: Tensor, rest: dict[str, Any]) -> list[Tensor]:
    """Outputs and all gradients; that of the context is summed over its rows."""
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    y, log_det = getattr(g, method)(x, context=context, **rest)
    loss = y.sin().sum() + (log_det * torch.arange(len(x)).cos()).sum()
    of_x, of_context, *others = torch.autograd.grad(loss, [x, context, *g.parameters()])
    return [y, log_det, of_x, of_context.sum(0), *others]


@pytest.mark.parametrize("memory", ["store", "invert"])
@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_row_is_given_to_every_sample(name: str, method: str, memory: str) -> None:
    g, rest = _flow(name)
    g.memory = memory
    x, row = torch.randn(B, *g.shape).double(), torch.randn(1, C).double()
    expected = _values(g, method, x, row.expand(B, -1), rest)
    for got, value in zip(_values(g, method, x, row, rest), expected, strict=True):
        assert relative(got, value) < 1e-10
    with torch.no_grad():
        for given in (row, row.expand(B, -1)):
            y, log_det = getattr(g, method)(x, context=given, **rest)
            assert relative(y, expected[0]) < 1e-12
            assert relative(log_det, expected[1]) < 1e-12
            at = g.at(context=given, **rest)
            assert relative(getattr(at, method)(x)[0], expected[0]) < 1e-12


@pytest.mark.parametrize("name", FLOWS)
def test_batches_of_none_and_one_and_a_frozen_flow(name: str) -> None:
    g, rest = _flow(name)
    rest = {"t": 0.3} if rest else {}
    row, other = torch.randn(2, 1, C).double()
    for batch in (0, 1, B):
        x = torch.randn(batch, *g.shape).double()
        assert g(x, context=row, **rest).shape == x.shape
        assert g.inverse(x, context=row, **rest).shape == x.shape
    with torch.no_grad():
        expected = [g(x, context=c, **rest) for c in (row, other)]
        with lf.freeze(g):
            assert all(torch.equal(g(x, context=c, **rest), y) for c, y in zip((row, other), expected, strict=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracer", ["torch.jit.trace", "make_fx"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_trace_with_an_expanded_context_keeps_a_row_per_sample(name: str, tracer: str) -> None:
    g, rest = _flow(name)
    g.requires_grad_(False)
    x, row, contexts = torch.randn(B, *g.shape).double(), torch.randn(1, C).double(), torch.randn(B, C).double()

    def run(x: Tensor, context: Tensor) -> Tensor:
        return g(x, context=context, **rest)

    with torch.no_grad():
        example = x, row.expand(B, -1)
        traced = make_fx(run)(*example) if tracer == "make_fx" else torch.jit.trace(run, example, check_trace=False)
        assert relative(traced(x, contexts), run(x, contexts)) < 1e-12


def test_a_linearizer_and_its_samplers_take_a_row() -> None:
    g, x = perturb(lf.coupling_flow(D, 2, (8,), context_features=C), 0.2), torch.randn(B, D)
    row = torch.randn(1, C)
    f, many = (lf.Linearizer(g.at(context=c), lf.TimeLowRank(D, 2)) for c in (row, row.expand(B, -1).clone()))
    perturb(f.A)
    many.A.load_state_dict(f.A.state_dict())
    for call in (lambda f: f(x, 0.5), lambda f: lf.sample(f, x, steps=3)):
        assert relative(call(f), call(many)) < 1e-5
    f = lf.Linearizer(g, lf.Dense(D))
    assert relative(f(x, context=row), f(x, context=row.expand(B, -1).clone())) < 1e-6


@pytest.mark.skipif(COMPILED, reason="counts what the interpreter launches")
def test_a_coupling_stack_with_a_row_is_one_launch() -> None:
    g, x = perturb(lf.coupling_flow(D, 4, (8,), context_features=C), 0.2), torch.randn(B, D)
    row = torch.randn(1, C)
    wide = copy.deepcopy(g).double()
    leaves, wide_leaves = ([t.requires_grad_() for t in given] for given in ((x, row), (x.double(), row.double())))
    truth = wide(wide_leaves[0], context=wide_leaves[1])
    expected = torch.autograd.grad(truth.sin().sum(), [*wide_leaves, *wide.parameters()])
    with lf.backend("triton"):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert "coupling_stack" in str(lf.plan(g, x, context=row))
                y = g(x, context=row)
            assert relative(y, truth) < 1e-5
        found = torch.autograd.grad(y.sin().sum(), [*leaves, *g.parameters()])
    for got, value in zip(found, expected, strict=True):
        assert relative(got, value) < 1e-4


@pytest.mark.parametrize("name", ["couplings", "masked", "residual", "images", "images, UNets"])
@pytest.mark.parametrize("shape", [(2, C), (1, C + 1), (C,), (1, 1, C)])
def test_other_sizes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    g, _ = _flow(name)
    with pytest.raises(ValueError, match=r"context must be \[40, 3\] or \[1, 3\] .*got "):
        g(torch.randn(B, *g.shape).double(), context=torch.ones(shape).double())


@pytest.mark.skipif(COMPILED, reason="counts what the interpreter launches")
@pytest.mark.parametrize("batch", [1, B])
def test_where_kernels_run_a_context_meets_the_weights_of_a_flow_in_one_product(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = [lf.ResidualMLP(3, 6, 8, 3, activation="elu", context_features=5) for _ in range(4)]
    g = perturb(lf.Flow([lf.AffineCoupling(n, D, ("first", "second")[i % 2]) for i, n in enumerate(nets)]), 0.2)
    x, context = torch.randn(B, D), torch.randn(batch, 5)
    wide = copy.deepcopy(g).double()
    leaf, truth_leaf = context.clone().requires_grad_(), context.double().requires_grad_()
    y, truth = g_of(g, x, leaf), wide(x.double(), context=truth_leaf)
    found = torch.autograd.grad(y.sin().sum(), [leaf, *g.parameters()])
    expected = torch.autograd.grad(truth.sin().sum(), [truth_leaf, *wide.parameters()])
    for got, value in zip((y, *found), (truth, *expected), strict=True):
        assert relative(got, value) < 1e-4
    seen: list[int] = []
    product = F.linear
    monkeypatch.setattr(F, "linear", lambda a, *rest: seen.append(a.shape[1]) or product(a, *rest))
    for frozen in (False, True):
        with torch.no_grad(), lf.freeze(g) if frozen else contextlib.nullcontext():
            for again in range(2):
                seen.clear()
                assert relative(g_of(g, x, context), truth) < 1e-5
                assert seen.count(5) == 1
                if not frozen and again:
                    perturb(g.bijections[1], 0.1, seed=1)  # weights are read anew
                    truth = g_of(copy.deepcopy(g).double(), x.double(), context.double())
    g.bijections[2].register_forward_pre_hook(  # what a hook gives a layer is what the layer uses
        lambda layer, given, named: (given, {"context": named["context"] + 1}), with_kwargs=True
    )
    changed = copy.deepcopy(g).double()
    with torch.no_grad():
        assert relative(g_of(g, x, context), changed(x.double(), context=context.double())) < 1e-5
        assert relative(g_of(g, x, context), truth) > 1e-3


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("context", "message"),
    [
        (torch.ones(B, C).double(), "ResidualMLP: context is torch.float64 and the parameters are torch.float32"),
        (torch.ones(1, C).half(), "ResidualMLP: context is torch.float16 and the parameters are torch.float32"),
        (torch.ones(B, C, device="meta"), "ResidualMLP: context is on meta and the parameters are on"),
        (torch.ones(2, C), r"context must be \[40, 3\] or \[1, 3\] .*got \(2, 3\)"),
        (torch.ones(B), r"context must be \[40, 3\] or \[1, 3\] .*got \(40,\)"),
    ],
    ids=["double", "half", "meta", "rows", "vector"],
)
def test_a_context_unlike_the_parameters_is_refused(backend: str, context: Tensor, message: str) -> None:
    g, x = _residual().to(DEVICE), torch.ones(B, D, device=DEVICE)
    context = context if context.is_meta else context.to(DEVICE)
    with lf.backend(backend), pytest.raises(ValueError, match=message):
        g(x, context=context)
    if context.dtype == torch.float16:
        with lf.backend(backend), pytest.raises(ValueError, match=r"x is torch\.float16 and the parameters are"):
            g(x.half(), context=context)


@pytest.mark.parametrize("of", ["conditioner", "coupling"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_checkpointed_part_computes_its_own_products(backend: str, of: str) -> None:
    g = perturb(_residual(), 0.2).to(DEVICE)
    x, context, found = torch.randn(B, D, device=DEVICE), torch.randn(B, C, device=DEVICE), []
    for checkpointed in (False, True):
        for layer in g.bijections if checkpointed else ():
            part = layer if of == "coupling" else layer.conditioner
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
        with lf.backend(backend):
            y = g(x, context=context)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [*g.parameters()])])
    for got, expected in zip(*found, strict=True):
        assert relative(got, expected) < 1e-4


def g_of(g: lf.Flow, x: Tensor, context: Tensor) -> Tensor:
    with lf.backend("triton"):
        return g(x, context=context)
