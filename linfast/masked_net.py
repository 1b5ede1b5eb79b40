"""MaskedMLP: the conditioner of ``MaskedAutoregressive``, a MADE (arXiv 1502.03509).

    h_1 = W_1 x + b_1 + C c,    h_l = W_l act(h_{l-1}) + b_l,    parameters = W_n act(h_{n-1}) + b_n

with every W multiplied by a mask of zeros and ones, so that the parameters of a feature depend only on the features
before it and on c, the context with the embedded time. With ``residual``

    h_l = h_{l-1} + W_l' act(W_l act(h_{l-1}) + b_l) + b_l'

A hidden unit has a degree d and sees the first d features of the order. Degrees rise evenly along a layer from 1 to
D - 1, from 0 where there is a context, so that the parameters of the first feature depend on it. The last layer
starts at zero, so a new transform is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_choice, check_count, check_counts, check_dense, check_flag, check_kind
from .conditioning import SinusoidalEmbedding, check_time_features, conditions
from .dispatch import check_values, has_values
from .nets import check_input, linear_of, zero_layer
from .ops.autoregressive_masks import AutoregressiveMasks
from .ops.masked_autoregressive import MASKED_ACTIVATIONS, Extras, masked_network
from .ranges import range_


class MaskedMLP(nn.Module):
    """A masked network: x [B, D] -> the parameters of every feature, each from the features before it.

    Args:
        features: D.
        per_feature: parameters per feature: 2, shift and raw scale; 1, shift; or those of a spline.
        hidden: widths of the hidden layers, at least one.
        activation: relu, silu, tanh, gelu or elu.
        residual: each width after the first, which must equal it, is a block of two layers whose result is added to
            its input, in place of one layer.
        time_features: size of a sinusoidal embedding of ``t``; 0 for none.
        context_features: size n of a ``context`` [B, n], or [1, n] for all samples; 0 for none. A linear map of the
            embedded time and the context is added to the first hidden layer.
        feature_order: the features, first to last, a permutation of 0 .. D - 1; None for 0, 1, .., D - 1. It is a
            buffer, which ``load_state_dict`` sets too.

    Raises:
        ValueError: unknown activation; widths that do not fit; not a permutation; x of another shape; t or context
            is missing, of another shape, or given to a network without an input for it.
    """

    feature_order: Tensor

    def __init__(
        self,
        features: int,
        per_feature: int = 2,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        residual: bool = False,
        time_features: int = 0,
        context_features: int = 0,
        feature_order: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.features, self.per_feature = check_count("features", features), check_count("per_feature", per_feature)
        self.hidden = check_counts("hidden", hidden)
        self.activation = check_choice("activation", activation, tuple(MASKED_ACTIVATIONS))
        check_flag("residual", residual)
        self.residual = residual
        if not self.hidden or (residual and (len(self.hidden) < 2 or len(set(self.hidden)) > 1)):
            wanted = "at least two equal widths for residual=True" if residual else "at least one width"
            raise ValueError(f"hidden must hold {wanted}; got {self.hidden}")
        self.time_features = check_time_features(time_features)
        self.context_features = check_count("context_features", context_features, least=0)
        self._order: Sequence[int] = range(self.features)
        if feature_order is not None:
            self._order = _permutation(feature_order, self.features)
        found = torch.arange(self.features) if feature_order is None else torch.tensor(self._order)
        self.register_buffer("feature_order", found)
        widths = (self.features, self.hidden[0], *self._rest(), self.per_feature * self.features)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        zero_layer(self.layers[-1])
        given = self.time_features + self.context_features
        self.embedding = SinusoidalEmbedding(time_features) if time_features else None
        self.condition = nn.Linear(given, self.hidden[0], bias=False) if given else None
        self._masks: AutoregressiveMasks | None = None
        self._seen = _state_of(found)  # of the buffer, when ``_order`` was read from it
        self.register_load_state_dict_post_hook(_follow)
        if has_values(found):
            self._masks = self._make_masks()  # now: torch.compile cannot trace it

    def forward(self, x: Tensor, t: float | Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The parameters [B, per_feature D] for x [B, D]: those of feature 0, then of feature 1, and so on."""
        with range_("forward", self):
            extras, weights, biases = self.extras(x, t, context), *self.tensors()
            return masked_network(x, self.masks, weights, biases, MASKED_ACTIVATIONS[self.activation], extras)

    @property
    def masks(self) -> AutoregressiveMasks:
        """The masks of the layers, with the degrees of their units, for the current values of ``feature_order``."""
        order = self.feature_order
        if not torch.compiler.is_compiling() and self._seen != _state_of(order):
            self._seen = _state_of(order)
            if has_values(order) and (found := _permutation(order, self.features)) != tuple(self._order):
                self._order, self._masks = found, None
        if self._masks is None:  # not made yet by a constructor on the meta device, where a network may be huge
            self._masks = self._make_masks()
        return self._masks

    def tensors(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """(weights, biases) of the layers; the masks are not applied to the weights.

        Raises:
            ValueError: a layer is not an nn.Linear, or has a hook (such as pruning's) or its own forward.
        """
        found = [linear_of("MaskedMLP", f"layers[{i}]", layer) for i, layer in enumerate(self.layers)]
        return [weight for weight, _ in found], [bias for _, bias in found]

    def extras(self, x: Tensor, t: float | Tensor | None = None, context: Tensor | None = None) -> Extras:
        """What t and context add to the hidden layers, as ``lf.ops.masked_autoregressive`` takes it."""
        check_input("MaskedMLP", x, self.layers)
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"MaskedMLP: x must be [B, {self.features}]; got {tuple(x.shape)}")
        given = conditions("MaskedMLP", self.embedding, t, context, x, self.context_features)
        term = None if self.condition is None else self.condition(given).expand(x.shape[0], -1)
        return ((term, None), *((None, None),) * (len(self.layers) - 2))

    def extra_repr(self) -> str:
        return f"features={self.features}, per_feature={self.per_feature}, activation={self.activation!r}"

    def _rest(self) -> tuple[int, ...]:
        """The widths of all hidden layers after the first."""
        return tuple(width for width in self.hidden[1:] for _ in range(1 + self.residual))

    def _make_masks(self) -> AutoregressiveMasks:
        n, least = self.features, int(self.features > 1 and self.condition is None)
        with torch.device("cpu"):
            of_features = 1 + torch.tensor(self._order).argsort()
            widths = (self.hidden[0], *self._rest())
            degrees = [of_features, *(least + torch.arange(width) * (n - least) // width for width in widths)]
            masks = [b[:, None] >= a for a, b in pairwise(degrees)]
            masks.append((of_features[:, None] > degrees[-1]).repeat_interleave(self.per_feature, 0))
        blocks = [0, *(i for k in range(1, len(self.hidden)) for i in (0, 2 * k - 1))] if self.residual else None
        return AutoregressiveMasks(masks, self.per_feature, adds=blocks)


def _follow(net: MaskedMLP, _: object = None) -> None:
    """After load_state_dict: make the masks, which torch.compile cannot trace."""
    _ = net.masks


def _state_of(tensor: Tensor) -> tuple[int, int]:
    """(its identity, the number of writes to it that torch has counted: none to an inference tensor)."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _permutation(order: Any, features: int) -> tuple[int, ...]:
    if isinstance(order, Tensor):
        check_dense("feature_order", order)
        check_values("feature_order", order)
        order = order.tolist() if order.ndim == 1 else [order]
    check_kind("feature_order", order, Sequence, "a sequence of integers")
    found = tuple([check_count("each of feature_order", i, least=0) for i in order])
    if sorted(found) != list(range(features)):
        last = features - 1
        raise ValueError(f"feature_order must hold 0 to {last} once each for features = {features}; got {found}")
    return found
