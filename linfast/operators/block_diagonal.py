"""BlockDiagonal: one m x m matrix a channel; what algebra on DepthwiseConv ends in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor
from .base import Leaf, hold
from .diagonal import Diagonal
from .spectral import SVD, Eig, matrix_inverse

__all__ = ["BlockDiagonal"]


class BlockDiagonal(Leaf):
    """A = diag(block_1, ..., block_C) on z [B, C m]; blocks [C, m, m]."""

    blocks: Tensor

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        check_tensor("blocks", blocks)
        if blocks.ndim != 3 or blocks.shape[-1] != blocks.shape[-2]:
            raise ValueError(f"blocks must be [C, m, m]; got {tuple(blocks.shape)}")
        self.n_out = self.n_in = blocks.shape[0] * blocks.shape[1]
        hold(self, "blocks", blocks)

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        blocks = self.blocks.mT if transpose else self.blocks
        per_block = z.reshape(z.shape[0], *blocks.shape[:2])
        return torch.einsum("cij,bcj->bci", blocks, per_block).reshape(z.shape)

    def to_dense(self) -> Tensor:
        return torch.block_diag(*self.blocks)

    def _transposed(self) -> Leaf:
        return BlockDiagonal(self.blocks.mT)

    def _scaled(self, factor: float | Tensor) -> Leaf:
        return BlockDiagonal(factor * self.blocks)

    def _plus(self, other: Leaf) -> Leaf | None:
        blocks = self._blocks_of(other)
        return None if blocks is None else BlockDiagonal(self.blocks + blocks)

    def _times(self, other: Leaf) -> Leaf | None:
        blocks = self._blocks_of(other)
        return None if blocks is None else BlockDiagonal(self.blocks @ blocks)

    def _power(self, n: int) -> Leaf:
        return BlockDiagonal(torch.linalg.matrix_power(self.blocks, n))

    def _inverse(self, read: bool) -> Leaf:
        return BlockDiagonal(matrix_inverse(self.blocks, "blocks of A", read))

    def _pinv(self, rtol: float | None) -> Leaf:
        S = torch.linalg.svdvals(self.blocks.detach())
        eps = torch.finfo(S.dtype).eps
        limit = S.max() * (self.n_in * eps if rtol is None else rtol)
        return BlockDiagonal(torch.linalg.pinv(self.blocks, atol=limit, rtol=torch.zeros_like(limit)))

    def _svd(self) -> SVD:
        U, S, Vh = torch.linalg.svd(self.blocks)
        S, order = S.flatten().sort(descending=True)
        return SVD(torch.block_diag(*U)[:, order], S, torch.block_diag(*Vh)[order])

    def _values(self) -> tuple[Tensor, float | Tensor]:
        return torch.linalg.svdvals(self.blocks).flatten().sort(descending=True).values, 0.0

    def _eig(self) -> Eig:
        values, vectors = torch.linalg.eig(self.blocks)
        return Eig(values.flatten(), torch.block_diag(*vectors))

    def _blocks_of(self, other: Leaf) -> Tensor | None:
        """The other operator in blocks of this one's size; None where it has no such blocks."""
        if isinstance(other, BlockDiagonal) and other.blocks.shape == self.blocks.shape:
            return other.blocks
        if isinstance(other, Diagonal) and not other.batched and other.n == self.n_in:
            return torch.diag_embed(other.diagonal.reshape(self.blocks.shape[:2]))
        return None
