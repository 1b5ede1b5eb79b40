"""Which layers of a flow run as one: channel-linear layers fold into one map, and a coupling takes it along.

    y = W_n(... W_1 x + b_1 ...) + b_n = W x + b         Mix, Householder, ActNorm and Permute in a row
    y = W u + b,  u the coupling of x or its inverse     an AffineCoupling and the row after it

in the order that is run, so that an inverse folds the layers' inverses. W and b are formed in the
graph at every call (or once inside ``linfast.freeze``), in fp32 or wider and outside autocast; log|det| is
the sum of the parts'. A row without a Mix or Householder runs layer by layer: a scaling or a
permutation costs less as itself than as a product. So does one layer alone, a layer with hooks, with
parametrizations or of a subclass, whose own code must run, and an ActNorm that waits for its first batch.

Only where the ops run their kernels. In plain torch on a CPU nothing is saved by one op for two, and
folding costs what it saves: interleaved runs of an image flow 4 x 32 x 32, batch 16, and of a vector
flow 64, batch 1024, stood at 0.90 to 1.07 of layer by layer, noise included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import outside_autocast, tensor_of, uses_triton
from ..freeze import derived
from ..ops.channel_mix import channel_mix
from .actnorm import ActNorm
from .bijection import Bijection, constant_log_det, position_count, run, wide
from .couplings import AffineCoupling
from .mix import Householder, Mix, Permute

__all__ = ["Folded", "Single", "fold", "is_linear", "is_plain", "segments"]

_PRODUCTS = (Mix, Householder)


def segments(bijections: nn.ModuleList, x: Tensor, inverse: bool) -> list[Single | Folded]:
    """What to run one after another for g_n(... g_1(x)), or for the inverse of it."""
    layers: list[Any] = list(reversed(bijections) if inverse else bijections)
    if not uses_triton(x) or nn.modules.module._has_any_global_hook():
        return [Single(layer) for layer in layers]
    result: list[Single | Folded] = []
    while layers:
        coupling = layers[0] if is_plain(layers[0], (AffineCoupling,)) else None
        row = _leading_row(layers[1:] if coupling else layers)
        if row and (coupling or len(row) > 1):
            result.append(Folded(bijections, coupling, row))
            layers = layers[len(row) + (coupling is not None) :]
        else:
            result.append(Single(layers[0]))
            layers = layers[1:]
    return result


def _leading_row(layers: Sequence[nn.Module]) -> tuple[Any, ...]:
    """The channel-linear layers in front; none where none of them is a product."""
    count = next((i for i, layer in enumerate(layers) if not is_linear(layer)), len(layers))
    row = tuple(layers[:count])
    return row if any(isinstance(layer, _PRODUCTS) for layer in row) else ()


def is_linear(layer: Any) -> bool:
    if isinstance(layer, ActNorm) and layer.waits_for_data():
        return False
    return is_plain(layer, (*_PRODUCTS, Permute, ActNorm))


def is_plain(layer: Any, kinds: tuple[type, ...]) -> bool:
    """Whether nothing but the class's own code would run; parametrizations make a class of their own."""
    hooks = (
        *(layer._forward_hooks, layer._forward_pre_hooks),
        *(layer._backward_hooks, layer._backward_pre_hooks),
    )
    return type(layer) in kinds and not any(len(h) for h in hooks) and "forward" not in vars(layer)


@dataclass(eq=False)  # Dynamo of torch 2.11 hashes what is called before its fields are there
class Single:
    """One layer as it is."""

    layer: Bijection

    def __call__(
        self, x: Tensor, context: Mapping[str, Any], inverse: bool, log_det: bool
    ) -> tuple[Tensor, Tensor | None]:
        return run(self.layer, x, context, inverse, log_det)


@dataclass(eq=False)
class Folded:
    """A row of channel-linear layers as one map, after a coupling where there is one.

    Args:
        owner: the module that holds all of them; what is derived is kept under its name.
    """

    owner: nn.Module
    coupling: AffineCoupling | None
    row: tuple[Any, ...]

    def __call__(
        self, x: Tensor, context: Mapping[str, Any], inverse: bool, log_det: bool
    ) -> tuple[Tensor, Tensor | None]:
        name = "z" if inverse else "x"
        layers = self.row if self.coupling is None else (self.coupling, *self.row)
        for layer in layers:
            layer._check(name, x, layer.features)
        weight, bias = derived(self.owner, (inverse, self.row), lambda: fold(self.owner, self.row, inverse))
        if self.coupling is None:
            y, total = channel_mix(x, weight, bias), None
        else:
            y, total = self.coupling.transform_then_mix(x, context, inverse, log_det, weight, bias)
        if not log_det:
            return y, None
        of_row = sum(layer.log_abs_det() for layer in self.row) * position_count(x)
        part = constant_log_det(x, -of_row if inverse else of_row)
        return y, part if total is None else total + part


@outside_autocast
def fold(owner: nn.Module, row: Sequence[Any], inverse: bool) -> tuple[Tensor, Tensor | None]:
    """(W [C, C], b [C] or None for 0) of the row, in the order given, in the parameters' dtype."""
    like = tensor_of(owner)
    assert like is not None
    weight, bias = torch.eye(row[0].features, dtype=wide(like).dtype, device=like.device), None
    for layer in row:
        weight, bias = layer.after(weight, bias, inverse)
    return weight.to(like.dtype), None if bias is None else bias.to(like.dtype)
