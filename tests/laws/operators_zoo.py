"""Every operator that the laws check. A new operator gets an entry here, and the whole suite applies to it.

Numbers are Parameters drawn in float64 and then cast. ``smooth`` says whether the rank,
and so the pseudo-inverse, depends smoothly on the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import linfast as lf
from linfast.operators import BlockDiagonal, LatentOperator
from tests.seeds import seeded

BATCH = 4
DTYPES = (torch.float64, torch.float32)
Make = Callable[[], LatentOperator]


class Case(NamedTuple):
    make: Make
    smooth: bool = True


def parameter(*shape: int, std: float = 1.0) -> nn.Parameter:
    return nn.Parameter(std * torch.randn(*shape, dtype=torch.float64))


def dense(*shape: int, shift: float = 1.5) -> lf.Dense:
    """A random matrix, well conditioned: shift I plus entries of variance 1 / n_in."""
    weight = torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5
    return lf.Dense.of(nn.Parameter(weight + shift * torch.eye(*shape[-2:], dtype=torch.float64)))


def deficient(n_out: int, n_in: int, rank: int) -> lf.Dense:
    return lf.Dense.of(nn.Parameter(parameter(n_out, rank).data @ parameter(rank, n_in).data))


def diagonal(*values: float) -> lf.Diagonal:
    return lf.Diagonal.of(nn.Parameter(torch.tensor(values, dtype=torch.float64)))


def batched_diagonal(n: int) -> lf.Diagonal:
    return lf.Diagonal.of(nn.Parameter(parameter(BATCH, n).data.sign() * (1 + parameter(BATCH, n).data.abs())))


def low_rank(
    alpha: float | Tensor, n: int, r: int, n_in: int | None = None, batch: tuple[int, ...] = ()
) -> lf.LowRank:
    n_in = n if n_in is None else n_in
    return lf.LowRank(alpha, parameter(*batch, n, r, std=n**-0.5), parameter(*batch, n_in, r, std=n_in**-0.5))


def singular_low_rank(n: int, r: int) -> lf.LowRank:
    """alpha I + U V^T with one eigenvalue alpha + v_1^T u_1 = 0, built in float64."""
    alpha, U, V = 0.7, parameter(n, r, std=0.4), parameter(n, r, std=0.4)
    with torch.no_grad():
        U[:, 1:] -= V[:, :1] * (V[:, :1].mT @ U[:, 1:]) / V[:, 0].square().sum()
        U[:, 0] *= -alpha / (V[:, 0] @ U[:, 0])
    return lf.LowRank(alpha, U, V)


def symmetric_low_rank(n: int, r: int) -> lf.LowRank:
    """alpha I + U U^T: the columns of [U V] are dependent."""
    U = parameter(n, r, std=n**-0.5)
    return lf.LowRank(1.0, U, U)


def conv(channels: int, kernel: int | tuple[int, int], size: tuple[int, int]) -> lf.DepthwiseConv:
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = parameter(channels, *kernel, std=0.15)
    weight.data[:, (kernel[0] - 1) // 2, (kernel[1] - 1) // 2] += 1.0
    return lf.DepthwiseConv(channels, kernel, size, weight)


def blocks(*ranks: int, size: int = 3) -> BlockDiagonal:
    return BlockDiagonal(nn.Parameter(torch.stack([deficient(size, size, rank).weight.data for rank in ranks])))


def timed(alpha: float, n: int = 8, rank: int = 2) -> lf.TimeLowRank:
    return lf.TimeLowRank(n, rank, alpha, time_features=8, hidden=16).double()


def times() -> Tensor:
    return torch.linspace(0.0, 0.9, BATCH, dtype=torch.float64)


# fmt: off
LEAVES: dict[str, Case] = {
    "dense-square": Case(lambda: dense(8, 8)),
    "dense-wide": Case(lambda: dense(5, 9)),
    "dense-tall": Case(lambda: dense(9, 5)),
    "dense-deficient": Case(lambda: deficient(8, 8, 3), smooth=False),
    "dense-tall-deficient": Case(lambda: deficient(9, 6, 2), smooth=False),
    "dense-batched": Case(lambda: dense(BATCH, 6, 6)),
    "dense-batched-wide": Case(lambda: dense(BATCH, 4, 6)),
    "diagonal": Case(lambda: diagonal(1.5, -0.7, 2.0, -3.0, 0.4)),
    "diagonal-singular": Case(lambda: diagonal(1.5, 0.0, -2.0, 0.0), smooth=False),
    "diagonal-batched": Case(lambda: batched_diagonal(5)),
    "low-rank-identity": Case(lambda: low_rank(1.3, 12, 3)),
    "low-rank-negative": Case(lambda: low_rank(-2, 12, 2)),
    "low-rank-tensor-alpha": Case(lambda: low_rank(nn.Parameter(torch.tensor(1.3, dtype=torch.float64)), 10, 2)),
    "low-rank-zero": Case(lambda: low_rank(0.0, 12, 3)),
    "low-rank-zero-tensor": Case(lambda: low_rank(torch.tensor(0.0, dtype=torch.float64), 10, 2)),
    "low-rank-zero-wide": Case(lambda: low_rank(0.0, 7, 3, 11)),
    "low-rank-zero-tall": Case(lambda: low_rank(0, 11, 2, 7)),
    "low-rank-empty": Case(lambda: low_rank(1.3, 6, 0)),
    "low-rank-nothing": Case(lambda: low_rank(0.0, 6, 0)),
    "low-rank-large": Case(lambda: low_rank(1.3, 10, 7)),
    "low-rank-overfull": Case(lambda: low_rank(0.0, 6, 8)),
    "low-rank-small-alpha-overfull": Case(lambda: low_rank(1e-12, 6, 8)),
    "low-rank-singular": Case(lambda: singular_low_rank(12, 2), smooth=False),
    "low-rank-symmetric": Case(lambda: symmetric_low_rank(12, 3), smooth=False),
    "low-rank-batched": Case(lambda: low_rank(1.3, 9, 2, batch=(BATCH,))),
    "low-rank-batched-wide": Case(lambda: low_rank(0.0, 7, 2, 11, batch=(BATCH,))),
    "projection": Case(lambda: lf.Projection(7, 3).double(), smooth=False),
    "conv-odd": Case(lambda: conv(2, 3, (3, 4))),
    "conv-even": Case(lambda: conv(2, 2, (3, 3))),
    "conv-mixed": Case(lambda: conv(1, (4, 3), (4, 3))),
    "conv-larger-than-image": Case(lambda: conv(2, 5, (2, 3))),
    "blocks": Case(lambda: blocks(3, 3)),
    "blocks-singular": Case(lambda: blocks(3, 1, 2), smooth=False),
    "time": Case(lambda: timed(1.0).at(0.3)),
    "time-zero-alpha": Case(lambda: timed(0.0).at(0.3)),
    "time-batched": Case(lambda: timed(1.0).at(times())),
    "time-zero-alpha-batched": Case(lambda: timed(0.0).at(times())),
}
COMPOSITES: dict[str, Case] = {
    "transpose": Case(lambda: dense(5, 9).T),
    "transpose-conv": Case(lambda: conv(2, 2, (3, 3)).T),
    "transpose-low-rank": Case(lambda: low_rank(0.0, 7, 2, 11).T),
    "product-dense": Case(lambda: dense(6, 6) @ dense(6, 6)),
    "product-chain": Case(lambda: dense(4, 7) @ dense(7, 5)),
    "product-mixed": Case(lambda: low_rank(1.3, 9, 2) @ diagonal(*range(1, 10))),
    "product-low-rank": Case(lambda: low_rank(1.3, 20, 2) @ low_rank(1.5, 20, 3)),
    "product-low-rank-zero": Case(lambda: low_rank(1.3, 9, 2) @ low_rank(0.0, 9, 3, 7)),
    "product-low-rank-dense": Case(lambda: low_rank(0.0, 9, 2) @ dense(9, 6)),
    "product-dense-low-rank": Case(lambda: dense(6, 9) @ low_rank(0.0, 9, 2, 8)),
    "product-conv": Case(lambda: conv(2, 3, (3, 3)) @ conv(2, 2, (3, 3))),
    "product-conv-diagonal": Case(lambda: conv(1, 2, (2, 3)) @ diagonal(1.0, -2.0, 0.5, 1.5, 3.0, -1.0)),
    "product-batched": Case(lambda: low_rank(1.3, 9, 2, batch=(BATCH,)) @ low_rank(1.5, 9, 2, batch=(BATCH,))),
    "product-batched-wide": Case(
        lambda: low_rank(1.3, 7, 2, batch=(BATCH,)) @ low_rank(0.0, 7, 2, 11, batch=(BATCH,))
    ),
    "product-batched-shared": Case(lambda: timed(1.0).at(times()) @ dense(8, 8)),
    "sum-dense": Case(lambda: dense(6, 6) + diagonal(*range(1, 7))),
    "sum-low-rank": Case(lambda: low_rank(1.3, 20, 2) + low_rank(0.5, 20, 2)),
    "sum-conv": Case(lambda: conv(2, 3, (3, 3)) + conv(2, 3, (3, 3))),
    "sum-conv-sizes": Case(lambda: conv(1, 3, (3, 2)) + conv(1, 2, (3, 2))),
    "sum-conv-diagonal": Case(lambda: diagonal(1.0, 2.0, 3.0, 1.5) + conv(1, 2, (2, 2))),
    "sum-batched-shared": Case(lambda: batched_diagonal(8) + timed(1.0).at(0.3)),
    "difference": Case(lambda: dense(6, 6, shift=4.0) - low_rank(1.0, 6, 1)),
    "scaled": Case(lambda: -2.5 * dense(5, 7)),
    "scaled-parameter": Case(lambda: low_rank(0.0, 7, 2, 9) * nn.Parameter(torch.tensor(1.5))),
    "scaled-conv": Case(lambda: conv(2, 2, (3, 2)) / 3),
    "negated": Case(lambda: -low_rank(1.3, 9, 2)),
    "nested": Case(lambda: 2.0 * (dense(6, 8) @ dense(6, 8).T) + diagonal(*range(1, 7)).T),
    "nested-transpose": Case(lambda: ((dense(5, 8) @ low_rank(1.3, 8, 2)) * 0.5).T),
    "nested-singular": Case(
        lambda: (lf.Projection(6).double() @ dense(6, 6)).T @ diagonal(*range(1, 7)), smooth=False
    ),
}
# fmt: on
OPERATORS = {**LEAVES, **COMPOSITES}


def build(name: str, dtype: torch.dtype = torch.float64) -> LatentOperator:
    """The named operator, with the same numbers at each call, cast to this dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(1))
        return OPERATORS[name].make().to(dtype)


def batch(n: int, dtype: torch.dtype, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seeded(seed))
    return torch.randn(BATCH, n, generator=generator, dtype=torch.float64).to(dtype)


def matrix(A: LatentOperator) -> Tensor:
    """A's matrix, detached, in float64: the truth."""
    return A.to_dense().detach().double()


def condition(A: LatentOperator) -> float:
    """Largest over smallest nonzero singular value, the largest in a batch; 1 for A = 0."""
    S = torch.linalg.svdvals(matrix(A))
    S = S / S.amax(-1, keepdim=True).clamp(min=1e-300)
    kept = S[S > 1e-5]
    return 1.0 / float(kept.min()) if kept.numel() else 1.0


def bound(A: LatentOperator, dtype: torch.dtype, amplification: float = 1.0) -> float:
    """8 n epsilon times the conditioning: n epsilon bounds n-term sums, and factorisations err more."""
    return 8 * max(A.n_out, A.n_in) * torch.finfo(dtype).eps * amplification


def distance(value: Tensor, truth: Tensor, size: Tensor | float) -> float:
    """|value - truth| / size."""
    gap = float((value.detach().double() - truth.detach().double()).norm())
    return gap / max(float(size), 1e-300) if gap else 0.0


def is_batched(A: LatentOperator) -> bool:
    return A.to_dense().ndim == 3


def is_square(A: LatentOperator) -> bool:
    return A.n_out == A.n_in


def is_invertible(A: LatentOperator) -> bool:
    return is_square(A) and bool((torch.linalg.matrix_rank(matrix(A)) == A.n_in).all())


SQUARE = [name for name in OPERATORS if is_square(build(name))]
INVERTIBLE = [name for name in SQUARE if is_invertible(build(name))]
RECTANGULAR = [name for name in OPERATORS if name not in SQUARE]
SINGULAR = [name for name in SQUARE if name not in INVERTIBLE]
TRAINED = [name for name in OPERATORS if any(p.numel() for p in build(name).parameters())]
SMOOTH = [name for name in TRAINED if OPERATORS[name].smooth]
