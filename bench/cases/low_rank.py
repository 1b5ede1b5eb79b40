"""The low-rank product with one pair of factors a sample: through the N x N matrix, and in the right order."""

from __future__ import annotations

import torch
from torch import Tensor

from linfast.ops import low_rank

from ..harness import Case, Options, Problem, Provider, Size

__all__ = ["CASE"]

N_INPUTS = 3  # a prime other than the number of providers: each gets every input

Outputs = tuple[Tensor, ...]


def build(size: Size, options: Options) -> Problem:
    """Forward and backward of y = x V U^T, as (y, dx, dU, dV), for standard normal numbers.

    "materialised" is the arithmetic of the reference repository's LoRA layer: A = V U^T [B, N, N], y = x A.
    """
    batch, n, rank = (int(size[key]) for key in ("batch", "N", "r"))
    shapes = ((batch, n), (batch, n, rank), (batch, n, rank), (batch, n))
    generator = torch.Generator().manual_seed(0)
    return Problem(
        inputs=[
            tuple(torch.randn(shape, generator=generator).to(options.device) for shape in shapes)
            for _ in range(N_INPUTS)
        ],
        truth=_in_order,
        reference=_in_order,
        providers=[Provider("materialised", _materialised, baseline=True), Provider("low_rank", _low_rank)],
    )


def _materialised(x: Tensor, U: Tensor, V: Tensor, v: Tensor) -> Outputs:
    x, U, V = (t.detach().requires_grad_() for t in (x, U, V))
    A = torch.bmm(V, U.mT)
    return _with_gradients(torch.bmm(x[:, None], A)[:, 0], x, U, V, v)


def _low_rank(x: Tensor, U: Tensor, V: Tensor, v: Tensor) -> Outputs:
    x, U, V = (t.detach().requires_grad_() for t in (x, U, V))
    return _with_gradients(low_rank(x, U, V), x, U, V, v)


def _with_gradients(y: Tensor, x: Tensor, U: Tensor, V: Tensor, v: Tensor) -> Outputs:
    return (y.detach(), *torch.autograd.grad(y, (x, U, V), v))


def _in_order(x: Tensor, U: Tensor, V: Tensor, v: Tensor) -> Outputs:
    """The four outputs by their formulas: no autograd, no op of ours."""
    t, s = torch.einsum("bn,bnr->br", x, V), torch.einsum("bn,bnr->br", v, U)
    y, dx = torch.einsum("br,bnr->bn", t, U), torch.einsum("br,bnr->bn", s, V)
    return y, dx, torch.einsum("bn,br->bnr", v, t), torch.einsum("bn,br->bnr", x, s)


# Not under --quick: the matrices of the first size are 1 GiB, those of the second 1.1, and a call takes seconds.
SIZES: list[Size] = [{"N": 1024, "batch": 256, "r": 8}, {"N": 12288, "batch": 2, "r": 8}]
CASE = Case("low_rank", sizes=SIZES, quick=[], build=build)
