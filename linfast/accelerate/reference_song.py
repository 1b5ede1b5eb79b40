"""The U-Net around the reference repository's blocks: DDPM++ (Song et al., 2021), and the wrapper it is called by.

    e = silu(W1 silu(W0 [cos | sin]));  x through the encoder's layers, each output kept;  x = (x | kept)
    through the decoder's;  out = conv(silu(norm(x)))

A time that is the same for the whole batch is embedded once. Inside ``linfast.freeze`` a known one, as g's, is
embedded at the first call only, and with it each block's ``affine`` of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import autocast_dtype
from ..freeze import derived, is_kept
from .adapter import Draw, Options, Plan, Unfit
from .constant_time import first_of, value_of
from .identity import changed_method, original_class
from .norm_silu import norm_silu
from .reference import has, reference_adapter
from .reference_unet import AFFINE, last_convs, move_off_zero

__all__ = ["ADAPTERS"]


# The U-Net


def _plan_net(net: Any, options: Options) -> Plan:
    _check_unlabelled(net)
    *layers, norm, conv = net.dec
    if any("aux" in name for name in (*net.enc, *layers)) or not (
        norm.endswith("_aux_norm") and conv.endswith("_aux_conv")
    ):
        raise Unfit("its encoder or decoder is not the standard one")
    if not has("num_groups", "eps", "weight", "bias")(net.dec[norm]):
        raise Unfit(f"its {type(net.dec[norm]).__name__} is not the repository's GroupNorm")
    return Plan("a known time embedded once inside freeze")


def _check_unlabelled(net: Any) -> None:
    if net.map_label is not None or net.map_augment is not None:
        raise Unfit("its net embeds labels")


def _net(net: Any, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Any = None) -> Tensor:
    emb = _embedding(net, noise_labels, torch.promote_types(x.dtype, torch.float32))
    kept = []
    for layer in net.enc.values():
        x = layer(x, emb) if _is_block(layer) else layer(x)
        kept.append(x)
    *layers, norm, conv = net.dec.values()
    for layer in layers:
        if x.shape[1] != layer.in_channels:
            x = torch.cat((x, kept.pop()), 1)
        x = layer(x, emb)
    return conv(norm_silu(x, norm))


def _embedding(net: Any, times: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, n]; of a known time while the weights are promised still, with the blocks' ``affine`` of it."""
    value = value_of(times)
    if value is None or not is_kept(net):
        return _embed(net, times, dtype)

    def embed() -> Tensor:
        emb = _embed(net, times, dtype)
        blocks = (layer for layer in (*net.enc.values(), *net.dec.values()) if _is_block(layer))
        setattr(emb, AFFINE, {block: block.affine(emb) for block in blocks})
        return emb

    return derived(net, ("embedding", value, dtype, autocast_dtype(times.device.type)), embed)


def _embed(net: Any, times: Tensor, dtype: torch.dtype) -> Tensor:
    sines = net.map_noise(times).to(dtype)
    emb = sines.unflatten(1, (2, -1)).flip(1).flatten(1)
    return F.silu(net.map_layer1(F.silu(net.map_layer0(emb))))


def _is_block(layer: nn.Module) -> bool:
    return original_class(layer).__qualname__ == "UNetBlock"


def _probe_net(net: Any, draw: Draw) -> Sequence[Tensor]:
    layers = [*net.enc.values(), *net.dec.values()]
    last = layers[-1]
    move_off_zero(draw, last, *(conv for block in layers if _is_block(block) for conv in last_convs(block)))
    side = 2 ** sum(name.endswith("_down") for name in net.enc)
    x = (2, next(iter(net.enc.values())).in_channels, 2 * side, side)
    return [net.forward(draw(*x), draw(n), None) for n in (2, 1)]


# The wrapper


def _plan_wrapper(wrapper: Any, options: Options) -> Plan:
    if original_class(wrapper.net).__qualname__ != "SongUNet":
        raise Unfit(f"its net is a {type(wrapper.net).__name__}, not the repository's SongUNet")
    _check_unlabelled(wrapper.net)
    if changed_method(wrapper.net, ("forward",)) is not None:
        raise Unfit("the forward of its SongUNet was replaced")
    return Plan("a time of the whole batch embedded once")


def _wrapper(wrapper: Any, x: Tensor, t: Tensor | None) -> Tensor:
    if t is None:
        t = torch.zeros(1, device=x.device).expand(x.shape[0])
    return wrapper.net(x, first_of(t), None)


class _Net(nn.Module):
    """x (1 + t) of t [B] or [1], in the U-Net's place."""

    def forward(self, x: Tensor, t: Tensor, label: None) -> Tensor:
        return x * (1 + t.to(x)).reshape(-1, 1, 1, 1)


def _probe_wrapper(wrapper: Any, draw: Draw) -> Sequence[Tensor]:
    wrapper._modules["net"] = _Net()
    x = (3, 2, 2, 2)
    times = (None, draw(3), draw(1).expand(3))
    return [wrapper.forward(draw(*x), t) for t in times]


ADAPTERS = (
    reference_adapter(
        "SongUNet",
        has("map_noise", "map_layer0", "map_layer1", "map_label", "map_augment", "enc", "dec"),
        methods={"forward": _net},
        plan=_plan_net,
        probe=_probe_net,
        inner=lambda net: [layer for name, layer in net.dec.items() if name.endswith("_aux_norm")],
        tolerance=1e-6,  # the original's attention drops to float32
    ),
    reference_adapter(
        "SongUNetWrapper",
        has("net"),
        methods={"forward": _wrapper},
        plan=_plan_wrapper,
        probe=_probe_wrapper,
        hollow=lambda wrapper: (wrapper.net,),
    ),
)
