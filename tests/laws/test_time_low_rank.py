"""TimeLowRank: one operator per time, in whatever form the time is given, alone and inside composites."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.operators import LatentOperator
from tests.laws import operators_zoo as zoo
from tests.laws.operators_zoo import DTYPES
from tests.laws.zoo import perturb, relative

N, RANK = 8, 2


def _timed(dtype: torch.dtype = torch.float64, alpha: float = 0.7) -> lf.TimeLowRank:
    return perturb(lf.TimeLowRank(N, RANK, alpha, time_features=8, hidden=16)).to(dtype)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_number_a_tensor_and_a_batch_agree(dtype: torch.dtype, alpha: float) -> None:
    A_t, z = _timed(dtype, alpha), zoo.batch(N, dtype)
    times = torch.linspace(0.05, 0.95, zoo.BATCH, dtype=dtype)
    together = A_t.at(times)(z)
    assert relative(A_t(z, t=times), together) == 0.0
    for i, t in enumerate(times):
        for given in (float(t), t, t[None]):
            assert relative(A_t.at(given)(z[i : i + 1]), together[i : i + 1]) <= zoo.bound(A_t, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_factors_have_weights_that_depend_on_time(dtype: torch.dtype) -> None:
    A_t, z = perturb(lf.TimeDiagonal(N, RANK, 0.7, time_features=8, hidden=16)).to(dtype), zoo.batch(N, dtype)
    times = torch.linspace(0.05, 0.95, zoo.BATCH, dtype=dtype)
    weights, together = A_t.factors_at(times).weights, A_t(z, t=times)
    assert float((weights[0] - weights[-1]).detach().abs().max()) > 1e-3
    for i, t in enumerate(times):
        dense = 0.7 * torch.eye(N, dtype=dtype) + A_t.U @ torch.diag(weights[i]) @ A_t.V.mT
        for given in (float(t), t, t[None]):
            assert relative(A_t(z[i : i + 1], t=given), z[i : i + 1] @ dense.mT) <= zoo.bound(A_t, dtype)
        assert relative(together[i : i + 1], z[i : i + 1] @ dense.mT) <= zoo.bound(A_t, dtype)
    for ask in (lambda: A_t(z), A_t.inverse, lambda: A_t.to_dense()):
        with pytest.raises(ValueError, match="TimeDiagonal depends on time"):
            ask()
    for bad, match in ((torch.ones(2, 2), r"0-d or \[B\]"), (torch.ones(()), r"t must be \[T\]")):
        with pytest.raises(ValueError, match=match):
            A_t.at(bad) if bad.ndim else A_t.factors_at(bad)


def test_a_number_keeps_float64() -> None:
    A_t, z = _timed(), zoo.batch(N, torch.float64)
    assert torch.equal(A_t.at(0.1)(z), A_t.at(torch.tensor(0.1, dtype=torch.float64))(z))


def test_integers_are_times() -> None:
    A_t, z = _timed(), zoo.batch(N, torch.float64)
    assert torch.equal(A_t.at(1)(z), A_t.at(torch.tensor(1))(z))
    assert torch.equal(A_t.at(1)(z), A_t.at(1.0)(z))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_factors_are_one_pair_per_time(count: int) -> None:
    A_t, times = _timed(), torch.linspace(0.0, 1.0, count, dtype=torch.float64)
    alpha, U, V, weights = A_t.factors_at(times)
    assert alpha == A_t.alpha
    assert weights is None
    assert U.shape == V.shape == (count, N, RANK)
    for k, t in enumerate(times):
        dense = A_t.alpha * torch.eye(N, dtype=torch.float64) + U[k] @ V[k].mT
        assert relative(A_t.at(t).to_dense(), dense) <= zoo.bound(A_t, torch.float64)
    with pytest.raises(ValueError, match=r"t must be \[T\]"):
        A_t.factors_at(torch.tensor(0.5))


COMPOSITES = {
    "transpose": lambda A, D: A.T,
    "product": lambda A, D: A @ D,
    "product with itself": lambda A, D: A @ A.T,
    "sum": lambda A, D: D + A,
    "scaled": lambda A, D: 2 * A,
    "nested": lambda A, D: ((A @ D).T - 3 * A) @ D,
}


@pytest.mark.parametrize("what", COMPOSITES)
@pytest.mark.parametrize("batched", [False, True])
def test_composites_take_a_time(what: str, batched: bool) -> None:
    A_t, D, z = _timed(), zoo.dense(N, N), zoo.batch(N, torch.float64)
    t: float | Tensor = zoo.times() if batched else 0.3
    composite: LatentOperator = COMPOSITES[what](A_t, D)
    assert composite.time_dependent
    truth = COMPOSITES[what](A_t.at(t), D)
    assert not truth.time_dependent
    assert relative(composite(z, t=t), truth(z)) <= 1e-15
    assert relative(composite.at(t).closed().to_dense(), truth.to_dense()) <= zoo.bound(A_t, torch.float64)


ASKED = {
    "apply": lambda A: A(zoo.batch(N, torch.float64)),
    "inverse": lambda A: A.inverse(),
    "pinv": lambda A: A.pinv(),
    "svd": lambda A: A.svd(),
    "eig": lambda A: A.eig(),
    "norm": lambda A: A.norm(),
    "rank": lambda A: A.rank(),
    "power": lambda A: A**2,
    "to_dense": lambda A: A.to_dense(),
}


@pytest.mark.parametrize("what", ASKED)
def test_without_a_time_it_says_so(what: str) -> None:
    A_t = _timed()
    for A in (A_t, A_t.T, A_t @ zoo.dense(N, N), 2 * A_t + zoo.dense(N, N)):
        with pytest.raises(ValueError, match=r"depends on time.*at\(t\)"):
            ASKED[what](A)


def test_gradients_reach_the_generators() -> None:
    A_t, z = _timed(), zoo.batch(N, torch.float64)
    A_t.at(zoo.times()).inverse()(z).sum().backward()
    assert all(float(p.grad.norm()) > 0 for p in A_t.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in A_t.parameters())


def test_bad_times_say_so() -> None:
    with pytest.raises(ValueError, match=r"0-d or \[B\], .*; got .*\(2, 2\)"):
        _timed().at(torch.ones(2, 2))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        lf.TimeLowRank(8, 0)
