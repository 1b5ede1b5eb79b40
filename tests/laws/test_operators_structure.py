"""The algebra keeps structure: closed operations keep their kind, and LowRank never forms an n x n matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import linfast as lf
from linfast.operators import BlockDiagonal, LatentOperator
from linfast.operators.base import Product, Scaled, Sum, Transposed
from tests.laws import operators_zoo as zoo
from tests.laws.zoo import relative
from tests.seeds import seeded

LARGE = 4096


class NothingAsLargeAs(TorchDispatchMode):
    """Raises when an operation creates a tensor of this many elements or more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() >= self.limit:
                raise AssertionError(f"{func} made {tuple(leaf.shape)}")
        return result


def _large(alpha: float | Tensor, *batch: int, n_in: int = LARGE) -> lf.LowRank:
    generator = torch.Generator().manual_seed(seeded(0))
    factors = [torch.randn(*batch, n, 3, generator=generator) / n**0.5 for n in (LARGE, n_in)]
    return lf.LowRank(alpha, *factors)


LARGE_OPERATORS: dict[str, Callable[[], lf.LowRank]] = {
    "alpha": lambda: _large(0.7),
    "alpha-tensor": lambda: _large(nn.Parameter(torch.tensor(0.7))),
    "zero": lambda: _large(0.0),
    "zero-rectangular": lambda: _large(0.0, n_in=LARGE // 2 + 1),
    "batched": lambda: _large(0.7, 2),
}
APPLIED: dict[str, Callable[[LatentOperator], object]] = {
    "apply": lambda A: A(torch.ones(2, A.n_in)),
    "transpose": lambda A: A.T(torch.ones(2, A.n_out)),
    "product": lambda A: (A.T @ A).closed(),
    "sum": lambda A: (A + 2 * A - A).closed(),
    "pinv": lambda A: A.pinv()(torch.ones(2, A.n_out)),
    "svd": lambda A: A.svd(),
    "norms": lambda A: [A.norm(ord) for ord in (2, "fro", "nuc")],
    "rank": lambda A: A.rank(),
}
SQUARE_ONLY: dict[str, Callable[[LatentOperator], object]] = {
    "power": lambda A: (A**50)(torch.ones(2, A.n_in)),
    "power 0": lambda A: (A**0)(torch.ones(2, A.n_in)),
    "eig": lambda A: A.eig(),
}
INVERTIBLE_ONLY: dict[str, Callable[[LatentOperator], object]] = {
    "inverse": lambda A: A.inverse()(torch.ones(2, A.n_in)),
    "product inverse": lambda A: (A @ A.T).inverse()(torch.ones(2, A.n_in)),
    "negative power": lambda A: (A**-3)(torch.ones(2, A.n_in)),
}


@pytest.mark.parametrize("name", LARGE_OPERATORS)
def test_low_rank_never_makes_an_n_by_n_matrix(name: str) -> None:
    A = LARGE_OPERATORS[name]()
    asked = dict(APPLIED)
    if A.n_out == A.n_in:
        asked |= SQUARE_ONLY
    if name.startswith(("alpha", "batched")):
        asked |= INVERTIBLE_ONLY
    for question in asked.values():
        with NothingAsLargeAs(A.n_out * A.n_in):
            question(A)


def test_the_watch_sees_an_n_by_n_matrix() -> None:
    with NothingAsLargeAs(100 * 100), pytest.raises(AssertionError, match=r"made \(100, 100\)"):
        lf.LowRank(1.0, torch.ones(100, 1), torch.ones(100, 1)).to_dense()


def low_rank(
    alpha: float | Tensor, n: int = 12, r: int = 2, n_in: int | None = None, batch: Any = ()
) -> lf.LowRank:
    return zoo.low_rank(alpha, n, r, n_in, batch)


B = (zoo.BATCH,)
# what -> (make, rank of the LowRank that it stays)
STAYS_LOW_RANK: dict[str, tuple[Callable[[], LatentOperator], int]] = {
    "transpose": (lambda: low_rank(1.3).T, 2),
    "scaled": (lambda: 3 * low_rank(1.3), 2),
    "scaled by a tensor": (lambda: torch.tensor(3.0) * low_rank(0.0, n_in=9), 2),
    "sum": (lambda: low_rank(1.3) + low_rank(0.2, r=3), 5),
    "product": (lambda: low_rank(1.3) @ low_rank(0.2, r=3), 5),
    "batched product": (lambda: low_rank(1.3, batch=B) @ low_rank(0.2, r=3, batch=B), 5),
    "product with alpha 0": (lambda: low_rank(1.3) @ low_rank(0.0, r=3), 3),
    "product of alpha 0": (lambda: low_rank(0.0, r=3) @ low_rank(1.3), 3),
    "products of alpha 0": (lambda: low_rank(0.0, r=3) @ low_rank(0.0, r=2), 2),
    "alpha 0 with dense": (lambda: low_rank(0.0) @ zoo.dense(12, 5), 2),
    "dense with alpha 0": (lambda: zoo.dense(5, 12) @ low_rank(0.0), 2),
    "conv with alpha 0": (lambda: zoo.conv(1, 2, (3, 4)) @ low_rank(0.0), 2),
    "diagonal with alpha 0": (lambda: zoo.diagonal(*range(1, 13)) @ low_rank(0.0), 2),
    "batched rectangles": (lambda: low_rank(0.0, 7, 2, 9, B) @ low_rank(0.0, 9, 3, 5, B), 2),
    "power": (lambda: low_rank(1.3) ** 7, 2),
    "power 0": (lambda: low_rank(1.3) ** 0, 2),
    "power with alpha 0": (lambda: low_rank(0.0) ** 7, 2),
    "batched power": (lambda: low_rank(0.9, batch=B) ** 7, 2),
    "negative power": (lambda: low_rank(1.3) ** -2, 2),
    "inverse": (lambda: low_rank(1.3).inverse(), 2),
    "inverse of the transpose": (lambda: low_rank(1.3).T.inverse(), 2),
    "inverse of a product": (lambda: (low_rank(1.3) @ low_rank(0.8)).inverse(), 4),
    "batched inverse": (lambda: low_rank(1.3, batch=B).inverse(), 2),
    "pinv": (lambda: low_rank(1.3).pinv(), 4),
    "pinv with alpha 0": (lambda: low_rank(0.0, n_in=9).pinv(), 2),
}


@pytest.mark.parametrize("what", STAYS_LOW_RANK)
def test_low_rank_stays_low_rank(what: str) -> None:
    make, rank = STAYS_LOW_RANK[what]
    A = make()
    closed = A.closed()
    assert type(closed) is lf.LowRank
    assert closed.U.shape[-1] == rank
    assert relative(closed.to_dense(), A.to_dense()) <= zoo.bound(A, torch.float64)


STAYS: dict[str, tuple[Callable[[], LatentOperator], type]] = {
    "diagonal product": (lambda: (zoo.diagonal(1, 2, 3) @ zoo.diagonal(1, -2, 3)).closed(), lf.Diagonal),
    "diagonal sum": (lambda: (zoo.diagonal(1, 2, 3) + 2 * zoo.diagonal(1, -2, 3).T).closed(), lf.Diagonal),
    "diagonal inverse": (lambda: zoo.diagonal(1, -2, 3).inverse(), lf.Diagonal),
    "diagonal pinv": (lambda: zoo.diagonal(1, 0, 3).pinv(), lf.Diagonal),
    "diagonal power": (lambda: zoo.diagonal(1, -2, 3) ** 3, lf.Diagonal),
    "projection": (lambda: (lf.Projection(3).double() @ zoo.diagonal(1, 2, 3)).closed(), lf.Diagonal),
    "projection power": (lambda: lf.Projection(3) ** 4, lf.Diagonal),
    "conv transpose": (lambda: zoo.conv(2, 2, (3, 3)).T.closed(), lf.DepthwiseConv),
    "conv sum": (lambda: (zoo.conv(2, 3, (3, 3)) - 2 * zoo.conv(2, 3, (3, 3))).closed(), lf.DepthwiseConv),
    "conv sum of sizes": (lambda: (zoo.conv(2, 3, (3, 3)) + zoo.conv(2, 2, (3, 3))).closed(), BlockDiagonal),
    "conv product": (lambda: (zoo.conv(2, 3, (3, 3)) @ zoo.conv(2, 2, (3, 3))).closed(), BlockDiagonal),
    "conv inverse": (lambda: zoo.conv(2, 3, (3, 3)).inverse(), BlockDiagonal),
    "conv pinv": (lambda: zoo.conv(2, 3, (3, 3)).pinv(), BlockDiagonal),
    "conv power": (lambda: zoo.conv(2, 3, (3, 3)) ** 3, BlockDiagonal),
    "conv and blocks": (
        lambda: (zoo.blocks(3, 3) @ zoo.conv(2, 2, (1, 3)) @ zoo.blocks(3, 3)).closed(),
        BlockDiagonal,
    ),
    "conv and diagonal": (lambda: (zoo.diagonal(1, 2, 3, 4) @ zoo.conv(2, 2, (1, 2))).closed(), BlockDiagonal),
    "blocks and diagonal": (lambda: (zoo.diagonal(*range(6)) + zoo.blocks(3, 3)).closed(), BlockDiagonal),
    "blocks of other sizes": (lambda: (zoo.blocks(3, 3) @ zoo.blocks(2, 2, 2, size=2)).closed(), lf.Dense),
}


@pytest.mark.parametrize("what", STAYS)
def test_closure_keeps_the_kind(what: str) -> None:
    make, kind = STAYS[what]
    assert type(make()) is kind


def test_views_stay_lazy() -> None:
    A, D = low_rank(1.3), zoo.dense(12, 12)
    assert type(A @ D) is Product
    assert type(A + D) is Sum
    assert type(2 * D) is Scaled
    assert type(D.T) is Transposed
    assert D.T.T is D


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_without_closed_structure_has_an_inverse_that_is_a_product(transposed: bool) -> None:
    product = low_rank(1.3) @ zoo.diagonal(*range(1, 13))
    A = product.T if transposed else product
    inverse = A.inverse()
    assert type(inverse) is Product
    assert {type(part) for part in inverse.parts()} == {lf.LowRank, lf.Diagonal}
    z = zoo.batch(12, torch.float64)
    assert relative(inverse(A(z)), z) <= zoo.bound(A, torch.float64, zoo.condition(A))


def test_products_of_a_trained_alpha_keep_its_gradient() -> None:
    alpha = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    A = low_rank(alpha) @ low_rank(1.3)
    A.closed().to_dense().sum().backward()
    assert alpha.grad is not None
    assert float(alpha.grad.abs()) > 0.1


def test_a_factor_and_an_alpha_of_another_dtype_are_accepted() -> None:
    A = lf.LowRank(torch.tensor(0.5), zoo.batch(5, torch.float64).mT, zoo.batch(5, torch.float64).mT)
    z = zoo.batch(5, torch.float64)
    assert relative((torch.tensor(2.0) * A)(z), 2 * A(z)) <= 1e-15


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "alpha of a rectangle": (
        lambda: lf.LowRank(1.0, torch.ones(3, 1), torch.ones(4, 1)),
        "alpha must be 0 for a 3 x 4",
    ),
    "alpha a vector": (lambda: lf.LowRank(torch.ones(3), torch.ones(3, 1), torch.ones(3, 1)), "0-d"),
    "ranks": (lambda: lf.LowRank(0.0, torch.ones(3, 1), torch.ones(4, 2)), r"got \(3, 1\) and \(4, 2\)"),
    "dtypes": (lambda: lf.LowRank(0.0, torch.ones(3, 1), torch.ones(3, 1).double()), "one dtype"),
    "dense": (lambda: lf.Dense(3, 4, torch.ones(4, 3)), r"\[3, 4\].*got \(4, 3\)"),
    "diagonal": (lambda: lf.Diagonal(3, torch.ones(4)), r"\[3\].*got \(4,\)"),
    "conv": (
        lambda: lf.DepthwiseConv(2, 3, (4, 4), torch.ones(2, 3, 2)),
        r"\[2, 3, 3\] for these channels and kernel_size; got \(2, 3, 2\)",
    ),
    "blocks": (lambda: BlockDiagonal(torch.ones(2, 3, 4)), r"\[C, m, m\]; got \(2, 3, 4\)"),
    "integers": (lambda: lf.Diagonal.of(torch.arange(3)), "diagonal must be floating point; got torch.int64"),
    "size": (lambda: lf.Dense(-1), "n_out must be at least 0; got -1"),
    "dtypes of a product": (lambda: (lf.Dense(3) @ lf.Dense(3).double())(torch.ones(1, 3)), "z is torch.float32"),
    "devices of factors": (
        lambda: lf.LowRank(0.0, torch.ones(3, 1), torch.ones(3, 1, device="meta")),
        "V is on meta and U on cpu",
    ),
    "batch of diagonals": (lambda: lf.Diagonal(3, torch.ones(4, 3))(torch.ones(1, 3)), "4 diagonals for 1 rows"),
    "batch of factors": (lambda: low_rank(0.5, batch=B)(torch.ones(2, 12).double()), r"or \[2, N, r\] for x"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_says_so(what: str) -> None:
    make, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        make()


WRONG_KIND: dict[str, tuple[Callable[[], object], str]] = {
    "matrix for a size": (lambda: lf.Dense(torch.ones(2, 2)), r"Dense.of\(...\) takes the tensor"),
    "diagonal for a size": (lambda: lf.Diagonal(torch.ones(2)), r"Diagonal.of\(...\) takes the tensor"),
    "order": (lambda: lf.LowRank(torch.ones(3, 1), torch.ones(3, 1), 0.5), "V must be a tensor; got 0.5"),
    "alpha": (lambda: lf.LowRank("a", torch.ones(3, 1), torch.ones(3, 1)), "alpha.*got 'a'"),
}


@pytest.mark.parametrize("what", WRONG_KIND)
def test_an_argument_of_the_wrong_kind_says_so(what: str) -> None:
    make, message = WRONG_KIND[what]
    with pytest.raises(TypeError, match=message):
        make()


def test_division_by_a_tensor_says_how() -> None:
    with pytest.raises(TypeError, match="divided by a number"):
        lf.Dense(3) / torch.tensor(2.0)  # type: ignore[operator]
