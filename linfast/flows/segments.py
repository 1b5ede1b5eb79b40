"""Segments run layers of a flow: each takes (x, context, inverse, log_det) and returns (y, log|det| or None).

``linfast.flows.match`` decides which of them run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import outside_autocast, tensor_of
from ..freeze import derived
from ..kernels.stack_configs import LayersConfig, StackEntry
from ..kernels.stack_spec import StackSpec
from ..ops.channel_mix import channel_mix
from ..ops.coupling_stack import run_packed
from ..ops.plain_couplings import PlainCoupling, run_couplings
from ..ops.stack_weights import CouplingStack, PackedStack
from ..rows import one_row
from .bijection import Bijection, constant_log_det, run, wide
from .couplings import AffineCoupling
from .undo import Context, Outputs

Segment = Callable[[Tensor, Context, bool, bool], Outputs]


# eq=False: Dynamo of torch 2.11 hashes the called object before its fields are set.
@dataclass(eq=False)
class Single:
    """One layer, called by its public methods."""

    layer: Bijection

    def __call__(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        return run(self.layer, x, context, inverse, log_det)


@dataclass(eq=False)
class OneLaunch:
    """All layers of a flow in one op: one launch, or one for each linear layer.

    Args:
        stack: the layers' weights and options.
        tiles: the kernels' tiles.
        packed: the weights as the kernels read them.
        spec: describes the stack to the kernels, with the direction and whether log|det| is computed.
    """

    stack: CouplingStack
    tiles: StackEntry | LayersConfig
    packed: PackedStack
    spec: StackSpec

    def __call__(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        y, total = run_packed(x, self.packed, self.spec)
        return y, None if total is None else self.stack.with_maps(total, inverse)


@dataclass(eq=False)
class Couplings:
    """Affine couplings in a loop of plain torch.

    Args:
        layers: the modules.
        couplings: their weights and options.
        features, dtype: those of the input; for any other input the layers run instead and raise their errors.
    """

    layers: list[AffineCoupling]
    couplings: list[PlainCoupling]
    features: int
    dtype: torch.dtype

    def __call__(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        if x.ndim == 2 and x.shape[1] == self.features and x.dtype == self.dtype:
            given = context.get("context")
            return run_couplings(x, self.couplings, None if given is None else one_row(given), inverse, log_det)
        total: Tensor | None = None
        for layer in reversed(self.layers) if inverse else self.layers:
            x, part = run(layer, x, context, inverse, log_det)
            total = part if total is None or part is None else total + part
        return x, total


@dataclass(eq=False)
class Folded:
    """Consecutive channel-linear layers as one map, after a coupling where there is one.

    y = W_n(... W_1 x + b_1 ...) + b_n = W x + b. W and b are computed with gradients at every call (once inside
    ``linfast.freeze``), in fp32 or wider and outside autocast; log|det| is the sum over the layers.

    Args:
        owner: the module that holds all of the layers; ``freeze`` caches W and b for it.
    """

    owner: nn.Module
    coupling: AffineCoupling | None
    row: tuple[Any, ...]

    def __call__(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        name = "z" if inverse else "x"
        layers = self.row if self.coupling is None else (self.coupling, *self.row)
        for layer in layers:
            layer._check(name, x, layer.features)
        row = [(layer, layer.numbers()) for layer in self.row]
        weight, bias = derived(self.owner, (inverse, self.row), lambda: fold(self.owner, row, inverse))
        if self.coupling is None:
            y, total = channel_mix(x, weight, bias), None
        else:
            y, total = self.coupling.transform_then_mix(x, context, inverse, log_det, weight, bias)
        if not log_det:
            return y, None
        of_row = derived(self.owner, self.row, lambda: sum(layer.log_abs_det(of_layer) for layer, of_layer in row))
        part = constant_log_det(x, of_row, inverse)
        return y, part if total is None else total + part


@outside_autocast
def fold(
    owner: nn.Module, row: Sequence[tuple[Any, Sequence[Tensor]]], inverse: bool
) -> tuple[Tensor, Tensor | None]:
    """(W [..., C, C], b [..., C] or None for 0) of the layers in order, each with its numbers; owner's dtype."""
    like = tensor_of(owner)
    assert like is not None
    weight, bias = torch.eye(row[0][0].features, dtype=wide(like).dtype, device=like.device), None
    for layer, numbers in row:
        weight, bias = layer.after(numbers, weight, bias, inverse)
    return weight.to(like.dtype), None if bias is None else bias.to(like.dtype)
