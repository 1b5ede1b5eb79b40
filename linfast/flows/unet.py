"""UNet: a convolutional conditioner that sees the whole image, with a time and a context.

The encoder goes from the finest level to the coarsest. Each level is a 3 x 3 convolution to ``width``
channels (the first level) or a block that halves the image, then ``blocks`` residual blocks. The
decoder goes back. Each level is two blocks (the coarsest level; the first block with attention) or a
block that doubles the image, then ``blocks`` + 1 blocks, which also read the matching output of the
encoder. Last come group norm, SiLU and a 3 x 3 convolution that starts at zero.

Source: the DDPM++ network of EDM (Karras et al., arXiv 2206.00364); with the defaults, the
conditioners of the Linearizer paper's image models (arXiv 2510.08570).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..checks import check_count, check_counts, check_flag, check_number
from ..conditioning import SinusoidalEmbedding, check_context, check_time_features, joined, time_rows
from ..dispatch import autocast_dtype
from ..freeze import derived
from ..nets import check_input
from .unet_blocks import ResidualBlock, conv3x3, in_nchw, norm, start


class UNet(nn.Module):
    """[B, C_in, H, W] (+ time, + context) -> [B, C_out, H, W].

    A network of three linear layers maps [embedded t | context] to the biases of the blocks' first convolutions.
    It runs once where all samples share both (t is a number or 0-d, and the context [1, n]); a t [B] or a context
    [B, n] costs one more addition per block. Second derivatives of its attention are computed by torch's plain
    operations.

    Args:
        channels_in, channels_out: C_in and C_out.
        resolution: H = W of the expected images; it decides which levels have attention.
        width: channels at the first level; a multiple of 4.
        channel_mult: channels of each level, in units of ``width``.
        blocks: residual blocks per level.
        attention_resolutions: levels of these resolutions have self-attention.
        dropout: probability; in training only.
        time_features: size of the sinusoidal embedding of ``t``; 0 for none.
        nchw_dropout: draw dropout masks in the order of contiguous NCHW images, so that a seed
            gives the masks that it gives in a network without channels_last. It is slower on a
            GPU; on a CPU masks are always drawn in this order.
        context_features: size n of a ``context`` [B, n], or [1, n] for all samples; 0 for none.

    Raises:
        ValueError: a width that does not divide into equal groups; x that is not [B, C_in, H, W] or
            cannot be halved often enough; t or context is missing, of another shape, or given to a network
            without an input for it.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        resolution: int,
        width: int = 16,
        channel_mult: Sequence[int] = (1, 1),
        blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        time_features: int = 0,
        nchw_dropout: bool = False,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.channels_in = channels_in = check_count("channels_in", channels_in)
        self.channels_out = channels_out = check_count("channels_out", channels_out)
        self.resolution = check_count("resolution", resolution)
        self.width, self.blocks = (width := check_count("width", width)), check_count("blocks", blocks)
        self.channel_mult = check_counts("channel_mult", channel_mult)
        self.attention_resolutions = check_counts("attention_resolutions", attention_resolutions)
        self.dropout = check_number("dropout", dropout, 0.0, 1.0, below=True)
        self.time_features, self.nchw_dropout = check_time_features(time_features), nchw_dropout
        check_flag("nchw_dropout", nchw_dropout)
        self.context_features = check_count("context_features", context_features, least=0)
        given = self.time_features + self.context_features
        if not self.channel_mult:
            raise ValueError("channel_mult must hold a level; got none")

        levels = [
            (width * multiple, self.resolution >> level in self.attention_resolutions)
            for level, multiple in enumerate(self.channel_mult)
        ]
        self.stem = conv3x3(channels_in, width)
        self.encoder, outputs = self._encoder_of(levels)
        self.decoder = self._decoder_of(levels, outputs)
        # Which blocks read an encoder's output: all but the two in the middle and those that resample.
        self._joins = [i >= 2 and block.resample is None for i, block in enumerate(self.decoder)]
        self.norm = norm(levels[0][0])
        self.head = conv3x3(levels[0][0], channels_out, zero=True)
        self._shift_sizes = [block.conv0.out_channels for block in (*self.encoder, *self.decoder)]
        self.embedding = SinusoidalEmbedding(time_features) if time_features else None
        self.time = _shift_network(given, 4 * width, sum(self._shift_sizes)) if given else None
        self._apply(lambda parameter: parameter)  # sets the weights' memory format

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UNet:
        """Weights that move to a device get the memory format that activations have there."""

        def laid_out(parameter: Tensor) -> Tensor:
            moved = fn(parameter)
            return moved.contiguous(memory_format=_layout(moved.is_cpu)) if moved.ndim == 4 else moved

        return super()._apply(laid_out, recurse)

    def _encoder_of(self, levels: Sequence[tuple[int, bool]]) -> tuple[nn.ModuleList, list[int]]:
        """The blocks of levels (channels, whether they have attention), and the channels of each output."""
        blocks, outputs = (
            nn.ModuleList(),
            [self.width],
        )  # made one at a time, so that blocks = 10^9 fails early
        for level, (channels, attends) in enumerate(levels):
            if level:
                blocks.append(self._block(outputs[-1], outputs[-1], "down"))
                outputs.append(outputs[-1])
            for _ in range(self.blocks):
                blocks.append(self._block(outputs[-1], channels, attention=attends))
                outputs.append(channels)
        return blocks, outputs

    def _decoder_of(self, levels: Sequence[tuple[int, bool]], outputs: list[int]) -> nn.ModuleList:
        current = outputs[-1]
        blocks = nn.ModuleList([self._block(current, current, attention=True), self._block(current, current)])
        for level, (channels, attends) in reversed(list(enumerate(levels))):
            if level < len(levels) - 1:
                blocks.append(self._block(current, current, "up"))
            for i in range(self.blocks + 1):
                last = i == self.blocks
                blocks.append(self._block(current + outputs.pop(), channels, attention=attends and last))
                current = channels
        return blocks

    def _block(self, n_in: int, n_out: int, resample: str | None = None, attention: bool = False) -> ResidualBlock:
        bias = not self.time_features and not self.context_features
        return ResidualBlock(n_in, n_out, resample, attention, self.dropout, self.nchw_dropout, bias)

    def forward(self, x: Tensor, t: float | Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The network's output [B, C_out, H, W] for x [B, C_in, H, W]."""
        self._check(x)
        shifts = self._shifts(x, t, context)
        x = self.stem(x.contiguous(memory_format=_layout(in_nchw(x))))
        outputs = [x]
        for block, shift in zip(self.encoder, shifts, strict=False):
            x = block(x, shift)
            outputs.append(x)
        for block, joins, shift in zip(self.decoder, self._joins, shifts[len(self.encoder) :], strict=True):
            x = block(torch.cat((x, outputs.pop()), dim=1) if joins else x, shift)
        return self.head(self.norm(x))

    def _shifts(self, x: Tensor, t: float | Tensor | None, context: Tensor | None) -> Sequence[Tensor | None]:
        """For each block, the bias of its first convolution, [C] or [B, C]; None where it has its own."""
        check_context("UNet", context, x, self.context_features)
        times = time_rows(t, x, self.embedding is not None, "UNet")
        network = self.time
        if network is None:
            return [None] * len(self._shift_sizes)

        def compute() -> Tensor:
            return network(joined(self.embedding, times, context, x.shape[0]))

        key = ("shifts", t, autocast_dtype(x.device.type))
        rows = derived(self, key, compute) if context is None and not isinstance(t, Tensor) else compute()
        per_sample = rows.shape[0] != 1 or (isinstance(t, Tensor) and t.ndim == 1)
        if context is not None and torch.jit.is_tracing():  # the program must be right for a context of each sample
            rows, per_sample = rows.expand(x.shape[0], -1), True
        return (rows if per_sample else rows[0]).split(self._shift_sizes, dim=-1)

    def _check(self, x: Tensor) -> None:
        check_input("UNet", x, (self.stem,))
        factor = 2 ** (len(self.channel_mult) - 1)
        sides = x.shape[2:]
        if x.ndim != 4 or x.shape[1] != self.channels_in or any(side % factor or not side for side in sides):
            raise ValueError(
                f"UNet: x must be [B, {self.channels_in}, H, W] with H and W multiples of {factor}; "
                f"got {tuple(x.shape)}"
            )


def _layout(nchw: bool) -> torch.memory_format:
    return torch.contiguous_format if nchw else torch.channels_last


def _shift_network(features: int, hidden: int, n_out: int) -> nn.Sequential:
    """[embedded t | context] [K, features] -> the biases of all blocks [K, n_out]."""
    layers = [nn.Linear(features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, n_out)]
    for layer in layers:
        start(layer, 1.0)
    # The Identity stands where the embedding of t was, so that the layers' names in files stay the same.
    return nn.Sequential(nn.Identity(), layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
