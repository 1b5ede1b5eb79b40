"""coupling_flow, image_flow and autoregressive_flow: stacks of layers with sound defaults.

By default transforms are affine, couplings move the first and the second half in turn, and log-scales are smooth
with |log_s| < c = min(2, 4 / depth), so that for an even depth their sum over the couplings
of each half is within +-2 for any weights, and within +-4 in autoregressive_flow, whose layers
move every feature; no initialisation depends on data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checks import check_choice, check_count, check_counts, check_flag, check_kind
from ..masked_net import MaskedMLP
from ..nets import MLP, ConvNet
from ..ops.affine_coupling import HALVES, ORDERS, split_sizes
from ..scale_maps import ScaleMap
from .actnorm import ActNorm
from .autoregressive import MaskedAutoregressive
from .bijection import Bijection, Inverse
from .couplings import AdditiveCoupling, AffineCoupling
from .flow import Flow
from .mix import Householder, Mix, Permute
from .splines import SplineCoupling, flow_spline
from .squeeze import Squeeze
from .unet import UNet

_PARAMETERS: dict[str, int | None] = {"affine": 2, "additive": 1, "spline": None}  # per feature
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
    transform: str = "affine",
    bins: int = 8,
    tail_bound: float = 3.0,
    scale_map: ScaleMap | str | None = None,
    order: str = "shift_first",
    actnorm: bool = False,
    mix: str | None = None,
    time_features: int = 0,
    context_features: int = 0,
    memory: str = "auto",
    coupling: str | None = None,
) -> Flow:
    """A flow g from data x [B, features] to noise z: ``depth`` couplings with MLP conditioners.

    Args:
        features: D, at least 2; an odd D splits unequally.
        depth: number of couplings.
        hidden, activation: of the conditioner MLPs.
        transform: of the couplings: "affine", "additive", or "spline" (``SplineCoupling``).
        bins, tail_bound: of splines.
        scale_map: of affine couplings; by default smooth with c = min(2, 4 / depth). None for splines.
        order: of affine couplings: "shift_first" (x + t) e^s, or "scale_first" x e^s + t.
        actnorm: put an ActNorm before each coupling.
        mix: put a channel mix after each coupling: "lu", "free", "householder" or "permute".
        time_features, context_features: inputs of the conditioners for ``t`` and ``context``.
        memory: what the backward keeps: "store", "invert" or "auto" (see ``Flow``).
        coupling: the older name of ``transform``.

    Raises:
        ValueError: an option that is not listed here or not used by the transform, depth < 1 or features < 2.

    Examples:
        >>> g = lf.coupling_flow(features=8, depth=4, hidden=(64, 64), context_features=3)
        >>> z, log_det = g.forward_and_log_det(torch.randn(5, 8), context=torch.randn(5, 3))
    """
    features = check_count("features", features)
    if features == 1:
        raise ValueError(
            "features must be at least 2, as a coupling moves half of them; got 1: use autoregressive_flow"
        )
    make = partial(
        MLP, hidden=hidden, activation=activation, time_features=time_features, context_features=context_features
    )
    couplings = _couplings(features, depth, make, transform, scale_map, order, coupling, bins, tail_bound)
    layers = _between(features, couplings, actnorm, mix, mix_every=1)
    return Flow(layers, features=features, shape=(features,), memory=memory)


def autoregressive_flow(
    features: int,
    depth: int = 5,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    *,
    residual: bool = False,
    feature_order: str = "reverse",
    transform: str = "affine",
    bins: int = 8,
    tail_bound: float = 3.0,
    scale_map: ScaleMap | str | None = None,
    order: str = "scale_first",
    actnorm: bool = False,
    mix: str | None = None,
    time_features: int = 0,
    context_features: int = 0,
    memory: str = "auto",
) -> Flow:
    """A flow g from data x [B, features] to noise z: ``depth`` MaskedAutoregressive layers with MaskedMLPs.

    Args:
        features: D, at least 1.
        depth: number of layers.
        hidden, activation, residual: of the conditioners.
        feature_order: "reverse": 0 .. D - 1 and D - 1 .. 0 in turn; "random": a random order in each layer, from
            torch's generator of the CPU.
        transform, bins, tail_bound: as in ``coupling_flow``; splines are those of ``SplineCoupling``.
        scale_map: of affine layers; by default smooth with c = min(2, 4 / depth), as in ``coupling_flow``.
        order: of affine layers: "scale_first" x e^s + t, or "shift_first" (x + t) e^s.
        actnorm, mix, time_features, context_features, memory: as in ``coupling_flow``.

    Raises:
        ValueError: an option that is not listed here or not used by the transform, or widths that ``MaskedMLP``
            refuses.

    Examples:
        >>> g = lf.autoregressive_flow(features=6, depth=5, hidden=(64, 64))
        >>> x = g.inverse(torch.randn(5, 6))                        # about the price of one pass
    """
    features, depth = check_count("features", features), check_count("depth", depth)
    check_choice("feature_order", feature_order, ("reverse", "random"))
    per_feature = _per_feature(transform, bins, tail_bound, scale_map, order, "scale_first")
    options: dict[str, Any] = {"scale_map": _default(depth) if scale_map is None else scale_map, "order": order}
    if transform == "additive":
        options["scale_map"] = None
    elif transform == "spline":
        options |= {"bins": bins, "tail_bound": tail_bound}
    main = []
    for i in range(depth):
        first_to_last: Sequence[int] = range(features)[:: -1 if i % 2 else 1]
        if feature_order == "random":
            first_to_last = torch.randperm(features, device="cpu").tolist()
        given = (hidden, activation, residual, time_features, context_features, first_to_last)
        main.append(MaskedAutoregressive(MaskedMLP(features, per_feature, *given), **options))
    layers = _between(features, main, actnorm, mix, mix_every=1)
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
    transform: str = "affine",
    bins: int = 8,
    tail_bound: float = 3.0,
    scale_map: ScaleMap | str | None = None,
    order: str = "shift_first",
    actnorm: bool = False,
    mix: str | None = "lu",
    time_features: int = 0,
    context_features: int = 0,
    memory: str = "auto",
    coupling: str | None = None,
) -> Flow:
    """A flow g from images x [B, C, H, W] to noise z: couplings with convolutional conditioners.

    A 1x1 mix follows each pair of couplings. An odd C is squeezed 2 x 2 first and unsqueezed last, so that z has
    x's shape. The g of the paper's MNIST model is ``image_flow(1, 32, depth=8, conditioner="unet",
    time_features=16)``, except that the paper's has ActNorms and clamps the log-scales.

    Args:
        channels: C.
        resolution: H = W, or (H, W); even where C is odd.
        depth: number of couplings.
        width: hidden channels of the conditioners.
        activation: of "conv" conditioners; a UNet has SiLU.
        conditioner: "conv", three convolutions (``ConvNet``), or "unet", which sees the whole
            image (``UNet``). In training mode, the dropout of a UNet (0.1 by default) draws a new
            mask at every call: results can be inverted only in eval mode.
        unet_options: more arguments of ``UNet``: channel_mult, blocks, attention_resolutions
            (counted after the squeeze), dropout, nchw_dropout.
        transform, bins, tail_bound, scale_map, order, actnorm, mix, memory, coupling: as in ``coupling_flow``.
        time_features, context_features: inputs of the conditioners for ``t`` and ``context``. Labels are given as
            one row per image, such as one-hot rows: ``g(x, context=F.one_hot(labels, 10).to(x.dtype))``.

    Raises:
        ValueError: an odd C at an odd resolution, a resolution that the UNet cannot halve often
            enough, or an option that is not listed or not used by the transform.
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
    given = {"time_features": time_features, "context_features": context_features}
    make = _image_conditioner(conditioner, seen, width, activation, given, unet_options)
    couplings = _couplings(
        features, depth, make, transform, scale_map, order, coupling, bins, tail_bound, "bins_first"
    )
    layers = _between(features, couplings, actnorm, mix, mix_every=2)
    if squeeze:
        layers = [Squeeze(channels), *layers, Inverse(Squeeze(channels))]
    return Flow(layers, features=channels, shape=(channels, height, wide), memory=memory)


_UNET_OPTIONS = ("channel_mult", "blocks", "attention_resolutions", "dropout", "nchw_dropout")


def _image_conditioner(
    kind: str,
    resolution: tuple[int, int],
    width: int,
    activation: str,
    given: Mapping[str, Any],
    unet_options: Mapping[str, Any] | None,
) -> Callable[[int, int], nn.Module]:
    """A function (channels in, channels out) -> conditioner for images of this resolution.

    ``given``: its time_features and context_features.
    """
    check_choice("conditioner", kind, ("conv", "unet"))
    if unet_options is not None:
        check_kind("unet_options", unet_options, Mapping)
    if kind == "conv":
        if unet_options is not None:
            raise ValueError(f"unet_options need conditioner='unet'; got {dict(unet_options)}")
        return lambda n_in, n_out: ConvNet(n_in, n_out, width, activation, **given)
    if activation != "silu":
        raise ValueError(f"a UNet has activation 'silu'; got {activation!r}")
    options = dict(unet_options or {})
    if unknown := [name for name in options if name not in _UNET_OPTIONS]:
        raise ValueError(f"unet_options may be {', '.join(_UNET_OPTIONS)}; got {unknown}")

    def unet(n_in: int, n_out: int) -> nn.Module:
        network = UNet(n_in, n_out, resolution[0], width, **given, **options)
        factor = 2 ** (len(network.channel_mult) - 1)
        if any(side % factor for side in resolution):
            raise ValueError(f"a UNet sees {resolution} pixels: they must be multiples of {factor}")
        return network

    return unet


def _default(depth: int) -> ScaleMap:
    return ScaleMap("smooth", bound=min(2.0, 4.0 / depth))


def _per_feature(transform: str, bins: int, tail_bound: float, scale_map: Any, order: str, usual_order: str) -> int:
    """The number of parameters of a feature; checks the arguments."""
    check_choice("transform", transform, tuple(_PARAMETERS))
    check_choice("order", order, ORDERS)
    of_spline = flow_spline(bins, tail_bound).per_feature
    unused: dict[str, tuple[Any, Any]] = {"bins": (bins, 8), "tail_bound": (tail_bound, 3.0)}
    if transform == "spline":
        unused = {"scale_map": (scale_map, None), "order": (order, usual_order)}
    for name, (value, usual) in unused.items():
        if value is not None if usual is None else value != usual:
            raise ValueError(f"{name} must be {usual!r} for transform={transform!r}, which has none; got {value!r}")
    return _PARAMETERS[transform] or of_spline


def _couplings(
    features: int,
    depth: int,
    conditioner: Callable[[int, int], nn.Module],
    transform: str,
    scale_map: ScaleMap | str | None,
    order: str,
    coupling: str | None,
    bins: int,
    tail_bound: float,
    layout: str = "features_first",
) -> Iterator[Bijection]:
    depth = check_count("depth", depth)
    if coupling is not None:
        if transform != "affine":
            raise ValueError(
                f"coupling is the older name of transform: give one; got {coupling!r} and {transform!r}"
            )
        transform = check_choice("coupling", coupling, tuple(_PARAMETERS))
    outputs = _per_feature(transform, bins, tail_bound, scale_map, order, "shift_first")
    scale_map = _default(depth) if scale_map is None else scale_map
    make: Callable[..., Bijection] = AdditiveCoupling
    if transform == "affine":
        make = partial(AffineCoupling, scale_map=scale_map, order=order)
    elif transform == "spline":
        make = partial(SplineCoupling, bins=bins, tail_bound=tail_bound, layout=layout)
    for i in range(depth):
        moves = HALVES[i % 2]
        moved, kept = split_sizes(features) if moves == "first" else split_sizes(features)[::-1]
        yield make(conditioner(kept, outputs * moved), features, moves)


def _between(
    features: int, main: Iterable[Bijection], actnorm: bool, mix: str | None, mix_every: int
) -> list[Bijection]:
    """The layers with an ActNorm before each and a mix after every ``mix_every`` of them."""
    check_flag("actnorm", actnorm)
    if mix is not None:
        check_choice("mix", mix, tuple(_MIXES))
    layers: list[Bijection] = []
    for i, layer in enumerate(main):
        layers += [ActNorm(features), layer] if actnorm else [layer]
        if mix is not None and (i + 1) % mix_every == 0:
            layers.append(_MIXES[mix](features))
    return layers
