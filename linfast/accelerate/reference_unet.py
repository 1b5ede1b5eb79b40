"""The conditioners of the research repository: DDPM++ U-Nets (Song et al., 2021) in EDM's form.

Each UNetBlock runs as a ``flows.unet_blocks.ResidualBlock`` whose weights are computed from the block's own
at every call: the formulas, the kernels and the dropout masks are those of ``lf.UNet`` and ``from_reference``.
A block with an option that ResidualBlock does not have is left alone.

A time that is one number for the whole batch is embedded once. Where the number is known, as in g,
``linfast.freeze`` keeps its embedding and each block's ``affine`` of it. The number is an attribute of the time
tensor, so that it passes through other people's code and need not be read from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.unet_weights import block_options, block_weights
from ..dispatch import autocast_dtype
from ..flows.unet_blocks import in_nchw
from ..freeze import derived, kept_values
from ..ops.group_norm_silu import group_norm_silu
from .adapter import Adapter, Draw, Options, Plan, Unfit
from .identity import has, original_class

reference_adapter = partial(Adapter, library="reference", where=None)
"""An Adapter for one of the repository's classes, which people copy into their own repositories."""


def constant_plan(runs: str) -> Callable[[Any, Options], Plan]:
    return lambda instance, options: Plan(runs)


# A time that is known


_VALUE = "_linfast_value"


def constant_time(value: float, x: Tensor) -> Tensor:
    """t [B] for x [B, ...]: one number, expanded with stride 0, by which ``_first_of`` recognises it."""
    return _marked(torch.full((1,), value, device=x.device).expand(x.shape[0]), value)


def _first_of(t: Tensor) -> Tensor:
    """t[:1] of a t [B] that is one number expanded; any other t unchanged."""
    if t.ndim != 1 or t.shape[0] < 2 or t.stride(0) != 0:
        return t
    return _marked(t[:1], getattr(t, _VALUE, None))


def _marked(t: Tensor, value: float | None) -> Tensor:
    """``t``, with the number that it was computed from as an attribute."""
    if value is not None and not torch.compiler.is_compiling():
        setattr(t, _VALUE, value)
    return t


# One block


_LAYERS = ("norm0", "norm1", "norm2", "conv0", "conv1", "skip", "qkv", "proj")


def _plan_block(block: Any, options: Options) -> Plan:
    try:
        return Plan("residual block of lf.UNet", layout=block_options(block).empty())
    except ValueError as error:
        raise Unfit(str(error)) from error


def _block(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    layout = torch.contiguous_format if in_nchw(x) else torch.channels_last

    def weights() -> dict[str, Tensor]:
        cast = {name: tensor.to(x.dtype) for name, tensor in block_weights(block).items()}
        return {n: t.contiguous(memory_format=layout) if t.ndim == 4 else t for n, t in cast.items()}

    own = _with_tensors(block._linfast_plan.layout, derived(block, ("weights", x.dtype, layout), weights))
    own.training = block.training
    return own(x.contiguous(memory_format=layout), _shift(block, emb, x.dtype))


def _shift(block: Any, emb: Tensor, dtype: torch.dtype) -> Tensor:
    """The term added to the first convolution's output: [C] where the batch has one time, else [B, C]."""

    def compute() -> Tensor:
        rows = block.affine(emb).to(dtype) + block.conv0.bias.to(dtype)
        return rows[0] if rows.shape[0] == 1 else rows

    value = getattr(emb, _VALUE, None)
    if value is None:
        return compute()
    return derived(block, ("shift", value, dtype, autocast_dtype(emb.device.type)), compute)


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """A view of the module with these tensors as its parameters; threads share the module itself, unchanged."""
    view: nn.Module = object.__new__(type(module))
    parameters = {name: p if p is None else tensors[prefix + name] for name, p in module._parameters.items()}
    children = {
        name: child if child is None else _with_tensors(child, tensors, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    vars(view).update(vars(module), _parameters=parameters, _modules=children)
    return view


def _is_block(layer: nn.Module) -> bool:
    return original_class(layer).__qualname__ == "UNetBlock"


def _move_off_zero(draw: Draw, *layers: Any) -> None:
    """Replace the last weights. Initially they are about 1e-5, which would hide errors of the layers before."""
    for layer in layers:
        last = (layer.conv1, *([layer.proj] if layer.num_heads else [])) if _is_block(layer) else (layer,)
        for conv in last:
            conv.weight = nn.Parameter(0.3 * draw(*conv.weight.shape).detach())


def _probe_block(block: Any, draw: Draw) -> Sequence[Tensor]:
    _move_off_zero(draw, block)
    emb = block.affine.in_features
    x = (block.in_channels, 4, 4)
    return [block.forward(draw(2, *x), draw(2, emb)), block.forward(draw(2, *x), draw(1, emb))]


# The U-Net: e = silu(W1 silu(W0 [cos | sin])); x through the encoder's layers, each output kept; x = (x | kept)
# through the decoder's; out = conv(silu(norm(x)))


def _plan_net(net: Any, options: Options) -> Plan:
    if net.map_label is not None or net.map_augment is not None:
        raise Unfit("its net embeds labels")
    *layers, norm, conv = net.dec
    ends = norm.endswith("_aux_norm") and conv.endswith("_aux_conv")
    if any("aux" in name for name in (*net.enc, *layers)) or not ends:
        raise Unfit("its encoder or decoder is not the standard one")
    if not has(net.dec[norm], ("num_groups", "eps", "weight", "bias")):
        raise Unfit(f"its {type(net.dec[norm]).__name__} is not the repository's GroupNorm")
    return Plan("a time of the whole batch embedded once")


def _net(net: Any, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Any = None) -> Tensor:
    emb = _embedding(net, _first_of(noise_labels), torch.promote_types(x.dtype, torch.float32))
    kept = []
    for layer in net.enc.values():
        x = layer(x, emb) if _is_block(layer) else layer(x)
        kept.append(x)
    *layers, norm, conv = net.dec.values()
    for layer in layers:
        x = torch.cat((x, kept.pop()), 1) if x.shape[1] != layer.in_channels else x
        x = layer(x, emb)
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return conv(group_norm_silu(x, norm.num_groups, weight, bias, eps=norm.eps))


def _embedding(net: Any, times: Tensor, dtype: torch.dtype) -> Tensor:
    """The embedding [B, n]. Inside ``freeze`` that of a known time is kept, and marked for ``_shift``."""

    def compute() -> Tensor:
        emb = net.map_noise(times).to(dtype).unflatten(1, (2, -1)).flip(1).flatten(1)
        return F.silu(net.map_layer1(F.silu(net.map_layer0(emb))))

    value = getattr(times, _VALUE, None)
    if value is None or kept_values(net) is None:
        return compute()
    key = ("embedding", value, dtype, autocast_dtype(times.device.type))
    return derived(net, key, lambda: _marked(compute(), value))


def _probe_net(net: Any, draw: Draw) -> Sequence[Tensor]:
    layers = [*net.enc.values(), *net.dec.values()]
    _move_off_zero(draw, layers[-1], *filter(_is_block, layers))
    side = 2 ** sum(name.endswith("_down") for name in net.enc)
    x = (2, layers[0].in_channels, 2 * side, side)
    return [net.forward(draw(*x), draw(n), None) for n in (2, 1)]


_SETTINGS = ("skip_scale", "adaptive_scale", "num_heads", "dropout")

ADAPTERS = (
    reference_adapter(
        name="UNetBlock",
        attributes=("norm0", "conv0", "affine", "norm1", "conv1", "skip", *_SETTINGS),
        methods={"forward": _block},
        plan=_plan_block,
        probe=_probe_block,
        settings=_SETTINGS,
        inner=lambda block: [m for name in _LAYERS if (m := getattr(block, name, None)) is not None],
        tolerance=1e-6,  # the original's attention drops to float32
    ),
    reference_adapter(
        name="SongUNet",
        attributes=("map_noise", "map_layer0", "map_layer1", "map_label", "map_augment", "enc", "dec"),
        methods={"forward": _net},
        plan=_plan_net,
        probe=_probe_net,
        inner=lambda net: [layer for name, layer in net.dec.items() if name.endswith("_aux_norm")],
        tolerance=1e-6,  # the original's attention drops to float32
    ),
)
