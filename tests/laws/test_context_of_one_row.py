"""A context of one row is that row for every sample: values, gradients, launches, errors, samplers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import linfast as lf
from linfast import rows
from tests.laws.zoo import perturb, relative
from tests.ops.budget import COMPILED

D, C, B = 6, 3, 40


@pytest.fixture(params=[2, 1000], ids=["apart", "joined"], autouse=True)
def _from_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short batch has the row's product computed apart, or the row joined to every sample."""
    monkeypatch.setattr(rows, "_SIZES", replace(rows._SIZES, apart=request.param))


def _residual(**options: Any) -> lf.Flow:
    nets = [lf.ResidualMLP(3, 6, 8, activation="elu", context_features=C, **options) for _ in range(2)]
    return lf.Flow([lf.AffineCoupling(n, D, m) for n, m in zip(nets, ("first", "second"), strict=True)])


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
    x, row = torch.randn(B, D).double(), torch.randn(1, C).double()
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
        x = torch.randn(batch, D).double()
        assert g(x, context=row, **rest).shape == x.shape
        assert g.inverse(x, context=row, **rest).shape == x.shape
    with torch.no_grad():
        expected = [g(x, context=c, **rest) for c in (row, other)]
        with lf.freeze(g):
            assert all(torch.equal(g(x, context=c, **rest), y) for c, y in zip((row, other), expected, strict=True))


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
    row, wide = torch.randn(1, C), copy.deepcopy(g).double()
    expected = _values(wide, "forward_and_log_det", x.double(), row.double().expand(B, -1), {})  # type: ignore[arg-type]
    with lf.backend("triton"):
        found = _values(g, "forward_and_log_det", x, row, {})  # type: ignore[arg-type]
        with torch.no_grad():
            assert "coupling_stack" in str(lf.plan(g, x, context=row))
            found[0] = g(x, context=row)
    for got, value in zip(found, expected, strict=True):
        assert relative(got, value) < 1e-4


@pytest.mark.parametrize("name", ["couplings", "masked", "residual"])
@pytest.mark.parametrize("shape", [(2, C), (1, C + 1), (C,), (1, 1, C)])
def test_other_sizes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    g, _ = _flow(name)
    with pytest.raises(ValueError, match=r"context must be \[40, 3\] or \[1, 3\] .*got "):
        g(torch.randn(B, D).double(), context=torch.ones(shape).double())


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


def g_of(g: lf.Flow, x: Tensor, context: Tensor) -> Tensor:
    with lf.backend("triton"):
        return g(x, context=context)
