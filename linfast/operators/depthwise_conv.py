"""DepthwiseConv: one k x k zero-padded "same" correlation a channel.

It is block diagonal over channels with blocks of H W x H W, so products and inverses
of it are BlockDiagonal: C (H W)^2 numbers. Apply it at any size; ask for its svd or
inverse at small ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count, check_counts, check_tensor
from ..ops.depthwise_conv import depthwise_conv
from .base import Leaf, hold
from .block_diagonal import BlockDiagonal
from .diagonal import Diagonal
from .spectral import SVD, Eig

__all__ = ["DepthwiseConv"]


class DepthwiseConv(Leaf):
    """A z = depthwise correlation of z [B, C, H, W] (or flat [B, C H W]) with ``weight``.

    Args:
        channels: C.
        kernel_size: k; the kernel starts as a unit impulse plus noise.
        size: (H, W) of the latents.
        weight: [C, kh, kw], or one set a sample [B, C, kh, kw]; a Parameter is trained,
            any other tensor is a constant.
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
        kernel = (
            check_pair("kernel_size", kernel_size)
            if isinstance(kernel_size, (tuple, list))
            else (check_count("kernel_size", kernel_size),) * 2
        )
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
        """Per channel, the H W x H W matrix: unit impulses through the channel's kernel."""
        if self.batched:
            raise ValueError("the matrix of a DepthwiseConv with one kernel set a sample is not formed")
        H, W = self.size
        impulses = torch.eye(H * W, dtype=self.weight.dtype, device=self.weight.device).reshape(-1, 1, H, W)
        columns = depthwise_conv(impulses.expand(-1, self.channels, -1, -1), self.weight)
        return BlockDiagonal(columns.reshape(H * W, self.channels, H * W).permute(1, 2, 0))

    def to_dense(self) -> Tensor:
        return self._blocks().to_dense()

    def _with(self, weight: Tensor) -> DepthwiseConv:
        return DepthwiseConv(self.channels, (weight.shape[-2], weight.shape[-1]), self.size, weight)

    def _transposed(self) -> Leaf:
        """Flipped kernel; an even k gains a row and a column of zeros, as its padding is not symmetric."""
        flipped = self.weight.flip((-2, -1))
        grow_h, grow_w = (1 - k % 2 for k in self.kernel_size)
        return self._with(F.pad(flipped, (0, grow_w, 0, grow_h)) if grow_h or grow_w else flipped)

    def _scaled(self, factor: float | Tensor) -> Leaf:
        return self._with(factor * self.weight)

    def _plus(self, other: Leaf) -> Leaf | None:
        if not isinstance(other, (DepthwiseConv, BlockDiagonal, Diagonal)):
            return None
        if isinstance(other, DepthwiseConv):
            if (other.size, other.weight.shape[-3:]) == (self.size, self.weight.shape[-3:]):
                return self._with(self.weight + other.weight)
            other = other._blocks()
        return self._blocks()._plus(other)

    def _times(self, other: Leaf) -> Leaf | None:
        if not isinstance(other, (DepthwiseConv, BlockDiagonal, Diagonal)):
            return None
        return self._blocks()._times(other._blocks() if isinstance(other, DepthwiseConv) else other)

    def _power(self, n: int) -> Leaf:
        return self._blocks()._power(n)

    def _inverse(self, read: bool) -> Leaf:
        return self._blocks()._inverse(read)

    def _pinv(self, rtol: float | None) -> Leaf:
        return self._blocks()._pinv(rtol)

    def _svd(self) -> SVD:
        return self._blocks()._svd()

    def _values(self) -> tuple[Tensor, float | Tensor]:
        return self._blocks()._values()

    def _eig(self) -> Eig:
        return self._blocks()._eig()


def check_pair(name: str, value: object) -> tuple[int, int]:
    """(height, width) of positive integers; raises where it is anything else."""
    height, width = check_counts(name, value, length=2)
    return height, width
