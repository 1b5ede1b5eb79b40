"""Operators and their algebra against dense matrices in float64.

A recipe is a tree: a leaf, or a transpose, product, sum, difference or multiple of trees. Its matrix follows from
the leaves' definitions by plain matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import linfast as lf
from linfast.operators import BlockDiagonal, LatentOperator

from .drawing import DTYPES, LAYOUTS, drawn, generator, laid_out, moved, perturbed, recipe, seeds
from .judge import NO_BUDGET, VISIBLE, Judge, Truth, truth_of

__all__ = ["OPERATORS", "RECIPES", "build", "check", "matrix"]

_SQUARE = (
    "dense",
    "diagonal",
    "low_rank",
    "conv",
    "blocks",
    "projection",
    "time_low_rank",
    "time_diagonal",
    "time_conv",
)
_ANY = ("dense", "low_rank_zero")
_JOINS = ("sum", "difference", "product", "scaled", "scaled by a tensor", "transpose", "negated", "divided")


@st.composite
def _tree(draw: Any, n_out: int, n_in: int, depth: int, batched: bool) -> tuple[Any, ...]:
    """(kind, n_out, n_in, *parts)."""
    join = draw(st.sampled_from(("leaf", "leaf", *_JOINS))) if depth else "leaf"
    if join == "leaf":
        kind = draw(st.sampled_from(_SQUARE + _ANY if n_out == n_in else _ANY))
        return (kind, n_out, n_in, draw(st.integers(0, 3)), batched and draw(st.booleans()), draw(seeds))
    if join == "transpose":
        return (join, n_out, n_in, draw(_tree(n_in, n_out, depth - 1, batched)))
    if join in ("scaled", "divided", "scaled by a tensor"):
        factor = draw(st.sampled_from([1.5, -0.5, 3.0, -2.0]))
        return (join, n_out, n_in, draw(_tree(n_out, n_in, depth - 1, batched)), factor)
    if join == "negated":
        return (join, n_out, n_in, draw(_tree(n_out, n_in, depth - 1, batched)))
    if join == "product":
        middle = draw(st.sampled_from([n_out, n_in, 4]))
        return (
            join,
            n_out,
            n_in,
            *(draw(_tree(*s, depth - 1, batched)) for s in ((n_out, middle), (middle, n_in))),
        )
    return (join, n_out, n_in, *(draw(_tree(n_out, n_in, depth - 1, batched)) for _ in range(2)))


@st.composite
def _trees(draw: Any) -> tuple[Any, ...]:
    n = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 9, 12, 17, 33]))
    n_in = draw(st.sampled_from([n, n, n, 1, 4, 7]))
    return draw(_tree(n, n_in, draw(st.integers(0, 3)), draw(st.booleans())))


OPERATORS = _trees()
RECIPES = recipe(
    tree=OPERATORS,
    dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
    batch=st.sampled_from([1, 2, 3, 5, 0]),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([1.0, 1.0, 1e-20, 1e15]),
    power=st.integers(-2, 4),
    rtol=st.sampled_from([None, None, 1e-2]),
    seed=seeds,
)


def build(tree: tuple[Any, ...], batch: int) -> LatentOperator:
    """The operator in float64, with values that float32 can represent."""
    kind, n, n_in, *rest = tree
    if kind in ("sum", "difference", "product"):
        a, b = (build(part, batch) for part in rest)
        return a + b if kind == "sum" else a - b if kind == "difference" else a @ b
    if kind in ("scaled", "divided", "scaled by a tensor", "transpose", "negated"):
        A = build(rest[0], batch)
        if kind == "scaled by a tensor":
            return A * nn.Parameter(torch.tensor(rest[1], dtype=torch.float64))
        return A.T if kind == "transpose" else -A if kind == "negated" else (
            rest[1] * A if kind == "scaled" else A / rest[1]
        )  # fmt: skip
    rank, batched, seed = rest
    return _leaf(kind, n, n_in, rank, (batch,) if batched and batch else (), seed)


def _factors(n: int) -> tuple[int, int, int]:
    """(channels, height, width) of an image of n numbers."""
    height = next(h for h in (3, 2, 1) if n % h == 0)
    width = next(w for w in (4, 3, 2, 1) if n // height % w == 0)
    return n // height // width, height, width


def _leaf(kind: str, n: int, n_in: int, rank: int, batch: tuple[int, ...], seed: int) -> LatentOperator:
    torch.manual_seed(seed)
    if kind == "dense":
        weight = drawn(seed, *batch, n, n_in) / n_in**0.5 + 1.5 * torch.eye(n, n_in, dtype=torch.float64)
        return lf.Dense.of(_parameter(weight, seed))
    if kind == "diagonal":
        values = drawn(seed, *batch, n)
        return lf.Diagonal.of(_parameter(values.sign() * (0.5 + values.abs()), seed))
    if kind in ("low_rank", "low_rank_zero"):
        alpha = 0.0 if kind == "low_rank_zero" else (1.25, -0.75, 0.5)[seed % 3]
        if kind == "low_rank" and seed % 5 == 0:
            alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float64))
        U, V = drawn(seed, *batch, n, rank), drawn(seed + 1, *batch, n_in, rank)
        return lf.LowRank(alpha, _parameter(U / n**0.5, seed), _parameter(V / n_in**0.5, seed))
    channels, height, width = _factors(n)
    if kind == "conv":
        k = (1 + seed % 3, 1 + seed // 3 % 3)
        weight = drawn(seed, *batch, channels, *k) * 0.15
        weight[..., (k[0] - 1) // 2, (k[1] - 1) // 2] += 1.0
        return lf.DepthwiseConv(channels, k, (height, width), _parameter(weight, seed))
    if kind == "blocks":
        return BlockDiagonal(
            _parameter(drawn(seed, height, n // height, n // height) + torch.eye(n // height), seed)
        )
    if kind == "projection":
        return lf.Projection(n, min(rank, n)).double()
    times = torch.rand(batch, dtype=torch.float64) if batch else 0.25
    if kind == "time_low_rank":
        A_t: Any = lf.TimeLowRank(n, max(rank, 1), (0.0, 1.0)[seed % 2], 4, 5)
    elif kind == "time_diagonal":
        A_t = lf.TimeDiagonal(n, min(max(rank, 1), n), 1.0, 4, 5)
    else:
        A_t = lf.TimeDepthwiseConv(channels, 2, (height, width), 4, (5,))
    A = perturbed(A_t, seed, 0.02).at(times)  # type: ignore[operator]
    for name, tensor in list(A.named_buffers()):
        setattr(A, name, tensor.detach())  # torch does not copy modules whose tensors have a graph
    return A  # type: ignore[no-any-return]


def _parameter(value: Tensor, seed: int) -> Tensor:
    value = value.float().double()
    return nn.Parameter(value) if seed % 2 else value


def matrix(A: LatentOperator, size: float = 0.0, random: Any = None) -> Tensor:
    """A's matrix by its definition, in float64, with every number changed by ``size``, relative."""

    def held(t: Any) -> Any:
        return moved(t.double(), size, random) if isinstance(t, Tensor) else t

    name = type(A).__name__
    if name == "Transposed":
        return matrix(A.operator, size, random).mT
    if name == "Scaled":
        return held(A.factor) * matrix(A.operator, size, random)
    if name in ("Sum", "Product"):
        a, b = (matrix(part, size, random) for part in A.parts())
        return a + b if name == "Sum" else a @ b
    if name == "Dense":
        return held(A.weight)
    if name == "Diagonal":
        return torch.diag_embed(held(A.diagonal))
    if name == "Projection":
        return torch.diag((A.logits.double() > 0).double()) + 0 * held(A.logits).diag()
    if name == "LowRank":
        dense = held(A.U) @ held(A.V).mT
        return dense + held(A.alpha) * torch.eye(A.n_out, A.n_in, dtype=torch.float64)
    if name == "BlockDiagonal":
        return torch.block_diag(*held(A.blocks))
    if name == "DepthwiseConv":
        return _correlation(held(A.weight), A.channels, A.size)
    raise TypeError(name)


def _correlation(weight: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """The matrix of a "same" correlation, pixel by pixel."""
    (H, W), (kh, kw) = size, weight.shape[-2:]
    n = H * W
    dense = weight.new_zeros(*weight.shape[:-3], channels * n, channels * n)
    for y in range(H):
        for x in range(W):
            for i in range(kh):
                for j in range(kw):
                    v, u = y + i - (kh - 1) // 2, x + j - (kw - 1) // 2
                    if 0 <= v < H and 0 <= u < W:
                        for c in range(channels):
                            dense[..., c * n + y * W + x, c * n + v * W + u] = weight[..., c, i, j]
    return dense


def check(judge: Judge, drawn_: dict[str, Any]) -> None:
    batch, dtype = drawn_["batch"], DTYPES[drawn_["dtype"]]
    A = build(drawn_["tree"], batch).to(dtype)
    if A.n_in > 40 or A.n_out > 40:
        return
    z = laid_out(drawn(drawn_["seed"], batch, A.n_in, scale=drawn_["scale"]).to(dtype), drawn_["layout"])
    if _is_batched_conv(A):
        return _convolved(judge, A, z)
    w = drawn(drawn_["seed"] + 9, batch, A.n_out).to(dtype)
    M, random = matrix(A).detach(), generator(3)
    eps = torch.finfo(dtype).eps

    def truth(of: Any) -> Truth:
        return truth_of(lambda size: of(matrix(A, size, random).detach()), eps)

    def applied(M: Tensor, v: Tensor) -> Tensor:
        return (M @ v.detach().double()[..., None])[..., 0]

    dense = truth(lambda M: M)
    judge.near("A.to_dense", A.to_dense(), dense, A.to_dense)
    judge.near("A.closed.to_dense", A.closed().to_dense(), dense, lambda: A.closed().to_dense())
    judge.near("A.T.to_dense", A.T.to_dense(), truth(lambda M: M.mT), A.T.to_dense)
    image = truth(lambda M: applied(M, z))
    judge.near("A(z)", A(z), image, lambda: A(z))
    judge.near("A.closed()(z)", A.closed()(z), image, lambda: A.closed()(z))
    judge.near("A.T(w)", A.T(w), truth(lambda M: applied(M.mT, w)), lambda: A.T(w))
    judge.near("A.closed().T(w)", A.closed().T(w), truth(lambda M: applied(M.mT, w)), lambda: A.closed().T(w))
    judge.near("(2 A)(z)", (2 * A)(z), truth(lambda M: 2 * applied(M, z)), lambda: (2 * A)(z))
    judge.near("(A.T @ A)(z)", (A.T @ A)(z), truth(lambda M: applied(M.mT @ M, z)), lambda: (A.T @ A)(z))
    if M.ndim == 2 and batch > 1:
        row = slice(1, 2)
        judge.near("A, one row", A(z[row]), image.rows(row), lambda: A(z[row]))
    if batch > 2:
        _spoilt(judge, A, z)
    if drawn_["scale"] == 1.0:
        _gradients(judge, A, z, w, eps)
    _spectral(judge, A, M, truth, drawn_, eps)


def _is_batched_conv(A: LatentOperator) -> bool:
    """Whether it is a batched convolution, or contains one: then no matrix is formed."""
    return any(isinstance(m, lf.DepthwiseConv) and m.weight.ndim == 4 for m in A.modules())


def _convolved(judge: Judge, A: LatentOperator, z: Tensor) -> None:
    def truth(size: float) -> Tensor:
        return (matrix(A, size, generator(3)).detach() @ z.double()[..., None])[..., 0]

    judge.near("A(z) of a batched conv", A(z), truth_of(truth, torch.finfo(z.dtype).eps), lambda: A(z))


def _spoilt(judge: Judge, A: LatentOperator, z: Tensor) -> None:
    spoilt = z.clone(memory_format=torch.contiguous_format)
    spoilt[1] = float("nan")
    keep = [i for i in range(len(z)) if i != 1]
    with torch.no_grad():
        judge.same("A, a row that is not finite", A(spoilt)[keep], A(z.contiguous())[keep])


def _gradients(judge: Judge, A: LatentOperator, z: Tensor, w: Tensor, eps: float) -> None:
    """Gradients of w^T A z with respect to z and every number; the truth is autograd through the dense matrix."""
    if "Projection" in str([type(m).__name__ for m in A.modules()]):
        return  # straight-through
    names = [p for p in A.parameters() if p.requires_grad]
    z = z.detach().clone().requires_grad_()
    if not len(z):
        return

    def mine() -> list[Tensor]:
        found = torch.autograd.grad((A(z) * w).sum(), [z, *names], allow_unused=True)
        return [torch.zeros_like(p) if f is None else f for f, p in zip(found, [z, *names], strict=True)]

    def plain(size: float) -> list[Tensor]:
        random = generator(4)
        wide = z.detach().double().requires_grad_()
        M = matrix(A, size, random)
        total = ((M @ wide[..., None])[..., 0] * w.double()).sum()
        found = torch.autograd.grad(total, [wide, *names], allow_unused=True)
        return [
            torch.zeros_like(p).double() if f is None else f.double()
            for f, p in zip(found, [wide, *names], strict=True)
        ]

    judge.near("gradients of A(z)", mine(), truth_of(plain, eps), mine)


def _spectral(judge: Judge, A: LatentOperator, M: Tensor, truth: Any, drawn_: dict[str, Any], eps: float) -> None:
    """Ranks and inverses only where no singular value lies near the cutoff.

    Errors are relative to the size of the summands of M, since M itself may cancel.
    """
    n = max(M.shape[-2:])
    S = torch.linalg.svdvals(M)
    spread = truth(lambda M: M).wobble[0] / (VISIBLE if eps < NO_BUDGET else eps)
    size = float(S.norm()) + 4 * spread
    unit = 8 * n * eps
    judge.near("A.svd().to_dense", A.svd().to_dense(), Truth([M], [unit * size]))
    for name, which, value in (
        ("norm", 2, S.amax(-1)), ("norm fro", "fro", S.norm(dim=-1)), ("norm nuc", "nuc", S.sum(-1)),
    ):  # fmt: skip
        judge.near(f"A.{name}", A.norm(which), Truth([value], [unit * size * S.shape[-1] ** 0.5]))
    largest = S[..., :1].clamp(min=1e-300)
    rtol = drawn_["rtol"] or n * eps
    relative = S / largest
    noise = 100 * n * eps * size / float(largest.min())
    if bool(((relative > rtol / 50 - noise) & (relative < rtol * 50 + noise)).any() & (noise > rtol / 50)) or bool(
        ((relative > rtol / 50) & (relative < rtol * 50 + noise)).any()
    ):
        return
    rank = (relative > rtol).sum(-1) * (S[..., 0] > 0)
    got = A.rank(drawn_["rtol"])
    judge.holds("A.rank", torch.equal(got, rank), f"{got}, not {rank}")
    kept = S[relative > rtol]
    condition = size / float(kept.min()) if kept.numel() else 1.0
    if unit * condition > (1e-2 if eps < 1e-6 else 10):
        return
    pinv = torch.linalg.pinv(M, rtol=rtol)
    slack = unit * condition**2 * (float(pinv.norm()) + 1 / size if kept.numel() else 0.0)
    judge.near("A.pinv().to_dense", A.pinv(drawn_["rtol"]).to_dense(), Truth([pinv], [slack]))
    if M.shape[-1] != M.shape[-2]:
        return
    full, k = bool((rank == M.shape[-1]).all()), drawn_["power"]
    if full or k >= 0:
        power = torch.linalg.matrix_power(M, k)
        most = unit * (1 + abs(k)) * (size**k if k >= 0 else condition ** (1 - k) * size**k * M.shape[-1])
        judge.near("A ** n", (A**k).to_dense(), Truth([power], [most]))
    if full and drawn_["rtol"] is None:
        judge.near("A.inverse().to_dense", A.inverse().to_dense(), Truth([torch.linalg.inv(M)], [slack]))
        values, V = A.eig()
        off = M.to(V.dtype) @ V - V * values[..., None, :]
        most = 20 * unit * size * max(1.0, float(V.abs().max()) if V.numel() else 1.0)
        worst = float(off.abs().max()) if off.numel() else 0.0
        judge.holds("A.eig", worst <= most, f"A v is not lambda v by {worst:.3g} of {most:.3g}")
