"""Conditioners: ordinary networks that give a coupling its shift and raw scale.

    MLP      [B, n_in] (+ embedded time, + context) -> [B, n_out]
    ConvNet  [B, C_in, H, W] (+ time) -> [B, C_out, H, W]

The last layer starts at zero, so a new coupling is the identity, and a new
Linearizer of couplings equals its operator A.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .checks import (
    check_choice,
    check_count,
    check_counts,
    check_dense,
    check_flag,
    check_like,
    check_number,
    check_tensor,
    check_time,
)
from .dispatch import cat, outside_autocast
from .ops.activations import ACTIVATION_NAMES, ACTIVATIONS
from .ranges import range_


def check_input(kind: str, x: Tensor, layers: Iterable[nn.Module]) -> None:
    """Raise unless x is a tensor with the dtype and device of the network's first layer."""
    first = next(iter(layers))
    # A parametrized layer has another class, and reading its weight would compute it.
    if type(first) in (nn.Linear, nn.Conv2d) and not torch.compiler.is_compiling():
        check_like(kind, "x", x, first.weight)  # type: ignore[arg-type]
    else:
        check_dense("x", x)


def check_time_features(features: int, least: int = 0) -> int:
    """``features`` as an int; ValueError unless even and at least 4, or 0 (no embedding) if ``least`` is 0."""
    features = check_count("time_features", features, least)
    if features and (features < 4 or features % 2):
        raise ValueError(
            f"time_features must be even and at least 4{' or 0' if least == 0 else ''}; got {features}"
        )
    return features


class SinusoidalEmbedding(nn.Module):
    """t [B] -> [sin(scale t w_k) | cos(scale t w_k)] [B, features], w_k geometric from 1 to 1 / max_period.

    Args:
        features: even, at least 4.
        max_period, scale: the longest period in t is 2 pi max_period / scale.
    """

    def __init__(self, features: int, max_period: float = 10000.0, scale: float = 1.0) -> None:
        super().__init__()
        self.features = check_count("features", features, least=4)
        if self.features % 2:
            raise ValueError(f"features must be even and at least 4; got {features}")
        self.max_period = check_number("max_period", max_period, least=0.0, above=True)
        self.scale = check_number("scale", scale)

    def forward(self, t: Tensor) -> Tensor:
        check_tensor("t", t)
        if t.ndim != 1:
            raise ValueError(f"t must be [B]; got {tuple(t.shape)}")
        half = self.features // 2
        k = torch.arange(half, device=t.device, dtype=t.dtype)
        angles = (self.scale * t)[:, None] * torch.exp(k * (-math.log(self.max_period) / (half - 1)))
        return cat((angles.sin(), angles.cos()), dim=-1)


def time_rows(t: float | Tensor | None, like: Tensor, timed: bool, name: str) -> Tensor | None:
    """t as a tensor, [1] for a number or a 0-d tensor, else [B]; ValueError unless ``timed`` is (t is given)."""
    if timed != (t is not None):
        what = "needs t=" if timed else "was built without time_features"
        raise ValueError(f"{name} {what}; got t={t!r}")
    if t is None:
        return None
    check_time(t, like, like.shape[0])
    if not isinstance(t, Tensor):  # on a GPU as_tensor would wait for a copy
        return torch.full((1,), t, dtype=like.dtype, device=like.device)
    return t.to(like).reshape(-1)


def embed_time(
    embedding: SinusoidalEmbedding | None, t: float | Tensor | None, like: Tensor, name: str
) -> Tensor | None:
    """The embedding [B, features] of t; ValueError where only one of t and ``embedding`` is given."""
    times = time_rows(t, like, embedding is not None, name)
    return None if embedding is None or times is None else embedding(times.expand(like.shape[0]))


class MLP(nn.Module):
    """Linear layers with activations between them: [B, n_in] -> [B, n_out].

    Args:
        n_in, n_out: features in and out.
        hidden: widths of the hidden layers; empty for one linear layer.
        activation: relu, silu, tanh or gelu.
        bias: whether the linear layers have one.
        time_features: size of a sinusoidal embedding of ``t``, appended to x; 0 for none.
        context_features: size n of a ``context`` [B, n], appended to the input; 0 for none.
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
            inputs = self._inputs(x, t, context)
            h = cat(inputs, dim=-1) if len(inputs) > 1 else inputs[0]
            activate = ACTIVATIONS[self.activation]
            for layer in self.layers[:-1]:
                h = activate(layer(h))
            return self.layers[-1](h)

    @outside_autocast
    def folded(self, t: float | Tensor | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """(weights, biases) of an equal network of x alone: the first bias contains t, the same for all samples."""
        layers: list[Any] = list(self.layers)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        time = embed_time(self.embedding, t, weights[0][:1], "MLP")
        if time is not None:
            shift = weights[0][:, self.n_in :] @ time[0]
            weights[0] = weights[0][:, : self.n_in]
            biases[0] = shift if biases[0] is None else biases[0] + shift
        return weights, biases

    def _inputs(self, x: Tensor, t: float | Tensor | None, context: Tensor | None) -> list[Tensor]:
        check_input("MLP", x, self.layers)
        if x.ndim != 2 or x.shape[-1] != self.n_in:
            raise ValueError(f"MLP: x must be [B, {self.n_in}]; got {tuple(x.shape)}")
        if (context is None) != (self.context_features == 0):
            raise ValueError(f"MLP has context_features={self.context_features}; got context={context!r}")
        if context is not None:
            check_like("MLP", "context", context, x)
            if context.shape != (x.shape[0], self.context_features):
                wanted = f"[{x.shape[0]}, {self.context_features}]"
                raise ValueError(f"context must be {wanted} for x {tuple(x.shape)}; got {tuple(context.shape)}")
        time = embed_time(self.embedding, t, x, "MLP")
        return [part for part in (x, time, context) if part is not None]


class ConvNet(nn.Module):
    """3x3, 1x1 and 3x3 convolutions with activations between them: [B, C_in, H, W] -> [B, C_out, H, W].

    Args:
        channels_in, channels_out: C_in and C_out.
        width: channels of the two hidden layers.
        activation: relu, silu, tanh or gelu.
        time_features: size of a sinusoidal embedding of ``t``; 0 for none. A linear map of
            it is added to the first convolution's output.

    Raises:
        ValueError: unknown activation; x of another shape; t is missing, or not expected.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        width: int = 64,
        activation: str = "silu",
        time_features: int = 0,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATION_NAMES)
        self.channels_in = channels_in = check_count("channels_in", channels_in)
        self.channels_out = channels_out = check_count("channels_out", channels_out)
        self.width = width = check_count("width", width)
        self.activation, self.time_features = activation, check_time_features(time_features)
        self.layers = nn.ModuleList(
            (
                nn.Conv2d(channels_in, width, 3, padding=1),
                nn.Conv2d(width, width, 1),
                nn.Conv2d(width, channels_out, 3, padding=1),
            )
        )
        self.embedding = SinusoidalEmbedding(time_features) if time_features else None
        self.time_shift = nn.Linear(time_features, width) if time_features else None
        zero_layer(self.layers[-1])

    def forward(self, x: Tensor, t: float | Tensor | None = None) -> Tensor:
        """The network's output [B, C_out, H, W] for x [B, C_in, H, W]."""
        with range_("forward", self):
            check_input("ConvNet", x, self.layers)
            if x.ndim != 4 or x.shape[1] != self.channels_in or 0 in x.shape[2:]:
                raise ValueError(f"ConvNet: x must be [B, {self.channels_in}, H, W]; got {tuple(x.shape)}")
            activate = ACTIVATIONS[self.activation]
            h = self.layers[0](x)
            time = embed_time(self.embedding, t, x, "ConvNet")
            if time is not None and self.time_shift is not None:
                h = h + self.time_shift(time)[:, :, None, None]
            return self.layers[2](activate(self.layers[1](activate(h))))


def zero_layer(layer: nn.Module) -> None:
    """Set all parameters of the layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
