"""Laws of every operator: it equals its matrix, views are live, snapshots are not, both are differentiable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.operators import LatentOperator
from tests.laws import operators_zoo as zoo
from tests.laws.operators_zoo import DTYPES, OPERATORS
from tests.laws.zoo import perturb, relative

every_operator = pytest.mark.parametrize("name", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def rows(A: Tensor, z: Tensor) -> Tensor:
    """z_b -> A_b z_b for A [m, n] or [B, m, n], in float64."""
    return torch.einsum("...mn,...n->...m", A.double(), z.double())


@every_operator
@every_dtype
def test_applies_its_matrix(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    z, dense = zoo.batch(A.n_in, dtype), zoo.matrix(A)
    y = A(z)
    assert y.shape == (zoo.BATCH, A.n_out)
    assert y.dtype == dtype
    assert zoo.distance(y, rows(dense, z), dense.norm() * z.norm()) <= zoo.bound(A, dtype)


@every_operator
@every_dtype
def test_transpose_is_the_adjoint(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    z, y = zoo.batch(A.n_in, dtype), zoo.batch(A.n_out, dtype, seed=8)
    left, right = (A(z) * y).sum(-1), (z * A.T(y)).sum(-1)
    size = zoo.matrix(A).norm() * z.norm() * y.norm()
    assert zoo.distance(left, right, size) <= zoo.bound(A, dtype)
    assert relative(A.T.to_dense(), A.to_dense().mT) <= zoo.bound(A, dtype)
    assert (A.T.n_out, A.T.n_in) == (A.n_in, A.n_out)


@every_operator
def test_closed_is_the_same_operator(name: str) -> None:
    A = zoo.build(name)
    assert zoo.distance(A.closed().to_dense(), A.to_dense(), zoo.matrix(A).norm()) <= zoo.bound(A, torch.float64)


@every_operator
def test_transposes_twice_and_composes_with_it(name: str) -> None:
    A = zoo.build(name)
    z = zoo.batch(A.n_in, torch.float64)
    gram = A.T @ A
    assert relative(A.T.T(z), A(z)) <= zoo.bound(A, torch.float64)
    assert zoo.distance(gram(z), A.T(A(z)), zoo.matrix(A).norm() ** 2 * z.norm()) <= zoo.bound(A, torch.float64)
    dense = zoo.matrix(A)
    error = zoo.distance(gram.closed().to_dense(), dense.mT @ dense, dense.norm() ** 2)
    assert error <= zoo.bound(A, torch.float64)


@every_operator
def test_accepts_an_empty_batch(name: str) -> None:
    A = zoo.build(name)
    if zoo.is_batched(A):
        with pytest.raises(ValueError, match=r"rows of z|for x \(0"):
            A(torch.zeros(0, A.n_in, dtype=torch.float64))
    else:
        assert A(torch.zeros(0, A.n_in, dtype=torch.float64)).shape == (0, A.n_out)


@every_operator
def test_refuses_what_does_not_fit(name: str) -> None:
    A = zoo.build(name)
    with pytest.raises(ValueError, match=rf"must be \[B, {A.n_in}\].*got \(4, {A.n_in + 1}\)"):
        A(torch.zeros(4, A.n_in + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"float32 and the parameters are torch.float64"):
        A(torch.zeros(4, A.n_in))
    with pytest.raises(TypeError, match=r"call A\(z\)"):
        A @ torch.zeros(A.n_in, 2)  # type: ignore[operator]
    with pytest.raises(ValueError, match="cannot multiply"):
        A @ lf.Dense(A.n_in + 1)
    with pytest.raises(ValueError, match="cannot add"):
        A + lf.Dense(A.n_out + 1, A.n_in)
    with pytest.raises(TypeError, match="number or a 0-d tensor"):
        A * torch.ones(3)


@pytest.mark.parametrize("name", zoo.TRAINED)
def test_views_are_live(name: str) -> None:
    A = zoo.build(name)
    z, w = zoo.batch(A.n_in, torch.float64), zoo.batch(A.n_out, torch.float64)
    views = [A.T, A @ A.T, A + A, 2 * A, A - 0.5 * A, (A.T @ A).T]
    before = [view(z if view.n_in == A.n_in else w) for view in views]
    perturb(A, std=0.5)
    dense = zoo.matrix(A)
    truths = [dense.mT, dense @ dense.mT, 2 * dense, 2 * dense, 0.5 * dense, dense.mT @ dense]
    for view, old, truth in zip(views, before, truths, strict=True):
        x = z if view.n_in == A.n_in else w
        size = truth.norm() * x.norm() + dense.norm() ** 2 * x.norm()
        assert zoo.distance(view(x), rows(truth, x), size) <= zoo.bound(A, torch.float64)
        assert name == "projection" or relative(view(x), old) > 1e-3  # which changes only by rounding


def _snapshots(A: LatentOperator) -> dict[str, Callable[[], Tensor]]:
    """Each snapshot, as its matrix."""
    taken: dict[str, object] = {"pinv": A.pinv(), "svd": A.svd()}
    if A.n_out == A.n_in:
        taken |= {"power 0": A**0, "power 1": A**1, "power 3": A**3}
    if zoo.is_invertible(A):
        taken |= {"inverse": A.inverse(), "power -2": A**-2}
    return {key: value.to_dense for key, value in taken.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", zoo.TRAINED)
def test_snapshots_stay(name: str) -> None:
    A = zoo.build(name)
    snapshots = _snapshots(A)
    before = {key: dense().detach().clone() for key, dense in snapshots.items()}
    perturb(A, std=0.5)
    for key, dense in snapshots.items():
        assert torch.equal(dense(), before[key]), key


class Asked(nn.Module):
    """question(A) as a module, so that it can be evaluated with other parameters."""

    def __init__(self, A: LatentOperator, question: Callable[[LatentOperator], Tensor]) -> None:
        super().__init__()
        self.A, self.question = A, question

    def forward(self) -> Tensor:
        return self.question(self.A)


def _gradcheck(A: LatentOperator, question: Callable[[LatentOperator], Tensor]) -> None:
    asked = Asked(A, question)
    names, values = zip(*((n, p.detach().double()) for n, p in asked.named_parameters() if p.numel()), strict=True)

    def answer(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(asked, dict(zip(names, parameters, strict=True)), ())

    inputs = [value.clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(answer, inputs, fast_mode=True)


QUESTIONS: dict[str, Callable[[LatentOperator], Tensor]] = {
    "apply": lambda A: A(zoo.batch(A.n_in, torch.float64)),
    "transpose": lambda A: A.T(zoo.batch(A.n_out, torch.float64)),
    "closed": lambda A: A.closed().to_dense(),
    "pinv": lambda A: A.pinv().to_dense(),
    "svd": lambda A: A.svd().to_dense(),
    "singular values": lambda A: A.svd().S,
    "nuclear norm": lambda A: A.norm("nuc"),
}
SQUARE_QUESTIONS: dict[str, Callable[[LatentOperator], Tensor]] = {
    "power": lambda A: (A**3).to_dense(),
    "eig": lambda A: A.eig().values.pow(2).sum(-1).real,
}
INVERSE_QUESTIONS: dict[str, Callable[[LatentOperator], Tensor]] = {
    "inverse": lambda A: A.inverse().to_dense(),
    "negative power": lambda A: (A**-2).to_dense(),
}


@pytest.mark.parametrize("name", zoo.SMOOTH)
def test_is_differentiable(name: str) -> None:
    A = zoo.build(name)
    questions = dict(QUESTIONS)
    if name in zoo.SQUARE:
        questions |= SQUARE_QUESTIONS
    if name in zoo.INVERTIBLE:
        questions |= INVERSE_QUESTIONS
    for question in questions.values():
        _gradcheck(A, question)


def test_projection_is_exactly_idempotent() -> None:
    for dtype in DTYPES:
        A = perturb(lf.Projection(64), std=2.0).to(dtype)
        z = zoo.batch(64, dtype)
        assert torch.equal(A(A(z)), A(z))
        assert torch.equal((A**2).to_dense(), A.to_dense())
        assert set(A.mask().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("rank", [None, 0, 3, 8])
def test_projection_starts_with_its_rank(rank: int | None) -> None:
    assert int(lf.Projection(8, rank).rank()) == (4 if rank is None else rank)
    with pytest.raises(ValueError, match="between 0 and n = 8"):
        lf.Projection(8, 9)


def test_projection_has_the_gradient_of_the_sigmoid() -> None:
    A = perturb(lf.Projection(16), std=1.0).double()
    z, weights = zoo.batch(16, torch.float64), zoo.batch(16, torch.float64, seed=8)
    (A(z) * weights).sum().backward()
    logits = A.logits.detach().requires_grad_()
    (z * logits.sigmoid() * weights).sum().backward()
    assert relative(A.logits.grad, logits.grad) <= 1e-15
