"""Is a network a MADE of nflows, glasflow or normflows? All three derive from the code of one paper.

    hidden layer 1   value = W x + b + context term          nflows: the activation of a linear layer of the context
    a block          feedforward  value = W a(value) + b     a residual one adds two such layers to its input
    batch norm       feedforward  after the activation: it is multiplied into the next layer
                     residual     before it

With a context, a residual block of nflows adds a linear layer of it between its two layers; one of normflows
multiplies its second layer by a sigmoid of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flows.reversible import DROPOUTS
from ..ops.masked_autoregressive import Extras
from .adapter import Unfit
from .identity import changed_method, defined_as, is_hooked
from .masked import Norms, Weights

_OWN = ("MADE", "MaskedLinear", "MaskedFeedforwardBlock", "MaskedResidualBlock")
_RANDOM = (nn.RReLU, *DROPOUTS)
_PLAIN = (nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.ModuleList, nn.Identity)
_GATED = ("normflows.nets.made",)
"""The MADEs whose residual blocks multiply by a gate of the context, and that have no activation after layer 1."""


@dataclass
class Hidden:
    """A hidden layer of a MADE.

    Args:
        linear: its MaskedLinear.
        activated, adds: see AutoregressiveMasks.
        term: (linear layer of the context, whether the activation follows) that is added.
        gate: the linear layer of the context whose sigmoid multiplies.
        norm: the batch norm of its value.
        folded: the batch norm that the next layer reads through.
    """

    linear: Any
    activated: bool
    adds: int = 0
    term: tuple[nn.Linear, bool] | None = None
    gate: nn.Linear | None = None
    norm: nn.BatchNorm1d | None = None
    folded: nn.BatchNorm1d | None = None


@dataclass(frozen=True)
class Made:
    """A recognised MADE: its hidden layers in order, its last layer, and the activation."""

    hidden: list[Hidden]
    last: Any
    activation: Callable[[Tensor], Tensor]

    def weights(self) -> Callable[[], Weights]:
        """A function that returns the current weights and biases, with the folded batch norms."""
        linears = [*(layer.linear for layer in self.hidden), self.last]
        folded = [None, *(layer.folded for layer in self.hidden)]
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        if not any(norm is not None for norm in folded):
            return lambda: (weights, biases)

        def read() -> Weights:
            scaled, shifted = [*weights], [*biases]
            for i, (linear, norm) in enumerate(zip(linears, folded, strict=True)):
                if norm is not None:
                    scale, shift = _scale_and_shift(norm)
                    scaled[i] = weights[i] * scale
                    shifted[i] = F.linear(shift, weights[i] * linear.mask, biases[i])
            return scaled, shifted

        return read

    def norms(self) -> Callable[[], Norms] | None:
        """A function that returns the current (scale, shift) of each hidden layer's batch norm, or None."""
        norms = [layer.norm for layer in self.hidden]
        if not any(norm is not None for norm in norms):
            return None
        return lambda: [None if norm is None else _scale_and_shift(norm) for norm in norms]

    def extras(self) -> Callable[[Any, int], Extras | None]:
        """(context, B) -> the extras. All rows of a context that is a view of one row are evaluated once."""
        pairs, activation = [(layer.term, layer.gate) for layer in self.hidden], self.activation
        nothing, first = ((None, None),) * len(pairs), self.hidden[0].term
        size = None if first is None else first[0].in_features

        def extras(context: Any, rows: int) -> Extras | None:
            if context is None:
                return nothing
            if type(context) not in (Tensor, nn.Parameter) or context.shape != (rows, size):
                return None
            if rows > 1 and context.stride(0) == 0 and not (context.requires_grad and torch.is_grad_enabled()):
                context = context[:1]
            found = []
            for term, gate in pairs:
                added = None if term is None else F.linear(context, term[0].weight, term[0].bias)
                if term is not None and term[1] and added is not None:
                    added = activation(added)
                gated = None if gate is None else F.linear(context, gate.weight, gate.bias).sigmoid()
                found.append((added, gated))
            return found

        return extras


def masks_of(net: Any) -> list[Tensor]:
    """The masks of its layers, from the first to the last."""
    inside = [net.initial_layer]
    for block in net.blocks:
        inside += block.linear_layers if hasattr(block, "linear_layers") else [block.linear]
    return [linear.mask for linear in (*inside, net.final_layer)]


def is_random(module: nn.Module) -> bool:
    """Whether each evaluation of the network gives other values, or changes the module."""
    random = isinstance(module, nn.BatchNorm1d) or (isinstance(module, nn.Dropout) and module.p > 0)
    return random and module.training


def find_made(net: Any, where: str) -> Made:
    """The MADE that the module ``where`` defines; raises Unfit where the network is another one."""
    _check_modules(net, where)
    gated, blocks, hidden = where in _GATED, [*net.blocks], list[Hidden]()
    residual = all(defined_as(block, where, "MaskedResidualBlock") for block in blocks)
    if not residual and not all(defined_as(block, where, "MaskedFeedforwardBlock") for block in blocks):
        raise Unfit("some of its blocks are residual, some feedforward")
    if not gated:
        residual = net.use_residual_blocks
    owners = [each for each in (net, *blocks) if hasattr(each, "activation")]
    activation = owners[0].activation if owners else torch.relu
    if any(each.activation is not activation for each in owners):
        raise Unfit("its blocks have several activations")
    if residual and getattr(activation, "inplace", False):
        raise Unfit("its activation writes to the input of its residual blocks")
    context = _context_layer(net)
    term = None if context is None else (context, not gated)
    hidden.append(Hidden(net.initial_layer, bool(residual and blocks) or not (residual or gated), term=term))
    for i, block in enumerate(blocks):
        if residual:
            _add_residual(hidden, block, gated, i == len(blocks) - 1)
            continue
        hidden[-1].folded = _checked(block.batch_norm)
        hidden.append(Hidden(block.linear, True))
    if not all(
        defined_as(linear, where, "MaskedLinear") for linear in (*(h.linear for h in hidden), net.final_layer)
    ):
        raise Unfit("one of its layers is no MaskedLinear")
    return Made(hidden, net.final_layer, activation)


def _check_modules(net: nn.Module, where: str) -> None:
    """Raise Unfit where the network or a layer is of another class, or its call runs more than its forward."""
    if not defined_as(net, where, "MADE"):
        raise Unfit(f"its autoregressive_net is a {type(net).__name__}, no MADE")
    if not isinstance(getattr(net, "preprocessing", None), (nn.Identity, type(None))):
        raise Unfit(f"it preprocesses its inputs, by a {type(net.preprocessing).__name__}")
    activations = [each for name, each in net.named_modules() if name.rpartition(".")[2] == "activation"]
    for module in net.modules():
        kind, is_activation = type(module).__name__, module in activations
        known = type(module) in _PLAIN or any(defined_as(module, where, name) for name in _OWN)
        if not (known or is_activation):
            raise Unfit(f"its MADE has a {kind}")
        if is_hooked(module):
            raise Unfit(f"a {kind} of its MADE has a hook or a parametrization, which would be bypassed")
        if type(module) is not nn.ModuleList and changed_method(module, ("forward",)) is not None:
            raise Unfit(f"the forward of a {kind} of its MADE was replaced: not the library's own")
        if is_activation and (isinstance(module, _RANDOM) or [*module.parameters(), *module.buffers()]):
            raise Unfit(f"its activation {kind} is random or has tensors")


def _add_residual(hidden: list[Hidden], block: Any, gated: bool, last: bool) -> None:
    first, second = block.linear_layers
    context = _context_layer(block)
    norms = block.batch_norm_layers if block.use_batch_norm else (None, None)
    hidden[-1].norm = _checked(norms[0])
    at = len(hidden)
    term = None if gated or context is None else (context, False)
    hidden.append(Hidden(first, True, term=term, norm=_checked(norms[1])))
    hidden.append(Hidden(second, not last, adds=at, gate=context if gated else None))


def _context_layer(owner: Any) -> nn.Linear | None:
    """The layer of the context that a MADE or a block has."""
    layer: nn.Linear | None = getattr(owner, "context_layer", None)
    if layer is not None and type(layer) is not nn.Linear:
        raise Unfit(f"its context_layer is a {type(layer).__name__}, no Linear")
    return layer


def _checked(norm: nn.BatchNorm1d | None) -> nn.BatchNorm1d | None:
    if norm is not None and (type(norm) is not nn.BatchNorm1d or not norm.track_running_stats):
        raise Unfit("its batch norm is of another kind or has no running statistics")
    return norm


def _scale_and_shift(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """(scale, shift) [H] of a batch norm in eval mode."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
