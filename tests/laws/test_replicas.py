"""nn.DataParallel's replicas: modules with tensors and no parameters, as torch.nn.parallel.replicate makes them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from tests.laws import operators_zoo as zoo
from tests.laws.zoo import BIJECTIONS, build, perturb


def replica_of(model: nn.Module) -> nn.Module:
    """A replica on the model's own device; gradients of its tensors reach the model's parameters."""
    originals = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in originals}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, value in module._parameters.items():
            setattr(copied, name, None if value is None else value * 1.0)
    return copies[model]


def _assert_replica_is_the_model(model: nn.Module, x: Tensor, method: str) -> None:
    replica, parameters = replica_of(model), list(model.parameters())
    assert list(replica.parameters()) == []
    results = []
    for each in (model, replica):
        y = getattr(each, method)(x)
        gradients = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) if parameters else ()
        results.append([y.detach(), *gradients])
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)


@pytest.mark.parametrize("method", ["__call__", "inverse"])
@pytest.mark.parametrize("name", BIJECTIONS)
def test_bijections(name: str, method: str) -> None:
    g, shape = build(name, torch.float32)
    x = torch.randn(3, *shape)
    _assert_replica_is_the_model(g, g(x).detach() if method == "inverse" else x, method)


@pytest.mark.parametrize("name", zoo.OPERATORS)
def test_operators(name: str) -> None:
    A = zoo.build(name)
    _assert_replica_is_the_model(A, torch.randn(zoo.BATCH, A.n_in, dtype=torch.float64), "__call__")


@pytest.mark.parametrize("make", [lf.TimeLowRank, lf.TimeDiagonal])
def test_linearizers(make: type[lf.TimeLowRank]) -> None:
    A = make(6, 2, time_features=4, hidden=8).at(0.3)
    f = perturb(
        lf.Linearizer(lf.coupling_flow(6, 2, (8,), mix="free"), 2.0 * A, lf.coupling_flow(6, 2, (8,), mix="lu"))
    )
    _assert_replica_is_the_model(f, torch.randn(5, 6), "__call__")


@pytest.mark.parametrize("memory", ["invert", "auto"])
def test_a_replica_stores_where_x_needs_a_gradient(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linfast.flows.reversible.AUTO_BYTES", 0)
    g = lf.coupling_flow(4, 2, (8,), memory=memory)
    found = []
    for each in (g, replica_of(g)):
        x = torch.linspace(-1, 1, 24).reshape(6, 4).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = each(x).square().sum()
        found.append(torch.autograd.grad(loss, (x, *g.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_actnorm_that_waits_for_its_first_batch_says_that_a_replica_cannot_keep_it() -> None:
    g = lf.coupling_flow(4, 2, (8,), actnorm=True)
    before = [p.detach().clone() for p in g.parameters()]
    with pytest.raises(RuntimeError, match=r"ActNorm: its first batch .* call the model once before"):
        replica_of(g)(torch.randn(8, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, g.parameters(), strict=True))
    g(torch.randn(8, 4))
    _assert_replica_is_the_model(g, torch.randn(8, 4), "__call__")
