"""from_reference: a model of the research repository as a linfast Linearizer with the same weights.

The parts of the model are recognised by their classes' names and attributes. Nothing of the
repository is imported, and the model is not changed.

    OneStepLinearizer, StyleLinearizer      Linearizer(g.at(t=1.0), A, g.at(t=0.0))
    InverseUnet                             Flow: Squeeze, blocks, Squeeze inverted
    InvUnetBlock                            ActNorm, two AffineCouplings with UNets, Mix
    TimeDependentLoRALinearLayer            TimeLowRank
    LinearKernel                            TimeDepthwiseConv

The new weights include the blocks' factor 1 / sqrt(2), and the sum of all biases that are added to one
convolution's output. Attention's q, k and v channels are reordered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..dispatch import check_values, tensors_of
from ..flows import ActNorm, AffineCoupling, Bijection, Flow, Inverse, Mix, Squeeze
from ..linearizer import Linearizer
from ..operators import TimeDepthwiseConv, TimeLowRank
from ..operators.base import LatentOperator
from ..scale_maps import ScaleMap
from .unet_weights import unet_from_reference

TIMES = {"gx": 1.0, "gy": 0.0}
"""The time t of g in each of its two modes."""


def from_reference(linearizer: nn.Module, memory: str = "auto") -> Linearizer:
    """A linfast Linearizer with the weights of one of the research repository's image models: same f(x, t=t).

    The weights are copied, in the model's dtype and on its device. An ActNorm with nonzero values
    counts as initialised, because loading a checkpoint loses the repository's flag.
    UNets draw dropout masks as the repository's do (see ``UNet.nchw_dropout``).

    Args:
        linearizer: a module with ``net_gx``, ``net_gy`` and ``linear_network``, such as the
            repository's OneStepLinearizer.
        memory: what is kept for g's backward: "store", "invert" or "auto" (see ``Flow``).

    Raises:
        TypeError: a part is missing, or is not one of the repository's classes for it.
        ValueError: a part has an option without a counterpart in linfast; an unknown ``memory``.
    """
    for name in ("net_gx", "net_gy", "linear_network"):
        if not isinstance(getattr(linearizer, name, None), nn.Module):
            raise TypeError(f"linearizer must have net_gx, net_gy and linear_network; {name} is missing")
    check_values("linearizer", *tensors_of(linearizer))
    net_gx, net_gy = linearizer.net_gx, linearizer.net_gy
    g_x = _flow("net_gx", net_gx, memory)
    g_y = g_x if net_gy is net_gx else _flow("net_gy", net_gy, memory)
    A = _operator(linearizer.linear_network, g_x.shape)
    return Linearizer(g_x.at(t=TIMES["gx"]), A, g_y.at(t=TIMES["gy"])).train(linearizer.training)


def _flow(name: str, network: Any, memory: str) -> Flow:
    if not _is_a(network, "InverseUnet") or not _is_a(getattr(network, "g", None), "InvUnet"):
        raise TypeError(f"{name} must be an InverseUnet; got {type(network).__name__}")
    blocks, squeezed = network.g.blocks, network.g.squeeze is not None
    layers = [layer for block in blocks for layer in _block(block)]
    channels = blocks[0].mix.W.shape[0] // (4 if squeezed else 1)
    if squeezed:
        layers = [Squeeze(channels), *layers, Inverse(Squeeze(channels))]
    side = math.isqrt(network.dim // channels)
    return Flow(layers, features=channels, shape=(channels, side, side), memory=memory)


def _block(block: Any) -> list[Bijection]:
    features = block.mix.W.shape[0]
    mix = Mix(features, "free").to(block.mix.W)
    mix.load_state_dict({**mix.state_dict(), "weight": block.mix.W})
    couplings = [_coupling(block.F, features, "first"), _coupling(block.G, features, "second")]
    return [*([] if block.actnorm is None else [_actnorm(block.actnorm)]), *couplings, mix]


def _actnorm(actnorm: Any) -> ActNorm:
    result = ActNorm(actnorm.bias.numel()).to(actnorm.bias)
    trained = bool(actnorm.initialized) or holds_values(actnorm)
    values = {"bias": actnorm.bias.flatten(), "log_scale": actnorm.log_scale.flatten()}
    result.load_state_dict({**values, "initialized": torch.tensor(trained)})
    return result


def holds_values(actnorm: Any) -> bool:
    """Whether the ActNorm has nonzero values. Its flag does not tell after a state_dict was loaded."""
    return any(bool(parameter.count_nonzero()) for parameter in (actnorm.bias, actnorm.log_scale))


def _coupling(coupling: Any, features: int, moves: str) -> AffineCoupling:
    net = getattr(coupling.cond, "net", None)
    if not _is_a(net, "SongUNet"):
        raise TypeError(f"a coupling's conditioner must wrap a SongUNet; got {type(net).__name__}")
    return AffineCoupling(unet_from_reference(net), features, moves, ScaleMap("clamp", float(coupling.clamp)))


def _operator(module: Any, shape: Any) -> LatentOperator:
    if _is_a(module, "TimeDependentLoRALinearLayer"):
        first = module.lin1[1]
        sizes = {"time_features": first.in_features, "hidden": first.out_features}
        A: Any = TimeLowRank(module.out_features, module.lora_features, **sizes)
        pairs = [(A.u_net, module.lin2), (A.v_net, module.lin1)]  # row z times A1 A2^T is A2 A1^T times column z
    elif _is_a(module, "LinearKernel"):
        channels, *sides = shape
        widths = [layer.in_features for layer in _linears(module.lin1)]
        A = TimeDepthwiseConv(channels, module.k, tuple(sides), widths[0], widths[1:])
        pairs = [(A.net, module.lin1)]
    else:
        raise TypeError(
            f"linear_network must be a TimeDependentLoRALinearLayer or a LinearKernel; got {type(module).__name__}"
        )
    A.to(next(module.parameters()))
    for mine, theirs in pairs:
        for own, layer in zip(mine.layers, _linears(theirs), strict=True):
            own.load_state_dict(layer.state_dict())
    return A


def _linears(source: nn.Module) -> list[nn.Linear]:
    return [layer for layer in source.children() if isinstance(layer, nn.Linear)]


def _is_a(module: object, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)
