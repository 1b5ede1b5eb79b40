"""Latent product: one A for all rows, and a bank of K operators of which each row picks one."""

from __future__ import annotations

import torch
from torch import Tensor

from linfast.ops import latent_matmul

from ..harness import Case, Options, Problem, Provider, Size
from .common import BACKWARD, FORWARD, Source, cost, inputs, providers, run, sweep

__all__ = ["CASE"]


def _gathered(z: Tensor, A: Tensor, index: Tensor) -> Tensor:
    """The usual way to write a bank: an [B, N, N] copy of the operators that rows pick."""
    return torch.bmm(A[index], z[:, :, None])[:, :, 0]


def build(size: Size, options: Options) -> Problem:
    """y, or with the backward (y, dz, dA). K = 0: one A, which is cuBLAS or MKL whoever calls it."""
    source, direction = Source(options, size), str(size["direction"])
    batch, n, bank = (int(size[key]) for key in ("batch", "N", "K"))

    def make() -> tuple[Tensor, ...]:
        z = source.normal(batch, n)
        arguments: tuple[Tensor, ...] = (z, source.normal(n, n) if bank == 0 else source.normal(bank, n, n))
        arguments = arguments if bank == 0 else (*arguments, source.below(bank, batch))
        return (*arguments, source.normal(batch, n)) if direction == BACKWARD else arguments

    call, drawn = run(direction), inputs(make, options)
    rivals = providers(latent_matmul, options, call)
    gathers = bank > 0 and batch * n * n <= _MOST_GATHERED
    return Problem(
        inputs=drawn,
        truth=call(latent_matmul),
        reference=call(latent_matmul),
        providers=[*rivals, *([Provider("gather + bmm", call(_gathered))] if gathers else [])],
        cost=cost(direction, drawn[0][:2], [drawn[0][0]], 2 * batch * n * n),
    )


_MOST_GATHERED = 2**28  # elements: 1 GiB in fp32
_ONE: Size = {"direction": FORWARD, "dtype": "float32", "K": 0, "N": 64, "batch": 4096}
_BANK: Size = {**_ONE, "K": 8, "batch": 1024}
CASE = Case(
    "latent_matmul",
    build,
    sizes={
        "tiny": [{"direction": BACKWARD, "dtype": "float32", "K": 3, "N": 8, "batch": 5}],
        "quick": [_ONE, _BANK],
        "gpu": [
            {**_ONE, "N": 1024, "batch": 16384},
            *sweep({**_BANK, "N": 256, "batch": 4096}, K=(8, 64)),
            {**_BANK, "N": 256, "batch": 4096, "direction": BACKWARD},
        ],
        "full": [
            *sweep(_ONE, batch=[2**k for k in range(6, 21, 2)], N=(64, 256, 1024)),
            *sweep(_BANK, batch=[2**k for k in range(6, 17, 2)], N=(64, 256, 1024), K=(2, 8, 64)),
            *sweep({**_BANK, "direction": BACKWARD}, K=(2, 8, 64)),
        ],
    },
)
