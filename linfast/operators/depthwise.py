"""DepthwiseConv: one k x k zero-padded "same" correlation per channel. BlockDiagonal: one m x m matrix per channel.

A DepthwiseConv is block diagonal over channels, with blocks of H W x H W. Its products, inverses and decompositions
form these blocks, which are C (H W)^2 numbers: use them for small images only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count, check_counts, check_tensor
from ..ops.depthwise_conv import depthwise_conv
from .base import hold
from .dense import Leaf
from .diagonal import Diagonal
from .spectral import SVD, Eig, matrix_inverse


class BlockDiagonal(Leaf):
    """A = diag(block_1, ..., block_C) on z [B, C m]; blocks [C, m, m], trained where they are a Parameter."""

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

    def _pinv(self, rtol: float) -> Leaf:
        limit = rtol * torch.linalg.svdvals(self.blocks.detach()).max()
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
        """The other operator as blocks [C, m, m] of this one's size; None where it has no such blocks."""
        other = other._blocks() if isinstance(other, DepthwiseConv) else other
        if isinstance(other, BlockDiagonal) and other.blocks.shape == self.blocks.shape:
            return other.blocks
        if isinstance(other, Diagonal) and not other.batched and other.n == self.n_in:
            return torch.diag_embed(other.diagonal.reshape(self.blocks.shape[:2]))
        return None


class DepthwiseConv(Leaf):
    """A z = depthwise correlation of z [B, C, H, W] (or flat [B, C H W]) with ``weight``.

    Args:
        channels: C.
        kernel_size: k, or (kh, kw).
        size: (H, W) of the latents.
        weight: [C, kh, kw], or one set per sample [B, C, kh, kw]. A Parameter is trained, any other tensor
            is a constant; by default a Parameter that starts as unit impulses plus noise.
    """

    weight: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        size: tuple[int, int],
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        channels = check_count("channels", channels)
        one = not isinstance(kernel_size, (tuple, list))
        kernel = (check_count("kernel_size", kernel_size),) * 2 if one else check_pair("kernel_size", kernel_size)
        self.channels, self.kernel_size, self.size = channels, kernel, check_pair("size", size)
        self.n_out = self.n_in = channels * self.size[0] * self.size[1]
        if weight is None:
            start = torch.randn(channels, *kernel) * (0.1 / (kernel[0] * kernel[1]))
            start[:, (kernel[0] - 1) // 2, (kernel[1] - 1) // 2] += 1.0
            weight = nn.Parameter(start)
        check_tensor("weight", weight)
        if weight.ndim not in (3, 4) or tuple(weight.shape[-3:]) != (channels, *kernel):
            raise ValueError(
                f"weight must be [{channels}, {kernel[0]}, {kernel[1]}] for these channels and kernel_size; "
                f"got {tuple(weight.shape)}"
            )
        hold(self, "weight", weight)

    @property
    def batched(self) -> bool:
        return self.weight.ndim == 4

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        image = z.reshape(z.shape[0], self.channels, *self.size)
        return depthwise_conv(image, self.weight, transpose=transpose).reshape(z.shape)

    def _blocks(self) -> BlockDiagonal:
        """The H W x H W matrix of each channel; its columns are the correlations of unit impulses."""
        if self.batched:
            raise ValueError("a DepthwiseConv with one kernel set per sample cannot be converted to a matrix")
        H, W = self.size
        impulses = torch.eye(H * W, dtype=self.weight.dtype, device=self.weight.device).reshape(-1, 1, H, W)
        columns = depthwise_conv(impulses.expand(-1, self.channels, -1, -1), self.weight)
        return BlockDiagonal(columns.reshape(H * W, self.channels, H * W).permute(1, 2, 0))

    def to_dense(self) -> Tensor:
        return self._blocks().to_dense()

    def _with(self, weight: Tensor) -> DepthwiseConv:
        return DepthwiseConv(self.channels, (weight.shape[-2], weight.shape[-1]), self.size, weight)

    def _transposed(self) -> Leaf:
        """The kernel flipped; an even size gains a row or column of zeros, because its padding is not symmetric."""
        flipped = self.weight.flip((-2, -1))
        grow_h, grow_w = (1 - k % 2 for k in self.kernel_size)
        return self._with(F.pad(flipped, (0, grow_w, 0, grow_h)) if grow_h or grow_w else flipped)

    def _scaled(self, factor: float | Tensor) -> Leaf:
        return self._with(factor * self.weight)

    def _plus(self, other: Leaf) -> Leaf | None:
        if isinstance(other, DepthwiseConv) and (other.size, other.kernel_size) == (self.size, self.kernel_size):
            return self._with(self.weight + other.weight)
        return self._blocks()._plus(other) if isinstance(other, _BLOCKED) else None

    def _times(self, other: Leaf) -> Leaf | None:
        return self._blocks()._times(other) if isinstance(other, _BLOCKED) else None

    def _general(self) -> Leaf:
        return self._blocks()


_BLOCKED = (DepthwiseConv, BlockDiagonal, Diagonal)  # what a sum or product with blocks is formed for


def check_pair(name: str, value: object) -> tuple[int, int]:
    """The value as (height, width), two positive integers; TypeError or ValueError for anything else."""
    height, width = check_counts(name, value, length=2)
    return height, width
