"""A residual network on vectors, in plain torch: the conditioner of ``ResidualMLP`` and of nflows' ``ResidualNet``.

    h_0 = W x + V c + b                                        c is a context, of one row or of one per sample
    r   = W_2 dropout(act(N_2(W_1 act(N_1(h)) + b_1))) + b_2   N: batch norm, or nothing
    h  <- h + r,  with a context  h + r * sigmoid(C c + d)     once per block
    out = W_n h + b_n

x [B, n_in], c [B or 1, n_c], h [B, H], out [B, n_out]. Sources: residual blocks with the activation first (arXiv
1603.05027), as conditioners of flows (1906.04032), gated by a context (1612.08083).

A gate is multiplied in the pass that adds the block's input, without a concatenation. The products with a context
of one row have one row, and W x + (V c + b) is one product. Without gradients every elementwise step writes where
its input was, and nothing is concatenated. On a CPU a long batch is computed in parts that fit the cache, unless
its rows depend on each other (batch statistics) or on the order in which they are computed (dropout).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import autocast_dtype, cat
from ..rows import one_row, rows_at_once
from .activations import IN_PLACE

Layer = tuple[Tensor, Tensor | None]
"""The weight [out, in] and the bias [out] or None of a linear layer."""


class ResidualBlock(NamedTuple):
    """The parts of one block.

    Args:
        layers: (W_1, b_1) and (W_2, b_2), of H features in and out.
        norms: N_1 and N_2; None for no batch norm. In training they take statistics of the batch and count it.
        gate: (C [H, n_c], d [H]); None in a network without a context.
    """

    layers: tuple[Layer, Layer]
    norms: tuple[nn.BatchNorm1d, nn.BatchNorm1d] | None = None
    gate: Layer | None = None


class ResidualNetwork(NamedTuple):
    """A network's weights and options. The shapes are not checked.

    Args:
        first: ([W | V], b); the columns of x come first.
        blocks: the blocks.
        last: (W_n, b_n).
        activation: elementwise; it is called on tensors that it must not write to.
        dropout: the probability with which an element is dropped now: 0 outside training.
    """

    first: Layer
    blocks: Sequence[ResidualBlock]
    last: Layer
    activation: Callable[[Tensor], Tensor]
    dropout: float = 0.0


Terms = Sequence[Tensor]
"""V c and C c + d of every block, each [B or 1, H]."""

_SAVE_RESULT = (F.relu, torch.relu, torch.tanh, F.elu)  # their derivatives are functions of the result


def residual_network(
    x: Tensor,
    net: ResidualNetwork,
    context: Tensor | None = None,
    *,
    terms: Terms | None = None,
    transposed: bool = False,
) -> Tensor:
    """out [B, n_out] of x [B, n_in].

    Args:
        x: [B, n_in].
        net: the network.
        context: c [B or 1, n_c], of x's dtype (``rows.one_row``).
        terms: ``context_terms(context, net)``, where it was computed before, in place of ``context``.
        transposed: out has strides (1, B): all samples of one output are neighbours in memory, as
            ``linfast.ops.rq_spline`` reads them fastest.
    """
    if terms is None and context is not None:
        context = one_row(context)
        if context.shape[0] == 1 != x.shape[0]:
            terms, context = context_terms(context, net), None
    rows = rows_at_once(x, lambda: _widths(net))
    if rows is None:
        return _network(x, net, context, terms, transposed)
    cut = [_parts(each, x.shape[0], rows) for each in (context, *(() if terms is None else terms))]
    outs = [
        _network(part, net, of_context, None if terms is None else of_terms, transposed)
        for part, (of_context, *of_terms) in zip(x.split(rows), zip(*cut, strict=False), strict=False)
    ]
    return torch.cat([out.t() for out in outs], dim=1).t() if transposed else torch.cat(outs)


def context_terms(context: Tensor, net: ResidualNetwork) -> Terms:
    """V c and C c + d of every block, each [B or 1, H]."""
    return [F.linear(context, weight, bias) for weight, bias in context_layers(net, context.shape[1])]


def context_layers(net: ResidualNetwork, features: int) -> list[Layer]:
    """The layers that read a context of so many features: (V, None), and (C, d) of every block."""
    return [(_split(net, features)[1], None), *(block.gate for block in net.blocks if block.gate is not None)]


def _split(net: ResidualNetwork, features: int) -> tuple[Tensor, Tensor]:
    """W and V, for a context of so many features."""
    weight = net.first[0]
    of_x, of_context = weight.split((weight.shape[1] - features, features), dim=1)
    return of_x, of_context


def uses_batch(norm: nn.BatchNorm1d) -> bool:
    """Whether its result for a row depends on the other rows."""
    return norm.training or norm.running_mean is None


def _widths(net: ResidualNetwork) -> list[int | None]:
    """Values per row of the layers; None where rows depend on each other, or on random numbers."""
    mixes = net.dropout > 0 or any(uses_batch(norm) for block in net.blocks for norm in block.norms or ())
    return [None if mixes else net.first[0].shape[0], net.last[0].shape[0]]


def _parts(tensor: Tensor | None, batch: int, rows: int) -> Iterator[Tensor | None]:
    """The parts of a tensor [B or 1, ...] that belong to the parts of x."""
    if tensor is not None and tensor.shape[0] == batch:
        yield from tensor.split(rows)
        return
    while True:
        yield tensor


def _network(
    x: Tensor, net: ResidualNetwork, context: Tensor | None, terms: Terms | None, transposed: bool
) -> Tensor:
    """``residual_network`` on all rows at once."""
    activation, writes = net.activation, _may_write(x)
    on_new = IN_PLACE.get(activation, activation) if writes or activation in _SAVE_RESULT else activation
    weight, bias = net.first
    gates: Iterator[Tensor] = iter(())
    if terms is not None:
        term, *of_blocks = terms
        of_x, gates = _split(net, weight.shape[1] - x.shape[1])[0], iter(of_blocks)
        if term.shape[0] == 1:
            h = F.linear(x, of_x, term[0] if bias is None else term[0] + bias)
        else:
            h = F.linear(x, of_x, bias)
            h = h.add_(term) if writes else h + term
    elif context is None:
        h = F.linear(x, weight, bias)
    else:
        if writes:
            of_x, of_context = _split(net, context.shape[1])
            h = F.linear(x, of_x, bias).addmm_(context, of_context.t())
        else:  # the gradient of one weight is one product
            h = F.linear(cat((x, context), dim=1), weight, bias)
        gates = (F.linear(context, *block.gate) for block in net.blocks if block.gate is not None)
    for block in net.blocks:
        norms = block.norms
        r = activation(h) if norms is None else on_new(norms[0](h))
        r = F.linear(r, *block.layers[0])
        r = on_new(r if norms is None else norms[1](r))
        if net.dropout:
            r = F.dropout(r, net.dropout, True)
        r = F.linear(r, *block.layers[1])
        gate = next(gates, None)
        if gate is None:
            h = h.add_(r) if writes else h + r
        elif writes:
            h = h.addcmul_(r, gate.sigmoid())
        else:
            h = torch.addcmul(h, r, gate.sigmoid())
    weight, bias = net.last
    if not transposed:
        return F.linear(h, weight, bias)
    out = weight @ h.t() if bias is None else torch.addmm(bias[:, None], weight, h.t())
    return out.t()


def _may_write(x: Tensor) -> bool:
    """Whether a step may overwrite its input: no gradient, transform of torch.func, autocast or tracer needs it."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or autocast_dtype(x.device.type) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
