"""Conditioners: ordinary networks that give a coupling its shift and raw scale.

    MLP      [B, n_in] (+ embedded time, + context) -> [B, n_out]
    ConvNet  [B, C_in, H, W] (+ time, + context) -> [B, C_out, H, W]

The last layer starts at zero, so a new coupling is the identity, and a new
Linearizer of couplings equals its operator A.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_choice, check_count, check_counts, check_dense, check_flag, check_like
from .conditioning import SinusoidalEmbedding, check_time_features, conditions
from .dispatch import cat, has_global_hook, is_plain, outside_autocast
from .ops.activations import ACTIVATION_NAMES, ACTIVATIONS
from .ops.plain_couplings import absorb
from .ranges import range_
from .rows import is_apart


def check_input(kind: str, x: Tensor, layers: Iterable[nn.Module]) -> None:
    """Raise unless x is a tensor with the dtype and device of the network's first layer."""
    first = next(iter(layers))
    # A parametrized layer has another class, and reading its weight would compute it.
    if type(first) in (nn.Linear, nn.Conv2d) and not torch.compiler.is_compiling():
        check_like(kind, "x", x, first.weight)  # type: ignore[arg-type]
    else:
        check_dense("x", x)


class MLP(nn.Module):
    """Linear layers with activations between them: [B, n_in] -> [B, n_out].

    Args:
        n_in, n_out: features in and out.
        hidden: widths of the hidden layers; empty for one linear layer.
        activation: relu, silu, tanh or gelu.
        bias: whether the linear layers have one.
        time_features: size of a sinusoidal embedding of ``t``, appended to x; 0 for none.
        context_features: size n of a ``context`` [B, n], or [1, n] for all samples, appended to the input; 0 for
            none.
        zero_last: start the last layer at zero.

    Raises:
        ValueError: unknown activation; x of another shape; t or context is missing, or
            given to a network without an input for it.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        hidden: Sequence[int] = (128, 128),
        activation: str = "silu",
        bias: bool = True,
        time_features: int = 0,
        context_features: int = 0,
        zero_last: bool = True,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATION_NAMES)
        check_flag("bias", bias)
        check_flag("zero_last", zero_last)
        self.n_in, self.n_out = check_count("n_in", n_in), check_count("n_out", n_out)
        self.hidden = check_counts("hidden", hidden)
        self.activation, self.bias, self.zero_last = activation, bias, zero_last
        self.time_features = time_features = check_time_features(time_features)
        self.context_features = context_features = check_count("context_features", context_features, least=0)
        self.embedding = SinusoidalEmbedding(time_features) if time_features else None
        widths = (self.n_in + time_features + context_features, *self.hidden, self.n_out)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(widths))
        if zero_last:
            zero_layer(self.layers[-1])

    def forward(self, x: Tensor, t: float | Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The network's output [B, n_out] for x [B, n_in]."""
        with range_("forward", self):
            h = self._first(x, t, context)
            activate = ACTIVATIONS[self.activation]
            for layer in self.layers[1:]:
                h = layer(activate(h))
            return h

    @outside_autocast
    def folded(
        self, t: float | Tensor | None = None, context: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """(weights, biases) of an equal network of x alone, for a time and a context [1, C] of all samples."""
        layers: list[Any] = list(self.layers)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        given = conditions("MLP", self.embedding, t, context, weights[0][:1], self.context_features)
        if given is not None:
            weights[0], biases[0] = absorb(weights[0], biases[0], given)
        return weights, biases

    def _first(self, x: Tensor, t: float | Tensor | None, context: Tensor | None) -> Tensor:
        """The first layer's result, from x, the time and the context."""
        check_input("MLP", x, self.layers)
        if x.ndim != 2 or x.shape[-1] != self.n_in:
            raise ValueError(f"MLP: x must be [B, {self.n_in}]; got {tuple(x.shape)}")
        given = conditions("MLP", self.embedding, t, context, x, self.context_features)
        layer: Any = self.layers[0]
        if given is None:
            return layer(x)
        if is_apart(given, x) and is_plain(layer, (nn.Linear,)) and not has_global_hook():
            return F.linear(x, *absorb(layer.weight, layer.bias, given))
        return layer(cat((x, given.expand(x.shape[0], -1)), dim=-1))


class ConvNet(nn.Module):
    """3x3, 1x1 and 3x3 convolutions with activations between them: [B, C_in, H, W] -> [B, C_out, H, W].

    Args:
        channels_in, channels_out: C_in and C_out.
        width: channels of the two hidden layers.
        activation: relu, silu, tanh or gelu.
        time_features: size of a sinusoidal embedding of ``t``; 0 for none.
        context_features: size n of a ``context`` [B, n], or [1, n] for all samples; 0 for none. A linear map
            (``time_shift``) of [embedded t | context] is added to the first convolution's output at every pixel.

    Raises:
        ValueError: unknown activation; x of another shape; t or context is missing, of another shape, or given to
            a network without an input for it.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        width: int = 64,
        activation: str = "silu",
        time_features: int = 0,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATION_NAMES)
        self.channels_in = channels_in = check_count("channels_in", channels_in)
        self.channels_out = channels_out = check_count("channels_out", channels_out)
        self.width = width = check_count("width", width)
        self.activation, self.time_features = activation, check_time_features(time_features)
        self.context_features = check_count("context_features", context_features, least=0)
        self.layers = nn.ModuleList(
            (
                nn.Conv2d(channels_in, width, 3, padding=1),
                nn.Conv2d(width, width, 1),
                nn.Conv2d(width, channels_out, 3, padding=1),
            )
        )
        self.embedding = SinusoidalEmbedding(time_features) if time_features else None
        given = self.time_features + self.context_features
        self.time_shift = nn.Linear(given, width) if given else None
        zero_layer(self.layers[-1])

    def forward(self, x: Tensor, t: float | Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The network's output [B, C_out, H, W] for x [B, C_in, H, W]."""
        with range_("forward", self):
            check_input("ConvNet", x, self.layers)
            if x.ndim != 4 or x.shape[1] != self.channels_in or 0 in x.shape[2:]:
                raise ValueError(f"ConvNet: x must be [B, {self.channels_in}, H, W]; got {tuple(x.shape)}")
            activate = ACTIVATIONS[self.activation]
            h = self.layers[0](x)
            given = conditions("ConvNet", self.embedding, t, context, x, self.context_features)
            if given is not None and self.time_shift is not None:
                h = h + self.time_shift(given)[:, :, None, None]
            return self.layers[2](activate(self.layers[1](activate(h))))


def linear_of(kind: str, name: str, layer: Any) -> tuple[Tensor, Tensor | None]:
    """The layer's weight and bias; ValueError unless a call of it would compute nn.Linear's result and no more.

    A hook, and a forward of a subclass or of this instance, would not run. A parametrization does.
    """
    own = not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward
    if own or not is_plain(layer, (type(layer),)):
        wanted = "an nn.Linear without hooks and without a forward of its own"
        raise ValueError(f"{kind}: {name} must be {wanted}; got {type(layer).__name__}")
    return layer.weight, layer.bias


def zero_layer(layer: nn.Module) -> None:
    """Set all parameters of the layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
