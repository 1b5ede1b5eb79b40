"""TimeDepthwiseConv: a depthwise convolution whose kernels are generated from an embedded time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_counts, check_time
from ..flows.conditioners import MLP, SinusoidalEmbedding, check_time_features
from .base import LatentOperator, Leaf
from .depthwise_conv import DepthwiseConv, check_pair

__all__ = ["TimeDepthwiseConv"]


class TimeDepthwiseConv(LatentOperator):
    """A_t z = depthwise correlation of z [B, C, H, W] with kernels [C, k, k] that an MLP makes of t.

    ``A_t.at(t)`` is a DepthwiseConv for a number, a 0-d or a [B] tensor; ``A_t(z, t=t)`` applies
    it. The kernels start near a unit impulse. Source: style transfer in arXiv 2510.08570, whose t
    is the index of a style.

    Args:
        channels: C.
        kernel_size: k.
        size: (H, W) of the latents.
        time_features: size of the sinusoidal embedding of t.
        hidden: widths of the generator's hidden layers.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        size: tuple[int, int],
        time_features: int = 64,
        hidden: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        self.channels = channels = check_count("channels", channels)
        self.kernel_size = kernel_size = check_count("kernel_size", kernel_size)
        self.size = check_pair("size", size)
        self.n_out = self.n_in = channels * self.size[0] * self.size[1]
        self.time_features = check_time_features(time_features, least=4)
        self.hidden = check_counts("hidden", hidden)
        self.embedding = SinusoidalEmbedding(time_features)
        self.net = MLP(time_features, channels * kernel_size**2, self.hidden, "gelu", zero_last=False)
        with torch.no_grad():
            impulse = self.net.layers[-1].bias.view(channels, kernel_size, kernel_size)  # type: ignore[operator]
            impulse[:, (kernel_size - 1) // 2, (kernel_size - 1) // 2] += 1.0

    @property
    def time_dependent(self) -> bool:
        return True

    def to_dense(self) -> Tensor:
        return self.closed().to_dense()

    def closed(self) -> Leaf:
        raise ValueError("TimeDepthwiseConv depends on time: its algebra is that of A.at(t)")

    def at(self, t: float | Tensor) -> DepthwiseConv:
        like: Any = self.net.layers[-1].weight
        check_time(t, like)
        times = t.to(like) if isinstance(t, Tensor) else torch.full((), t, dtype=like.dtype, device=like.device)
        shape = (*times.shape, self.channels, self.kernel_size, self.kernel_size)
        weight = self.net(self.embedding(times.reshape(-1))).to(like.dtype).reshape(shape)
        return DepthwiseConv(self.channels, self.kernel_size, self.size, weight)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kernel_size={self.kernel_size}, size={self.size}"
