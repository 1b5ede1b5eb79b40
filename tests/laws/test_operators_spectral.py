"""inverse, pinv, svd, eig, norm, rank and ** of every operator, compared with those of its float64 matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.operators import LatentOperator
from tests.laws import operators_zoo as zoo
from tests.laws.operators_zoo import DTYPES, OPERATORS
from tests.laws.zoo import relative

every_operator = pytest.mark.parametrize("name", OPERATORS)
every_square = pytest.mark.parametrize("name", zoo.SQUARE)
every_invertible = pytest.mark.parametrize("name", zoo.INVERTIBLE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@every_invertible
@every_dtype
def test_inverse_undoes(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    inverse, z = A.inverse(), zoo.batch(A.n_in, dtype)
    allowed = zoo.bound(A, dtype, zoo.condition(A))
    assert relative(inverse(A(z)), z) <= allowed
    assert relative(A(inverse(z)), z) <= allowed
    assert relative(inverse.to_dense(), torch.linalg.inv(zoo.matrix(A))) <= allowed


@pytest.mark.parametrize("name", zoo.SINGULAR + zoo.RECTANGULAR)
def test_inverse_of_a_singular_operator_names_pinv(name: str) -> None:
    with pytest.raises(ValueError, match="pinv"):
        zoo.build(name).inverse()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_refuses_what_would_lose_every_digit(dtype: torch.dtype) -> None:
    tiny, U = 1e-3 * torch.finfo(dtype).eps, zoo.batch(3, dtype).mT.contiguous()
    for A in (
        lf.LowRank(tiny, torch.cat((U, U.flip(0))), torch.cat((U, U.flip(0)))),
        lf.LowRank(torch.zeros((), dtype=dtype), U[:, :1], U[:, :1]),
        lf.Diagonal.of(torch.tensor([1.0, tiny], dtype=dtype)),
        lf.Dense.of(torch.diag(torch.tensor([1.0, tiny], dtype=dtype))),
        lf.Dense.of(torch.full((2, 2), torch.nan, dtype=dtype)),
    ):
        with pytest.raises(ValueError, match=r"singular to working precision.*pinv"):
            A.inverse()


def _worst_penrose(A: Tensor, P: Tensor) -> float:
    """Worst relative error of A P A = A, P A P = P, (A P)^T = A P, (P A)^T = P A."""
    AP, PA = A @ P, P @ A
    pairs = ((AP @ A, A), (PA @ P, P), (AP.mT, AP), (PA.mT, PA))
    return max(zoo.distance(value, truth, truth.norm()) for value, truth in pairs)


@every_operator
@every_dtype
def test_pinv_meets_the_penrose_conditions(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    error = _worst_penrose(zoo.matrix(A), zoo.matrix(A.pinv()))
    assert error <= zoo.bound(A, dtype, 2 * zoo.condition(A))
    assert dtype == torch.float32 or error <= 1e-10


@every_operator
@every_dtype
def test_pinv_applies_to_data(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    z = zoo.batch(A.n_in, dtype)
    y = A(z)
    size = zoo.matrix(A).norm() * z.norm()
    assert zoo.distance(A(A.pinv()(y)), y, size) <= zoo.bound(A, dtype, zoo.condition(A))


@pytest.mark.parametrize("name", ["dense-square", "diagonal", "low-rank-identity", "low-rank-zero", "blocks"])
def test_pinv_drops_what_rtol_says(name: str) -> None:
    A = zoo.build(name)
    S = torch.linalg.svdvals(zoo.matrix(A))
    S = S[S > 1e-9]
    rtol = float((S[-1] + S[-2]) / 2 / S[0]) if S[-1] < 0.99 * S[-2] else 0.9
    truth = torch.linalg.pinv(zoo.matrix(A), rtol=rtol)
    assert relative(A.pinv(rtol).to_dense(), truth) <= zoo.bound(A, torch.float64, zoo.condition(A))
    assert int(A.rank(rtol)) == int(torch.linalg.matrix_rank(zoo.matrix(A), rtol=rtol))


def test_pinv_of_samples_of_which_some_lose_alpha() -> None:
    U = torch.stack([scale * torch.ones(6, 1, dtype=torch.float64) for scale in (1.0, 4.0)])
    A = lf.LowRank(1.0, U, U)
    truth = torch.linalg.pinv(A.to_dense(), rtol=0.1)
    assert torch.linalg.matrix_rank(truth).tolist() == [6, 1]
    assert relative(A.pinv(0.1).to_dense(), truth) <= 1e-14
    assert A.rank(0.1).tolist() == [6, 1]


def _all_singular_values(A: LatentOperator) -> Tensor:
    """All singular values in descending order: those of ``A.svd()`` and the others."""
    svd = A.svd()
    others = min(A.n_out, A.n_in) - svd.S.shape[-1]
    rest = torch.as_tensor(svd.rest, dtype=svd.S.dtype).detach().abs().expand(*svd.S.shape[:-1], others)
    return torch.cat((svd.S, rest), -1).sort(-1, descending=True).values


@every_operator
@every_dtype
def test_svd_rebuilds(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    svd, dense = A.svd(), zoo.matrix(A)
    allowed = 2 * zoo.bound(A, dtype)
    assert zoo.distance(svd.to_dense(), dense, dense.norm()) <= allowed
    for basis in (svd.U.mT, svd.Vh):
        eye = torch.eye(svd.S.shape[-1], dtype=torch.float64).expand(*basis.shape[:-1], -1)
        assert zoo.distance(basis @ basis.mT, eye, max(float(eye.norm()), 1.0)) <= allowed
    assert bool((svd.S.diff(dim=-1) <= 0).all())
    assert bool((svd.S >= 0).all())
    truth = torch.linalg.svdvals(dense)
    assert zoo.distance(_all_singular_values(A), truth, truth.norm()) <= allowed


@every_operator
@every_dtype
@pytest.mark.parametrize("ord", [2, "fro", "nuc"])
def test_norm_is_the_matrix_norm(name: str, dtype: torch.dtype, ord: int | str) -> None:
    A = zoo.build(name, dtype)
    truth = torch.linalg.matrix_norm(zoo.matrix(A), ord)
    assert zoo.distance(A.norm(ord), truth, truth.norm()) <= 2 * zoo.bound(A, dtype)


@every_operator
def test_rank_is_the_matrix_rank(name: str) -> None:
    A = zoo.build(name)
    assert torch.equal(A.rank(), torch.linalg.matrix_rank(zoo.matrix(A)))
    assert torch.equal(A.T.rank(), A.rank())
    assert torch.equal(A.pinv().rank(), A.rank())


@every_square
@every_dtype
def test_eig_solves(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    eig, dense = A.eig(), zoo.matrix(A)
    values, vectors = eig.values.to(torch.complex128), eig.vectors.to(torch.complex128)
    allowed = 4 * zoo.bound(A, dtype)
    residual = dense.to(torch.complex128) @ vectors - vectors * values[..., None, :]
    assert float(residual.detach().norm()) <= allowed * float(dense.norm())
    assert zoo.distance(vectors.abs().square().sum(-2), torch.ones_like(values.real), 1.0) <= allowed
    rest = 0.0 if eig.rest is None else float(eig.rest)
    others = A.n_in - values.shape[-1]
    for k in range(1, 5):  # the sums of their powers determine the eigenvalues
        total, truth = values.pow(k).sum(-1) + others * rest**k, torch.linalg.matrix_power(dense, k)
        error = (total - truth.diagonal(dim1=-2, dim2=-1).sum(-1)).detach().abs().max()
        assert float(error) <= k * allowed * float(dense.norm()) ** k


@every_square
@every_dtype
def test_power_is_repeated_application(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    z = applied = zoo.batch(A.n_in, dtype)
    for n in range(8):
        size = zoo.matrix(A).norm() ** n * z.norm()
        assert zoo.distance((A**n)(z), applied, size) <= zoo.bound(A, dtype)
        applied = A(applied)


@every_invertible
@every_dtype
def test_negative_power_is_the_inverse_applied(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    z = zoo.batch(A.n_in, dtype)
    inverse = torch.linalg.inv(zoo.matrix(A))
    for n in (1, 3):
        size = inverse.norm() ** n * z.norm()
        truth = torch.einsum("...mn,...n->...m", torch.linalg.matrix_power(inverse, n), z.double())
        assert zoo.distance((A**-n)(z), truth, size) <= zoo.bound(A, dtype, n * zoo.condition(A))


@pytest.mark.parametrize("name", ["dense-square", "low-rank-identity", "diagonal"])
def test_bad_arguments_say_so(name: str) -> None:
    A = zoo.build(name)
    with pytest.raises(ValueError, match="ord must be"):
        A.norm("inf")
    with pytest.raises(TypeError, match="must be a whole number"):
        A**0.5  # type: ignore[operator]
    for question in (lambda B: B**2, lambda B: B.eig(), lambda B: B.inverse()):
        with pytest.raises(ValueError, match="needs a square A; this one is 5 x 9"):
            question(zoo.build("dense-wide"))
