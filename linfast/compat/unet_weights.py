"""A reference SongUNet as a UNet: the options read off its modules, the weights folded as ours hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..flows.unet import UNet
from ..flows.unet_blocks import SKIP_SCALE, Attention, ResidualBlock

__all__ = ["unet_from_reference"]


def unet_from_reference(net: Any) -> UNet:
    """The UNet that computes what this SongUNet computes.

    Raises:
        ValueError: it has an option that UNet does not have.
    """
    encoder = [block for block in net.enc.values() if hasattr(block, "norm0")]
    decoder = [block for block in net.dec.values() if hasattr(block, "norm0")]
    stem, head = next(iter(net.enc.values())), list(net.dec.values())[-1]
    _check_options(net, [*encoder, *decoder])
    result = _architecture(net, stem, head, encoder).to(stem.weight)
    if [_shape(b) for b in (*encoder, *decoder)] != [_own_shape(b) for b in (*result.encoder, *result.decoder)]:
        raise ValueError("the SongUNet's blocks are not those of a UNet of its levels, widths and attention")
    with torch.no_grad():
        _copy(result.stem, stem.weight, stem.bias)
        _copy(result.head, head.weight, head.bias)
        _copy(result.norm, *_weights(list(net.dec.values())[-2]))
        for mine, theirs in zip((*result.encoder, *result.decoder), (*encoder, *decoder), strict=True):
            _copy_block(mine, theirs)
        _copy_time(result.time, net, [*encoder, *decoder])
    return result


def _architecture(net: Any, stem: Any, head: Any, encoder: list[Any]) -> UNet:
    width = stem.out_channels
    levels: list[list[Any]] = [[]]
    for block in encoder:
        if _resample(block) == "down":
            levels.append([])
        else:
            levels[-1].append(block)
    resolution = int(next(iter(net.enc)).partition("x")[0])
    attends = [resolution >> i for i, level in enumerate(levels) if any(block.num_heads for block in level)]
    return UNet(
        stem.in_channels,
        head.out_channels,
        resolution,
        width,
        channel_mult=[level[-1].out_channels // width for level in levels],
        blocks=len(levels[0]),
        attention_resolutions=attends,
        dropout=encoder[0].dropout,
        time_features=net.map_noise.num_channels,
        nchw_dropout=True,
    )


def _check_options(net: Any, blocks: list[Any]) -> None:
    problems = {
        "class labels": net.map_label is not None,
        "augmentation labels": net.map_augment is not None,
        "a time embedding that is not positional with its end point": not getattr(net.map_noise, "endpoint", False)
        or net.map_noise.max_positions != 10000,
        "skip or residual encoders or decoders": any(
            "aux" in name and name.rpartition("_")[2] not in ("norm", "conv") for name in (*net.enc, *net.dec)
        ),
        "adaptive scale": any(block.adaptive_scale for block in blocks),
        "several attention heads": any(block.num_heads > 1 for block in blocks),
        "a skip scale that is not sqrt(1/2)": any(abs(block.skip_scale - SKIP_SCALE) > 1e-12 for block in blocks),
        "a resampling filter that is not [1, 1]": any(
            block.conv0.resample_filter is not None and block.conv0.resample_filter.shape[-1] != 2
            for block in blocks
        ),
    }
    if found := [name for name, present in problems.items() if present]:
        raise ValueError(f"the SongUNet has what UNet does not: {', '.join(found)}")


def _resample(block: Any) -> str | None:
    return "down" if block.conv0.down else "up" if block.conv0.up else None


def _shape(block: Any) -> tuple[Any, ...]:
    return block.in_channels, block.out_channels, _resample(block), bool(block.num_heads), block.norm0.num_groups


def _own_shape(block: Any) -> tuple[Any, ...]:
    conv = block.conv0
    return conv.in_channels, conv.out_channels, block.resample, block.attention is not None, block.norm0.num_groups


def _copy_block(mine: ResidualBlock, theirs: Any) -> None:
    _copy(mine.norm0, *_weights(theirs.norm0))
    _copy(mine.norm1, *_weights(theirs.norm1))
    mine.conv0.weight.copy_(theirs.conv0.weight)
    bias = theirs.conv1.bias
    if mine.skip is not None:
        mine.skip.weight.copy_(SKIP_SCALE * theirs.skip.weight.flatten(1))
        bias = bias + theirs.skip.bias
    _copy(mine.conv1, SKIP_SCALE * theirs.conv1.weight, SKIP_SCALE * bias)
    if mine.attention is not None:
        _copy_attention(mine.attention, theirs)


def _copy_attention(mine: Attention, theirs: Any) -> None:
    """qkv's channels are (channel, which of q, k, v) there and (which, channel) here."""
    _copy(mine.norm, *_weights(theirs.norm2))
    weight, bias = theirs.qkv.weight.flatten(1), theirs.qkv.bias
    mine.qkv.weight.copy_(weight.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1))
    mine.qkv.bias.copy_(bias.unflatten(0, (-1, 3)).T.flatten())
    _copy(mine.out, SKIP_SCALE * theirs.proj.weight.flatten(1), SKIP_SCALE * theirs.proj.bias)


def _copy_time(mine: Any, net: Any, blocks: list[Any]) -> None:
    _, first, _, second, _, shifts = mine
    _copy(first, *_weights(net.map_layer0))
    _copy(second, *_weights(net.map_layer1))
    _copy(
        shifts,
        torch.cat([block.affine.weight for block in blocks]),
        torch.cat([block.affine.bias + block.conv0.bias for block in blocks]),
    )


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def _copy(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
