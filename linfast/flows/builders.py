"""coupling_flow and image_flow: stacks of couplings with sound defaults.

Defaults: couplings that move the first and the second half in turn; smooth
log-scales with |log_s| < c = min(2, 4 / depth), so that the log-scales of a whole
stack stay within +-2 a half whatever the weights; no data-dependent initialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..checks import check_choice, check_count, check_counts, check_flag, check_kind
from ..nets import MLP, ConvNet
from ..ops.affine_coupling import HALVES, ORDERS, split_sizes
from ..scale_maps import ScaleMap
from .actnorm import ActNorm
from .bijection import Bijection, Inverse
from .couplings import AdditiveCoupling, AffineCoupling
from .flow import Flow
from .mix import Householder, Mix, Permute
from .squeeze import Squeeze
from .unet import UNet

_MIXES: dict[str, Callable[[int], Bijection]] = {
    "lu": lambda features: Mix(features, "lu"),
    "free": lambda features: Mix(features, "free"),
    "householder": Householder,
    "permute": Permute,
}


def coupling_flow(
    features: int,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    activation: str = "silu",
    *,
    coupling: str = "affine",
    scale_map: ScaleMap | str | None = None,
    order: str = "shift_first",
    actnorm: bool = False,
    mix: str | None = None,
    time_features: int = 0,
    context_features: int = 0,
    memory: str = "auto",
) -> Flow:
    """A flow on vectors [B, features]: ``depth`` couplings with MLP conditioners.

    Args:
        features: D, at least 2; an odd D splits unequally.
        depth: number of couplings.
        hidden, activation: of the conditioner MLPs.
        coupling: "affine" or "additive".
        scale_map: of affine couplings; by default smooth with c = min(2, 4 / depth).
        order: "shift_first" (x + t) e^s, or "scale_first" x e^s + t.
        actnorm: put an ActNorm before each coupling.
        mix: put a channel mix after each coupling: "lu", "free", "householder" or "permute".
        time_features, context_features: inputs of the conditioners for ``t`` and ``context``.
        memory: what the backward keeps: "store", "invert" or "auto" (see ``Flow``).

    Raises:
        ValueError: an option that is not listed here, depth < 1 or features < 2.
    """
    features = check_count("features", features, least=2)
    make = partial(
        MLP, hidden=hidden, activation=activation, time_features=time_features, context_features=context_features
    )
    layers = _stack(features, depth, make, coupling, scale_map, order, actnorm, mix, mix_every=1)
    return Flow(layers, features=features, shape=(features,), memory=memory)


def image_flow(
    channels: int,
    resolution: int | tuple[int, int],
    depth: int = 4,
    width: int = 16,
    activation: str = "silu",
    *,
    conditioner: str = "conv",
    unet_options: Mapping[str, Any] | None = None,
    coupling: str = "affine",
    scale_map: ScaleMap | str | None = None,
    order: str = "shift_first",
    actnorm: bool = False,
    mix: str | None = "lu",
    time_features: int = 0,
    memory: str = "auto",
) -> Flow:
    """A flow on images [B, C, H, W]: couplings with convolutional conditioners, a 1x1 mix after each pair.

    An odd C is squeezed 2 x 2 first and unsqueezed last, so that z has x's shape. The g of the
    paper's MNIST model is ``image_flow(1, 32, depth=8, conditioner="unet", time_features=16)``,
    but for its ActNorms and its hard clamp of the log-scales.

    Args:
        channels: C.
        resolution: H = W, or (H, W); even where C is odd.
        depth: number of couplings.
        width: hidden channels of the conditioners.
        activation: of "conv" conditioners; a UNet has SiLU.
        conditioner: "conv", three convolutions (``ConvNet``), or "unet", which sees the whole
            image (``UNet``). Dropout, 0.1 by default in a UNet, draws another mask at every
            call in training: ``eval()`` a flow before inverting what it gave.
        unet_options: more arguments of ``UNet``: channel_mult, blocks, attention_resolutions
            (counted after the squeeze), dropout, nchw_dropout.
        coupling, scale_map, order, actnorm, mix, time_features, memory: as in ``coupling_flow``.

    Raises:
        ValueError: an odd C at an odd resolution, a resolution that the UNet cannot halve often
            enough, or an option that is not listed.
    """
    channels = check_count("channels", channels)
    if isinstance(resolution, (tuple, list)):
        height, wide = check_counts("resolution", resolution, length=2)
    else:
        height = wide = check_count("resolution", resolution)
    squeeze = channels % 2 == 1
    if squeeze and (height % 2 or wide % 2):
        raise ValueError(f"resolution must be even for an odd number of channels; got {(height, wide)}")
    features = 4 * channels if squeeze else channels
    seen = (height // 2, wide // 2) if squeeze else (height, wide)
    make = _image_conditioner(conditioner, seen, width, activation, time_features, unet_options)
    layers = _stack(features, depth, make, coupling, scale_map, order, actnorm, mix, mix_every=2)
    if squeeze:
        layers = [Squeeze(channels), *layers, Inverse(Squeeze(channels))]
    return Flow(layers, features=channels, shape=(channels, height, wide), memory=memory)


_UNET_OPTIONS = ("channel_mult", "blocks", "attention_resolutions", "dropout", "nchw_dropout")


def _image_conditioner(
    kind: str,
    resolution: tuple[int, int],
    width: int,
    activation: str,
    time_features: int,
    unet_options: Mapping[str, Any] | None,
) -> Callable[[int, int], nn.Module]:
    """(channels in, channels out) -> a conditioner of images of this resolution."""
    check_choice("conditioner", kind, ("conv", "unet"))
    if unet_options is not None:
        check_kind("unet_options", unet_options, Mapping)
    if kind == "conv":
        if unet_options is not None:
            raise ValueError(f"unet_options need conditioner='unet'; got {dict(unet_options)}")
        return lambda n_in, n_out: ConvNet(n_in, n_out, width, activation, time_features)
    if activation != "silu":
        raise ValueError(f"a UNet has activation 'silu'; got {activation!r}")
    options = dict(unet_options or {})
    if unknown := [name for name in options if name not in _UNET_OPTIONS]:
        raise ValueError(f"unet_options may be {', '.join(_UNET_OPTIONS)}; got {unknown}")

    def unet(n_in: int, n_out: int) -> nn.Module:
        network = UNet(n_in, n_out, resolution[0], width, time_features=time_features, **options)
        factor = 2 ** (len(network.channel_mult) - 1)
        if any(side % factor for side in resolution):
            raise ValueError(f"a UNet sees {resolution} pixels: they must be multiples of {factor}")
        return network

    return unet


def _stack(
    features: int,
    depth: int,
    conditioner: Callable[[int, int], nn.Module],
    coupling: str,
    scale_map: ScaleMap | str | None,
    order: str,
    actnorm: bool,
    mix: str | None,
    mix_every: int,
) -> list[Bijection]:
    depth = check_count("depth", depth)
    check_choice("coupling", coupling, ("affine", "additive"))
    check_choice("order", order, ORDERS)
    check_flag("actnorm", actnorm)
    if mix is not None:
        check_choice("mix", mix, tuple(_MIXES))
    if scale_map is None:
        scale_map = ScaleMap("smooth", bound=min(2.0, 4.0 / depth))
    layers: list[Bijection] = []
    for i in range(depth):
        moves = HALVES[i % 2]
        moved, kept = split_sizes(features) if moves == "first" else split_sizes(features)[::-1]
        if actnorm:
            layers.append(ActNorm(features))
        if coupling == "affine":
            layers.append(AffineCoupling(conditioner(kept, 2 * moved), features, moves, scale_map, order))
        else:
            layers.append(AdditiveCoupling(conditioner(kept, moved), features, moves))
        if mix is not None and (i + 1) % mix_every == 0:
            layers.append(_MIXES[mix](features))
    return layers
