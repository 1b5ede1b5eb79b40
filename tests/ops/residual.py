"""Residual networks of random weights, as lists of tensors, for tests of ``linfast.ops.residual_stack``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linfast.ops.masked_autoregressive import MASKED_ACTIVATIONS
from linfast.ops.residual_network import ResidualBlock, ResidualNetwork, all_context_terms, residual_network
from linfast.ops.residual_stack import residual_stack
from tests.ops.budget import DEVICE, Outputs


class Net(NamedTuple):
    """The sizes and options of a network; ``context``: its features, 0 for none."""

    n_in: int = 3
    hidden: int = 20
    n_out: int = 23
    blocks: int = 2
    context: int = 0
    norms: bool = False
    activation: str = "relu"
    transposed: bool = False

    def tensors(self, batch: int, rows: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """x, the context of so many rows where there is one, and the weights; sums are near 1."""
        given = [(rows or batch, self.context)] if self.context else []
        drawn = [torch.randn(shape) for shape in ((batch, self.n_in), *given)]
        for n_out, n_in in self._layers():
            drawn += [torch.randn(n_out, n_in) / n_in**0.5, torch.randn(n_out)]
        for _ in range(2 * self.blocks * self.norms):
            weight, shift, mean, var = torch.randn(4, self.hidden)
            drawn += [weight, shift, mean, var.abs() + 0.5]
        return [t.to(DEVICE, dtype) for t in drawn]

    def _layers(self) -> Iterator[tuple[int, int]]:
        yield self.hidden, self.n_in + self.context
        yield from [(self.hidden, self.hidden)] * 2 * self.blocks
        yield from [(self.hidden, self.context)] * self.blocks * (self.context > 0)
        yield self.n_out, self.hidden

    def network(self, weights: Sequence[Tensor]) -> ResidualNetwork:
        """The network of these tensors."""
        rest = iter(weights)
        first, *inner = [(next(rest), next(rest)) for _ in self._layers()]
        gates = inner[2 * self.blocks : -1] or [None] * self.blocks
        norms = [self._norm([next(rest) for _ in range(4)]) for _ in range(2 * self.blocks * self.norms)]
        blocks = [
            ResidualBlock(tuple(inner[2 * i : 2 * i + 2]), tuple(norms[2 * i : 2 * i + 2]) or None, gates[i])
            for i in range(self.blocks)
        ]
        return ResidualNetwork(first, blocks, inner[-1], MASKED_ACTIVATIONS[self.activation])

    def _norm(self, tensors: Sequence[Tensor]) -> nn.BatchNorm1d:
        """A norm with these tensors."""
        norm = nn.BatchNorm1d(self.hidden, eps=1e-3, device="meta").eval()
        norm.weight, norm.bias = (nn.Parameter(tensor.detach()) for tensor in tensors[:2])
        norm.running_mean, norm.running_var = tensors[2:]
        return norm

    def run(self, x: Tensor, *tensors: Tensor) -> Outputs:
        """The network as its callers run it: without gradients, in one launch where kernels run."""
        context, weights = (tensors[0], tensors[1:]) if self.context else (None, tensors)
        with torch.no_grad():
            return (residual_network(x, self.network(weights), context, transposed=self.transposed),)

    def stack(self, x: Tensor, *tensors: Tensor, precision: str | None = None) -> Outputs:
        """The op alone, in one mode."""
        context, weights = (tensors[0], tensors[1:]) if self.context else (None, tensors)
        net = self.network(weights)
        with torch.no_grad():
            terms = None if context is None else all_context_terms(context, [net])[0]
            return (residual_stack(x, net, self.activation, terms, self.transposed, precision=precision),)
