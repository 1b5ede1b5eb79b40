"""The low-rank product with one pair of factors a sample: through the N x N matrix, and in the right order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from linfast.ops import low_rank

from ..harness import Case, Cost, Options, Problem, Provider, Size
from .common import BACKWARD, Source, cost, inputs, providers, run, sweep

__all__ = ["CASE"]


def build(size: Size, options: Options) -> Problem:
    """Forward and backward of y = x V U^T, as (y, dx, dU, dV).

    "materialised" is the arithmetic of the reference repository's LoRA layer: A = V U^T [B, N, N],
    y = x A; it is the baseline where its matrices fit.
    """
    source = Source(options, size)
    batch, n, rank = (int(size[key]) for key in ("batch", "N", "r"))
    shapes = ((batch, n), (batch, n, rank), (batch, n, rank), (batch, n))
    call = run(BACKWARD)
    drawn = inputs(lambda: tuple(source.normal(*shape) for shape in shapes), options)
    rivals = providers(low_rank, options, call)
    if batch * n * n <= _MOST_MATERIALISED:
        rivals = [Provider("materialised", call(_materialised), baseline=True), *map(_as_rival, rivals)]
    return Problem(inputs=drawn, truth=_in_order, reference=_in_order, providers=rivals, cost=_cost(drawn[0], rank))


def _as_rival(provider: Provider) -> Provider:
    return replace(provider, baseline=False)


def _cost(arguments: tuple[Tensor, ...], rank: int) -> Cost:
    return cost(BACKWARD, arguments[:3], [arguments[0]], 4 * arguments[0].numel() * rank)


def _materialised(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return torch.bmm(x[:, None], torch.bmm(V, U.mT))[:, 0]


def _in_order(x: Tensor, U: Tensor, V: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The four outputs by their formulas: no autograd, no op of ours."""
    t, s = torch.einsum("bn,bnr->br", x, V), torch.einsum("bn,bnr->br", v, U)
    y, dx = torch.einsum("br,bnr->bn", t, U), torch.einsum("br,bnr->bn", s, V)
    return y, dx, torch.einsum("bn,br->bnr", v, t), torch.einsum("bn,br->bnr", x, s)


_MOST_MATERIALISED = 2**29  # elements of the B matrices: 2 GiB in fp32, a few times over
_BASE: Size = {"N": 1024, "r": 8, "batch": 64}
CASE = Case(
    "low_rank",
    build,
    sizes={
        "tiny": [{"N": 12, "r": 2, "batch": 3}],
        "quick": [{"N": 512, "r": 8, "batch": 16}],
        "gpu": [{"N": 1024, "r": 8, "batch": 256}, {"N": 12288, "r": 8, "batch": 128}],
        "full": [
            *sweep(_BASE, batch=(16, 64, 256, 1024, 4096), N=(256, 1024, 4096), r=(2, 8, 32, 64)),
            {"N": 12288, "r": 8, "batch": 2},
        ],
    },
)
