"""ResidualMLP: a conditioner of residual blocks, in which a time and a context gate every block.

    h = W x + V c + b,   then per block  h <- h + F(h),   out = W_n h + b_n
    F = W_2 dropout(act(N_2(W_1 act(N_1(h)) + b_1))) + b_2,   times sigmoid(C c + d) where there is a c

c is the embedded time and the context, N_1 and N_2 are batch norms, or nothing. ``linfast.ops.residual_network``
evaluates it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .checks import check_choice, check_count, check_flag, check_kind, check_number
from .conditioning import SinusoidalEmbedding, check_time_features, conditions
from .freeze import derived, kept_values
from .nets import check_input, linear_of, zero_layer
from .ops.masked_autoregressive import MASKED_ACTIVATIONS
from .ops.residual_network import (
    ResidualBlock,
    ResidualNetwork,
    Terms,
    all_context_terms,
    pack_context,
    residual_network,
)
from .ranges import range_
from .rows import one_row

_NORM_EPS = 1e-3  # of batch norm: as in nflows, whose networks then have the same formula
# A block's second layer starts with weights in [-1e-3, 1e-3], so that the block is nearly the identity.
_SMALL = 1e-3


class _Thread(threading.local):
    """The context whose products are shared in a ``shared_context`` block of this thread, and these products."""

    def __init__(self) -> None:
        self.context: Tensor | None = None
        self.terms: dict[nn.Module, Terms] = {}


_thread = _Thread()


@contextlib.contextmanager
def shared_context(owner: nn.Module, nets: Sequence[ResidualMLP], context: Tensor) -> Iterator[None]:
    """In the block these networks take their products with this very ``context`` from one product with all weights.

    Networks for another size, dtype or device of context, or with a time, take their own. While ``owner``, which
    holds the networks, is frozen (``freeze``), the joined weights are kept.

    Args:
        context: [B or 1, C].
    """
    size, kind = context.shape[1], (context.dtype, context.device)
    found = {net: net.network() for net in nets if net.context_features == size and not net.time_features}
    mine = {net: own for net, own in found.items() if (own.first[0].dtype, own.first[0].device) == kind}
    networks, before = list(mine.values()), (_thread.context, _thread.terms)
    if len(mine) > 1:
        packed = None
        if kept_values(owner) is not None:
            packed = derived(owner, ("context", size, *mine), lambda: pack_context(networks, size))
        terms = all_context_terms(one_row(context), networks, packed)
        _thread.context, _thread.terms = context, dict(zip(mine, terms, strict=True))
    try:
        yield
    finally:
        _thread.context, _thread.terms = before


class _Block(nn.Module):
    """The layers of one block; ``ResidualMLP`` evaluates them."""

    def __init__(self, hidden: int, given: int, batch_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden, eps=_NORM_EPS) for _ in range(2 * batch_norm))
        self.gate = nn.Linear(given, hidden) if given else None
        for parameter in self.layers[1].parameters():
            nn.init.uniform_(parameter, -_SMALL, _SMALL)


class ResidualMLP(nn.Module):
    """A network of residual blocks: x [B, n_in] -> [B, n_out].

        h = W x + V c + b,   then per block  h <- h + F(h),   out = W_n h + b_n
        F = W_2 dropout(act(N_2(W_1 act(N_1(h)) + b_1))) + b_2,   times sigmoid(C c + d) where there is a c

    c is the embedded time and the context, N_1 and N_2 are batch norms, or nothing. Sources: residual blocks with
    the activation first (arXiv 1603.05027), as conditioners of flows (1906.04032).

    Args:
        n_in, n_out: features in and out.
        hidden: width of all hidden layers.
        blocks: number of residual blocks, of two layers each; 0 for two linear layers.
        activation: relu, silu, tanh, gelu or elu.
        dropout: the probability with which an element is dropped in training, before the second layer of a block.
        batch_norm: normalise before both activations of a block, with eps = 1e-3. In training the statistics are
            those of the batch, so that a coupling is invertible in eval mode only, as with dropout.
        time_features: size of a sinusoidal embedding of ``t``; 0 for none.
        context_features: size n of a ``context`` [B, n], or [1, n] for all samples; 0 for none.
        zero_last: start the last layer at zero.

    Raises:
        TypeError, ValueError: an option is invalid; x has another shape; t or context is missing, of another shape,
            or given to a network without an input for it; in training, batch norm of one sample.
    """

    _config_names = {"blocks": "n_blocks"}

    def __init__(
        self,
        n_in: int,
        n_out: int,
        hidden: int = 64,
        blocks: int = 2,
        activation: str = "relu",
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        time_features: int = 0,
        context_features: int = 0,
        zero_last: bool = True,
    ) -> None:
        super().__init__()
        self.n_in, self.n_out = check_count("n_in", n_in), check_count("n_out", n_out)
        self.hidden = hidden = check_count("hidden", hidden)
        self.activation = check_choice("activation", activation, tuple(MASKED_ACTIVATIONS))
        self.dropout = check_number("dropout", dropout, 0.0, 1.0, below=True)
        check_flag("batch_norm", batch_norm)
        check_flag("zero_last", zero_last)
        self.batch_norm, self.zero_last = batch_norm, zero_last
        self.time_features = check_time_features(time_features)
        self.context_features = check_count("context_features", context_features, least=0)
        self.embedding = SinusoidalEmbedding(time_features) if time_features else None
        given = self.time_features + self.context_features
        self.first = nn.Linear(self.n_in + given, hidden)
        self.n_blocks = check_count("blocks", blocks, least=0)
        self.blocks = nn.ModuleList(_Block(hidden, given, batch_norm) for _ in range(self.n_blocks))
        self.last = nn.Linear(hidden, self.n_out)
        if zero_last:
            zero_layer(self.last)

    def forward(
        self, x: Tensor, t: float | Tensor | None = None, context: Tensor | None = None, *, transposed: bool = False
    ) -> Tensor:
        """The network's output [B, n_out] for x [B, n_in]; ``transposed``: with strides (1, B)."""
        with range_("forward", self):
            check_input("ResidualMLP", x, (self.first,))
            check_flag("transposed", transposed)
            if x.ndim != 2 or x.shape[1] != self.n_in:
                raise ValueError(f"ResidualMLP: x must be [B, {self.n_in}]; got {tuple(x.shape)}")
            given = conditions("ResidualMLP", self.embedding, t, context, x, self.context_features)
            terms = _thread.terms.get(self) if context is not None and context is _thread.context else None
            return residual_network(x, self.network(), given, terms=terms, transposed=transposed, owner=self)

    def network(self) -> ResidualNetwork:
        """The weights and options, as ``linfast.ops.residual_network`` takes them.

        Raises:
            TypeError: a norm is neither an nn.BatchNorm1d nor an nn.SyncBatchNorm.
            ValueError: a layer is not an nn.Linear, or has a hook (such as pruning's) or its own forward.
        """
        blocks = []
        layers: list[Any] = list(self.blocks)
        for i, block in enumerate(layers):
            first, second = (linear_of("ResidualMLP", f"blocks[{i}].layers[{j}]", block.layers[j]) for j in (0, 1))
            gate = None if block.gate is None else linear_of("ResidualMLP", f"blocks[{i}].gate", block.gate)
            norms: Any = tuple(block.norms) or None
            for j, norm in enumerate(block.norms):
                check_kind(f"ResidualMLP: blocks[{i}].norms[{j}]", norm, (nn.BatchNorm1d, nn.SyncBatchNorm))
            blocks.append(ResidualBlock((first, second), norms, gate))
        first, last = linear_of("ResidualMLP", "first", self.first), linear_of("ResidualMLP", "last", self.last)
        dropout = self.dropout if self.training else 0.0
        return ResidualNetwork(first, blocks, last, MASKED_ACTIVATIONS[self.activation], dropout)

    def extra_repr(self) -> str:
        return f"n_in={self.n_in}, n_out={self.n_out}, hidden={self.hidden}, activation={self.activation!r}"
