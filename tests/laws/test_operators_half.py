"""Decompositions of operators in half precision are computed in fp32 and returned in the operator's dtype."""

from __future__ import annotations

import pytest
import torch

import linfast as lf
from linfast.operators import BlockDiagonal, LatentOperator

from .operators_zoo import blocks, conv, dense, diagonal, low_rank, timed

HALF = [torch.float16, torch.bfloat16]
MAKE = {
    "dense": lambda: dense(6, 6),
    "diagonal": lambda: diagonal(1.5, -0.7, 2.0),
    "low rank": lambda: low_rank(1.3, 12, 3),
    "wide low rank": lambda: low_rank(1.3, 6, 5),
    "conv": lambda: conv(2, 3, (3, 2)),
    "blocks": lambda: BlockDiagonal(blocks(3, 3).blocks.detach() + 3 * torch.eye(3)),
    "time": lambda: timed(1.0).half().at(0.3),
    "product": lambda: dense(5, 5) @ diagonal(1.0, 2.0, 0.5, 1.5, 3.0),
    "product kept apart": lambda: conv(1, 3, (2, 2)) @ dense(4, 4),
    "sum": lambda: dense(5, 5) + low_rank(1.0, 5, 1),
}


def made(name: str, dtype: torch.dtype) -> tuple[LatentOperator, LatentOperator]:
    """The operator in half precision, and the same numbers in float64."""
    torch.manual_seed(0)
    narrow = MAKE[name]().to(dtype)
    torch.manual_seed(0)
    wide = MAKE[name]().double()
    wide.load_state_dict({k: v.double() for k, v in narrow.state_dict().items()})
    return narrow, wide


def near(value: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    error = (value.detach().double() - truth.detach()).norm() / truth.detach().norm()
    assert float(error) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_inverses_and_decompositions(name: str, dtype: torch.dtype) -> None:
    narrow, wide = made(name, dtype)
    for what in (LatentOperator.inverse, lambda A: A.pinv(rtol=1e-3), LatentOperator.svd):
        got = what(narrow).to_dense()
        assert got.dtype == dtype
        near(got, what(wide).to_dense(), dtype)
    for what in (2, "fro", "nuc"):
        near(narrow.norm(what), wide.norm(what), dtype)
    values, vectors = narrow.eig()
    image = narrow.to_dense().to(vectors.dtype) @ vectors
    assert float((image - vectors * values).detach().abs().max()) < 64 * torch.finfo(dtype).eps * float(
        wide.norm().detach()
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_cutoff_is_that_of_the_operators_dtype(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    A = lf.Diagonal.of(torch.tensor([1.0, 1.5 * eps, 1.0], dtype=dtype))
    assert int(A.rank()) == int(lf.Dense.of(A.to_dense()).rank()) == 2
    assert int(A.rank(rtol=eps)) == 3
    assert float(lf.Dense.of(A.to_dense()).pinv().to_dense()[1, 1]) == 0.0


def test_gradients_reach_the_numbers() -> None:
    A = lf.Dense.of(torch.nn.Parameter(dense(4, 4).weight.detach().half()))
    A.inverse()(torch.ones(2, 4).half()).sum().backward()
    assert A.weight.grad is not None
    assert A.weight.grad.dtype == torch.float16
    wide = A.weight.detach().double().requires_grad_()
    (torch.ones(2, 4).double() @ torch.linalg.inv(wide).mT).sum().backward()
    near(A.weight.grad, wide.grad, torch.float16)


def test_a_half_precision_linearizer_has_its_inverse() -> None:
    f = lf.Linearizer(lf.coupling_flow(4, 2, (5,)), lf.Dense(4)).half()
    x = torch.randn(3, 4).half()
    near(f.inverse(f(x)), x.double(), torch.float16)
