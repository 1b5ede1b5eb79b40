"""Recognising a conditioner as the ResidualNet of nflows, glasflow or normflows, and running it as one function.

As with an MLP (``mlp.py``) it is recognised again at every call that would bypass its modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops.activations import ACTIVATIONS
from ..ops.residual_network import ResidualBlock, ResidualNetwork, Terms, residual_network, uses_batch
from .identity import is_own_method
from .mlp import activation_of, is_class, is_plain, is_untouched, layer_of

_WHERE = ("nflows.nn.nets.resnet", "glasflow.nflows.nn.nets.resnet", "normflows.nets.resnet")
_PERIODIC = ("normflows.utils.nn", "PeriodicFeaturesElementwise")


@dataclass(frozen=True, eq=False)
class Residual:
    """A residual network of a library.

    Args:
        network: its layers, the parameters themselves.
        before: the module that runs on x first, row by row, or None.
        activation: its name and constants.
        owner: the library's module.
    """

    network: ResidualNetwork
    before: nn.Module | None
    activation: tuple[str, tuple[float | str, ...]]
    owner: nn.Module

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values per row of its layers."""
        return self.network.first[0].shape[0], self.network.last[0].shape[0]

    @property
    def widths(self) -> tuple[int | None, ...]:
        """The same, with None where rows now depend on each other or on random numbers."""
        norms = [norm for block in self.network.blocks for norm in block.norms or ()]
        mixes = self.network.dropout > 0 or any(map(uses_batch, norms))
        return (*self.sizes, None) if mixes else self.sizes

    def takes(self, x: Tensor, context: Any) -> bool:
        """Whether the library's code accepts x [B, n] and the context [B, n_c] or None, without an error."""
        if self.before is not None and x.shape[1] == 0:
            return False
        gates = [block.gate for block in self.network.blocks]
        if context is None:
            return x.shape[1] == self.network.first[0].shape[1]
        if not isinstance(context, Tensor) or context.ndim != 2 or context.dtype != x.dtype:
            return False
        rows, features = context.shape
        fits = all(gate is not None and gate[0].shape[1] == features for gate in gates)
        return fits and rows == x.shape[0] and x.shape[1] + features == self.network.first[0].shape[1]

    def __call__(self, x: Tensor, context: Tensor | None, terms: Terms | None = None) -> Tensor:
        """The network's output, transposed; ``terms``: those of the context, where they are known."""
        x = x if self.before is None else self.before(x)
        return residual_network(x, self.network, context, terms=terms, transposed=True, owner=self.owner)

    def __str__(self) -> str:
        first, last = self.network.first[0], self.network.last[0]
        name, constants = self.activation
        words = [name, *(f"{value:g}" if isinstance(value, float) else value for value in constants)]
        blocks = len(self.network.blocks)
        return f"ResidualNet {first.shape[1]}-{first.shape[0]}x{blocks}-{last.shape[0]} {' '.join(words)}"


def find_residual(module: Any) -> Residual | None:
    """The residual network that this module is, or None.

    A hook, a parametrization, a patched method, an activation other than those of ``mlp.py`` or one that writes to
    its input, and blocks that differ in their activation or dropout give None.
    """
    where = type(module).__module__
    if where not in _WHERE or not is_class(type(module), where, "ResidualNet") or not is_untouched(module):
        return None
    parts = module._modules
    if "final_layer" not in parts:  # the check's copy, without submodules
        return None
    before, first, last = (
        parts.get("preprocessing"),
        layer_of(parts["initial_layer"]),
        layer_of(parts["final_layer"]),
    )
    if before is not None and not (is_class(type(before), *_PERIODIC) and is_untouched(before)):
        return None
    owners = [*parts["blocks"]._modules.values()]
    found = [_block(block, where) for block in owners]
    if first is None or last is None or not owners or None in found:
        return None
    activation, dropouts = owners[0].activation, {block.dropout.p * block.dropout.training for block in owners}
    name = None if getattr(activation, "inplace", False) else activation_of(activation)
    if name is None or len(dropouts) > 1 or any(block.activation is not activation for block in owners):
        return None
    function = activation if name[1] not in ((), ("none",)) else ACTIVATIONS.get(name[0], activation)
    blocks = [block for block in found if block is not None]
    return Residual(ResidualNetwork(first, blocks, last, function, dropouts.pop()), before, name, module)


def _block(block: Any, where: str) -> ResidualBlock | None:
    if not is_class(type(block), where, "ResidualBlock") or not is_untouched(block):
        return None
    parts, norms = block._modules, None
    one, two = map(layer_of, parts["linear_layers"]._modules.values())
    gate = layer_of(parts["context_layer"]) if "context_layer" in parts else None
    if one is None or two is None or (gate is None and "context_layer" in parts):
        return None
    if block.use_batch_norm:
        norms = tuple(parts["batch_norm_layers"]._modules.values())
    if norms is not None and not (is_own_method(nn.BatchNorm1d, "forward") and all(map(_is_batch_norm, norms))):
        return None
    dropout = parts["dropout"]
    return ResidualBlock((one, two), norms, gate) if type(dropout) is nn.Dropout and is_untouched(dropout) else None


def _is_batch_norm(norm: Any) -> bool:
    return type(norm) is nn.BatchNorm1d and is_plain(norm)
