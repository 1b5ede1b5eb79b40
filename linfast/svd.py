"""The singular value decomposition of a Linearizer, in data space.

    f(x) = (+)_i  s_i <x, v_i>_x (.) u_i ,   v_i = g_x^{-1}(right_i),   u_i = g_y^{-1}(left_i)

The v_i are orthonormal in the x side's induced space and the u_i in the y side's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_count
from .operators.base import LatentOperator
from .operators.low_rank import LowRank
from .operators.spectral import SVD
from .space import decode_latents

__all__ = ["LinearizerSVD"]


class LinearizerSVD:
    """Singular values S [k], and singular vectors ``left`` [k, *shape_y] and ``right`` [k, *shape_x].

    Unpacks as ``left, S, right``. ``operator`` is the latent SVD it comes from, with
    its ``rest``: the value of every singular value that is not in S. ``build(g_x, A, g_y)``
    makes a Linearizer.
    """

    def __init__(
        self,
        g_x: nn.Module,
        operator: SVD,
        g_y: nn.Module,
        build: Callable[[nn.Module, LatentOperator, nn.Module], Any],
    ) -> None:
        self.g_x, self.g_y = g_x, g_y
        self.operator = operator
        self._build = build

    @property
    def S(self) -> Tensor:
        return self.operator.S

    @property
    def left(self) -> Tensor:
        """u_i = g_y^{-1}(U[:, i])."""
        return decode_latents(self.g_y, self.operator.U.mT.contiguous(), {})

    @property
    def right(self) -> Tensor:
        """v_i = g_x^{-1}(Vh[i])."""
        return decode_latents(self.g_x, self.operator.Vh.contiguous(), {})

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.left, self.S, self.right))

    def linearizer(self, rank: int | None = None) -> Any:
        """The Linearizer rebuilt; with ``rank``, the nearest one of that rank in the induced spaces.

        Raises:
            ValueError: a negative rank; one that would keep some of the values that equal ``rest``, not all.
        """
        return self._build(self.g_x, self._operator(rank), self.g_y)

    def _operator(self, rank: int | None) -> LatentOperator:
        U, S, Vh = self.operator
        rest = self.operator.rest
        if rank is None:  # U diag(S) Vh + rest (I - U U^T)
            only = isinstance(rest, float) and rest == 0.0
            return LowRank(rest, U, Vh.mT * S if only else Vh.mT * S - rest * U)
        rank = check_count("rank", rank, least=0)
        size = float(torch.as_tensor(rest, dtype=S.dtype).detach().abs())
        if size and (rank > S.shape[-1] or bool((S[:rank] < size).any())):
            raise ValueError(
                f"rank {rank} would keep some of the singular values that all equal {size:.3g} and have "
                "no preferred vectors"
            )
        return LowRank(0.0, U[:, :rank] * S[:rank], Vh[:rank].mT)
