"""collapse: one product equals all steps, in every form; its inverse, gradients and recompression."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.operators import LatentOperator
from linfast.sampling.collapsed import _factors
from linfast.sampling.factored import fold_dense, fold_factored, multiply_pairs, step_pieces
from linfast.sampling.integrate import METHODS, schedule
from tests.laws.zoo import perturb, relative

ENDS = {None: METHODS, 0.9: METHODS, 1.0: ("euler", "midpoint")}


def _timed(kind: type, n: int, rank: int, alpha: float = 0.3, **sizes: int) -> LatentOperator:
    return perturb(kind(n, rank, alpha, **sizes), 0.02).double()  # type: ignore[return-value]


def _small(kind: type, n: int, rank: int, alpha: float = 0.3) -> LatentOperator:
    return _timed(kind, n, rank, alpha, time_features=4, hidden=4)


def _by_hand(A: LatentOperator, z: Tensor, steps: int, method: str, stop: float | None = None) -> Tensor:
    """The four schemes, written as in textbooks."""
    count, h = (steps - 1, 1 / steps) if stop is None else (steps, stop / steps)

    def v(z: Tensor, t: float) -> Tensor:
        return (A(z, t=t) - z) / (1 - t)

    for i in range(count):
        t = i * h
        k1 = v(z, t)
        if method == "euler":
            z = z + h * k1
        elif method == "midpoint":
            z = z + h * v(z + h / 2 * k1, t + h / 2)
        elif method == "heun":
            z = z + h / 2 * (k1 + v(z + h * k1, t + h))
        else:
            k2 = v(z + h / 2 * k1, t + h / 2)
            k3 = v(z + h / 2 * k2, t + h / 2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + v(z + h * k3, t + h))
    return z


@pytest.mark.parametrize("kind", [lf.TimeLowRank, lf.TimeDiagonal])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", ENDS)
@pytest.mark.parametrize(("n", "rank", "steps"), [(6, 2, 2), (6, 2, 13), (200, 2, 13)])
def test_every_scheme_and_end_is_the_textbooks(kind, method, stop, n, rank, steps) -> None:
    if method not in ENDS[stop]:
        with pytest.raises(ValueError, match=f"{method} looks at t = 1.*euler or midpoint"):
            lf.collapse(lf.TimeLowRank(n, rank), steps, method, stop)
        return
    A, z = _small(kind, n, rank), torch.randn(3, n, dtype=torch.float64)
    with torch.no_grad():
        B = lf.collapse(A, steps, method, stop)
        assert relative(B(z), _by_hand(A, z, steps, method, stop)) < 1e-12


def _f(A: LatentOperator) -> lf.Linearizer:
    return lf.Linearizer(lf.Flow([], features=A.n_in), A)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("n", "rank", "steps"),
    [*((n, r, s) for n in (4, 64) for r in (1, 8) for s in (2, 5, 100)), (64, 1, 1000), (1024, 8, 5)],
)
def test_one_step_is_every_step(method: str, n: int, rank: int, steps: int) -> None:
    f = _f(_timed(lf.TimeLowRank, n, rank, hidden=32))
    noise = torch.randn(16, n, dtype=torch.float64)
    many = lf.sample(f, noise, steps, method, one_step=False)
    assert relative(lf.sample(f, noise, steps, method), many) < 1e-10
    one = lf.sample(f.float(), noise.float(), steps, method)
    # The weights were rounded too: the truth is the float64 sampler on the rounded ones.
    many = lf.sample(f.double(), noise.float().double(), steps, method, one_step=False)
    assert float(-20 * torch.log10((one - many).square().mean().sqrt() / many.abs().max())) >= 100


@pytest.mark.parametrize("n", [200, 24])  # factored, dense
def test_float32_products_keep_100_db(n: int, monkeypatch) -> None:
    monkeypatch.setattr("linfast.sampling.collapsed._WIDE_FLOPS", 0)
    A = _timed(lf.TimeLowRank, n, 1).float()
    z = torch.randn(16, n)
    with torch.no_grad():
        one = lf.collapse(A, 40)(z)
        many = _by_hand(A.double(), z.double(), 40, "rk4")
    assert one.dtype == torch.float32
    assert float(-20 * torch.log10((one - many).square().mean().sqrt() / many.abs().max())) >= 100


# Form.


@pytest.mark.parametrize(("method", "times"), [("euler", 6), ("midpoint", 12), ("heun", 7), ("rk4", 13)])
def test_factored_while_cheaper_and_shared_times_once(method: str, times: int) -> None:
    """Six steps use this many distinct times; a factored product costs 2 N R, a dense one N^2."""
    width = 2 * times
    B = lf.collapse(lf.TimeLowRank(2 * width + 1, 2), 7, method)
    assert isinstance(B, lf.LowRank)
    assert B.U.shape == B.V.shape == (2 * width + 1, width)
    assert isinstance(lf.collapse(lf.TimeLowRank(2 * width, 2), 7, method), lf.Dense)


@pytest.mark.parametrize("kind", [lf.TimeLowRank, lf.TimeDiagonal])
@pytest.mark.parametrize("n", [64, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [None, 0.1])
def test_a_collapsed_operator_owns_its_tensors(kind: type, n: int, dtype: torch.dtype, tol: float | None) -> None:
    """The tensors are contiguous and share memory with nothing else, like a copy loaded from a file."""
    B = lf.collapse(kind(n, 1, time_features=4, hidden=4).to(dtype), 3, tol=tol)
    for tensor in B.buffers():
        assert tensor.stride() == torch.empty(tensor.shape).stride()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_fixed_factors_keep_their_rank() -> None:
    B = lf.collapse(lf.TimeDiagonal(20, 3), 100)
    assert isinstance(B, lf.LowRank)
    assert B.U.shape == (20, 3)


@pytest.mark.parametrize("kind", [lf.TimeLowRank, lf.TimeDiagonal])
@pytest.mark.parametrize("method", ["midpoint", "rk4"])
@pytest.mark.parametrize("count", [2, 3, 8, 14])
def test_the_tree_is_the_steps_in_order(kind: type, method: str, count: int) -> None:
    A, plan = _small(kind, 9, 2), schedule(method, count + 1)
    with torch.no_grad():
        factors = _factors(A, A._factor_columns(len(plan.times)), plan)
        steps = step_pieces(factors, plan)
        in_order = multiply_pairs(factors, *steps, limit=0)
        assert len(in_order) == count
        truth = fold_dense(factors, in_order)
        for limit in (20, 10**6):
            pieces = multiply_pairs(factors, *steps, limit=limit)
            assert relative(fold_dense(factors, pieces), truth) < 1e-13
            beta, Q = fold_factored(factors, pieces)
            rebuilt = beta * torch.eye(9, dtype=torch.float64) + factors.U.mT @ Q
            assert relative(rebuilt, truth) < 1e-13
        assert len(pieces) == count.bit_count()  # log-depth: as many as count has powers of two


@pytest.mark.parametrize("kind", [lf.TimeLowRank, lf.TimeDiagonal])
@pytest.mark.parametrize("one_step", [True, False])
def test_the_generator_is_called_once(kind: type, one_step: bool) -> None:
    A = lf.TimeLowRank(8, 2) if kind is lf.TimeLowRank else lf.TimeDiagonal(8, 2)
    f, asked = _f(2 * A if not one_step else A), []
    A.embedding.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0]))
    lf.sample(f, torch.randn(2, 8), 10, one_step=one_step)
    assert [len(t) for t in asked] == [19]  # 2 * 10 - 1 distinct times, in one call
    assert len(set(asked[0].tolist())) == 19


def test_other_operators_are_stepped_in_float64() -> None:
    A, D = _small(lf.TimeLowRank, 6, 2), lf.Dense(6).double()
    z = torch.randn(3, 6, dtype=torch.float64)
    for composite in (A @ D, A + 0.5 * D, A.T):
        assert relative(lf.collapse(composite, 9, "heun")(z), _by_hand(composite, z, 9, "heun")) < 1e-12
    assert relative(lf.collapse(A.T @ D, 9).to_dense(), lf.collapse((A.T @ D).float(), 9).to_dense()) < 1e-6


# Recompression.


@pytest.mark.parametrize(("n", "steps"), [(300, 30), (40, 30)])  # from factors, from a matrix
@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10])
def test_tol_is_kept_and_reported(n: int, steps: int, tol: float) -> None:
    A = _timed(lf.TimeLowRank, n, 2, hidden=32)
    with torch.no_grad():
        exact, less = lf.collapse(A, steps), lf.collapse(A, steps, tol=tol)
        found = relative(less.to_dense(), exact.to_dense())
        assert isinstance(less, lf.LowRank)
        assert tol >= found  # a truncation may use its whole tolerance: this is not a margin of rounding
        assert abs(found - less.truncation_error) < 0.01 * found + 1e-14
        assert exact.truncation_error == 0
        # One column fewer would not suffice: the best approximation of that rank exceeds tol.
        A_part = exact.to_dense() - less.alpha * torch.eye(n, dtype=torch.float64)
        left = torch.linalg.svdvals(A_part)[less.U.shape[1] - 1 :].norm() / exact.to_dense().norm()
        assert float(left) > tol


def test_tol_that_spares_nothing_gives_the_exact_operator() -> None:
    A = _small(lf.TimeDiagonal, 8, 3)
    B = lf.collapse(A, 10, tol=1e-15)
    assert B.truncation_error == 0
    assert relative(B.to_dense(), lf.collapse(A, 10).to_dense()) == 0


# Inverse and gradients.


@pytest.mark.parametrize("alpha", [0.0, 0.9])
@pytest.mark.parametrize(("n", "rank", "steps"), [(200, 1, 50), (64, 8, 100), (30, 4, 2)])
def test_the_inverse_is_exact(alpha: float, n: int, rank: int, steps: int) -> None:
    A = _timed(lf.TimeLowRank, n, rank, alpha, hidden=32)
    z = torch.randn(8, n, dtype=torch.float64)
    with torch.no_grad():
        B = lf.collapse(A, steps)
        bound = max(1e-8, 1e-13 * float(torch.linalg.cond(B.to_dense())))
        assert relative(B.inverse()(B(z)), z) < bound
        assert relative(B(B.inverse()(z)), z) < bound
        assert type(B.inverse()) is type(B)


@pytest.mark.parametrize(("kind", "n"), [(lf.TimeLowRank, 40), (lf.TimeLowRank, 4), (lf.TimeDiagonal, 9)])
@pytest.mark.parametrize("method", ["heun", "rk4"])
def test_gradients_are_those_of_the_steps(kind: type, n: int, method: str) -> None:
    A = _small(kind, n, 1)
    z, v = torch.randn(2, 3, n, dtype=torch.float64)
    parameters = tuple(A.parameters())
    one = torch.autograd.grad((lf.collapse(A, 6, method)(z) * v).sum(), parameters)
    many = torch.autograd.grad((_by_hand(A, z, 6, method) * v).sum(), parameters)
    for a, b in zip(one, many, strict=True):
        assert relative(a, b) < 1e-10


def test_a_recompressed_gradient_is_the_exact_one_projected() -> None:
    A = _small(lf.TimeLowRank, 40, 1)
    B = lf.collapse(A, 6, tol=1e-9)
    assert isinstance(B, lf.LowRank)
    assert not B.U.requires_grad
    exact = (lf.collapse(A, 6).to_dense() * (B.U @ B.U.mT)).sum()
    less = ((B.to_dense() - B.alpha * torch.eye(40)) * (B.U @ B.U.mT)).sum()
    for a, b in zip(*(torch.autograd.grad(x, tuple(A.parameters())) for x in (exact, less)), strict=True):
        assert relative(b, a) < 1e-10


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda A: lf.collapse(A, 1), "steps must be at least 2; got 1"),
        (lambda A: lf.collapse(A, method="rk5"), "method must be one of euler, midpoint, heun, rk4; got 'rk5'"),
        (lambda A: lf.collapse(A, stop=0.0), r"stop must be a finite number above 0 and at most 1; got 0.0"),
        (lambda A: lf.collapse(A, stop=1.5), r"above 0 and at most 1; got 1.5"),
        (lambda A: lf.collapse(A, tol=0.0), "tol must be below 1 and at least 1.2e-07.*got 0.0"),
        (lambda A: lf.collapse(A, tol=2.0), "got 2.0"),
        (lambda A: lf.collapse(lf.Dense(8)), "time-dependent.*Dense"),
    ],
)
def test_bad_calls(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(lf.TimeLowRank(8, 2))


def test_a_saved_generator_is_the_same_generator(tmp_path) -> None:
    f = lf.Linearizer(perturb(lf.coupling_flow(6, 2, (8,))), _timed(lf.TimeDiagonal, 6, 2).float())
    for model in (f, lf.generator(f, 10)):
        lf.save(model, tmp_path / "f.safetensors")
        noise = torch.randn(4, 6)
        loaded = lf.load(tmp_path / "f.safetensors")
        assert torch.equal(*(m(noise) if model is not f else lf.sample(m, noise, 10) for m in (model, loaded)))


def test_every_time_is_looked_at_and_listed_once() -> None:
    for method in METHODS:
        plan = schedule(method, 5)
        looked = {plan.index(i, s) for i in range(plan.count) for s in range(len(plan.scheme.c))}
        assert looked == set(range(len(plan.times)))
        assert list(plan.times) == sorted(set(plan.times))
        assert dataclasses.replace(plan, count=1).times[0] == 0
