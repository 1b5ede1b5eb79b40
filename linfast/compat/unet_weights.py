"""Converts the research repository's U-Net to linfast's: its blocks' options, and their weights.

``from_reference`` copies the weights into a new UNet. ``accelerate`` converts them at every call, so that
the original parameters can still be trained. Both use ``block_options`` and ``block_weights``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..flows.unet import UNet
from ..flows.unet_blocks import EPS, SKIP_SCALE, ResidualBlock, group_count


class BlockOptions(NamedTuple):
    """The options of ResidualBlock that a UNetBlock is built with."""

    channels_in: int
    channels_out: int
    resample: str | None
    attention: bool
    dropout: float

    def empty(self) -> ResidualBlock:
        """The block on the meta device; its first convolution's bias is part of the time's shift."""
        with torch.device("meta"):
            return ResidualBlock(*self, nchw_dropout=True, bias=False)


def block_options(block: Any) -> BlockOptions:
    """The options of the ResidualBlock that matches this UNetBlock.

    Raises:
        ValueError: it has an option that ResidualBlock does not have.
    """
    norms = [getattr(block, name) for name in ("norm0", "norm1", "norm2") if hasattr(block, name)]
    resampling = [conv for conv in (block.conv0, block.skip) if conv is not None and (conv.up or conv.down)]
    refuse(
        {
            "adaptive scale": block.adaptive_scale,
            "several attention heads": block.num_heads > 1,
            "a skip scale that is not sqrt(1/2)": abs(block.skip_scale - SKIP_SCALE) > 1e-12,
            "a resampling filter that is not [1, 1]": not all(map(_averages, resampling)),
            "resampling without a convolution": block.skip is not None and block.skip.weight is None,
            "other groups or another epsilon in a norm": not all(map(is_standard_norm, norms)),
        }
    )
    resample = "down" if block.conv0.down else "up" if block.conv0.up else None
    return BlockOptions(block.in_channels, block.out_channels, resample, bool(block.num_heads), block.dropout)


def refuse(problems: dict[str, bool]) -> None:
    """Raise ValueError with the problems that are present."""
    if found := [name for name, present in problems.items() if present]:
        raise ValueError(f"the U-Net has what cannot be converted to an lf.UNet: {', '.join(found)}")


def is_standard_norm(norm: Any) -> bool:
    """Whether a GroupNorm has the groups and the epsilon of UNet's."""
    return norm.num_groups == group_count(len(norm.weight)) and norm.eps == EPS


def _averages(conv: Any) -> bool:
    """Whether the convolution resamples with the filter [1, 1], and before it convolves."""
    taps = conv.resample_filter
    return not conv.fused_resample and taps.shape == (1, 1, 2, 2) and bool((taps == 0.25).all())


def block_weights(block: Any) -> dict[str, Tensor]:
    """The state_dict of the ResidualBlock that computes what this block computes, as functions of its weights."""
    last, bias = block.conv1, block.conv1.bias
    weights = {f"norm{i}.{key}": t for i, norm in enumerate((block.norm0, block.norm1)) for key, t in _of(norm)}
    weights["conv0.weight"] = block.conv0.weight
    if block.skip is not None:
        weights["skip.weight"] = SKIP_SCALE * block.skip.weight.flatten(1)
        bias = bias + block.skip.bias
    weights |= {"conv1.weight": SKIP_SCALE * last.weight, "conv1.bias": SKIP_SCALE * bias}
    if block.num_heads:  # the channels of qkv are (channel, which of q, k, v) there, (which, channel) here
        weights |= {f"attention.norm.{key}": t for key, t in _of(block.norm2)}
        weights |= {f"attention.qkv.{key}": _by_kind(t) for key, t in _of(block.qkv)}
        weights |= {f"attention.out.{key}": SKIP_SCALE * t for key, t in _of(block.proj)}
        weights["attention.out.weight"] = weights["attention.out.weight"].flatten(1)
    return weights


def _of(layer: Any) -> tuple[tuple[str, Tensor], ...]:
    return ("weight", layer.weight), ("bias", layer.bias)


def _by_kind(qkv: Tensor) -> Tensor:
    by_kind = qkv.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    return by_kind.flatten(1) if by_kind.ndim > 1 else by_kind


def unet_from_reference(net: Any) -> UNet:
    """The UNet that computes what this SongUNet computes.

    Raises:
        ValueError: it has an option that UNet does not have.
    """
    stem, *encoder = [layer for name, layer in net.enc.items() if "aux" not in name]
    *decoder, norm, head = [layer for name, layer in net.dec.items() if "aux" not in name or name.endswith(_LAST)]
    blocks = [*encoder, *decoder]
    _check_options(net, norm)
    theirs = [block_options(block) for block in blocks]
    result = _architecture(net, stem, head, theirs[: len(encoder)]).to(stem.weight)
    mine = [*result.encoder, *result.decoder]
    if theirs != [_own_options(block) for block in mine]:
        raise ValueError("the SongUNet's blocks are not those of a UNet of its levels, widths and attention")
    _, first, _, second, _, last = result.time  # type: ignore[misc]
    copies = ((result.stem, stem), (result.norm, norm), (result.head, head))
    for own, layer in (*copies, (first, net.map_layer0), (second, net.map_layer1)):
        own.load_state_dict(dict(_of(layer)))
    weight = torch.cat([block.affine.weight for block in blocks])
    bias = torch.cat([block.affine.bias + block.conv0.bias for block in blocks])
    last.load_state_dict({"weight": weight, "bias": bias})
    for own, block in zip(mine, blocks, strict=True):
        own.load_state_dict(block_weights(block))
    return result


_LAST = ("aux_norm", "aux_conv")


def _check_options(net: Any, norm: Any) -> None:
    times = net.map_noise
    refuse(
        {
            "class labels": net.map_label is not None,
            "augmentation labels": net.map_augment is not None,
            "a time embedding that is not positional with its end point": not getattr(times, "endpoint", False)
            or times.max_positions != 10000,
            "skip or residual encoders or decoders": any(
                "aux" in name and not name.endswith(_LAST) for name in (*net.enc, *net.dec)
            ),
            "other groups or another epsilon in its last norm": not is_standard_norm(norm),
        }
    )


def _architecture(net: Any, stem: Any, head: Any, encoder: list[BlockOptions]) -> UNet:
    levels: list[list[BlockOptions]] = [[]]
    for block in encoder:
        if block.resample == "down":
            levels.append([])
        else:
            levels[-1].append(block)
    width = stem.out_channels
    resolution = int(next(iter(net.enc)).partition("x")[0])
    return UNet(
        stem.in_channels,
        head.out_channels,
        resolution,
        width,
        channel_mult=[level[-1].channels_out // width for level in levels],
        blocks=len(levels[0]),
        attention_resolutions=[
            resolution >> i for i, level in enumerate(levels) if any(b.attention for b in level)
        ],
        dropout=encoder[0].dropout,
        time_features=net.map_noise.num_channels,
        nchw_dropout=True,
    )


def _own_options(block: ResidualBlock) -> BlockOptions:
    conv = block.conv0
    return BlockOptions(
        conv.in_channels, conv.out_channels, block.resample, block.attention is not None, block.dropout
    )
