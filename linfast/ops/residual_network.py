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
its rows depend on each other (batch statistics) or on the order in which they are computed (dropout). On a GPU a
network without gradients is one launch, where it fits (``residual_stack.py``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import are_plain, autocast_dtype, cat, has_global_hook, is_transformed, uses_triton
from ..rows import one_row, rows_at_once
from .activations import IN_PLACE
from .masked_plain import MASKED_ACTIVATIONS
from .residual_blocks import Step, run_blocks
from .residual_stack import is_one_launch, residual_stack

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


class Terms(NamedTuple):
    """What a context adds to a network.

    Args:
        weight: W, the columns of the first weight that x is multiplied by.
        first: V c + b, [B or 1, H].
        gates: C c + d of every block, each [B or 1, H].
        joined: the tensor whose columns ``first`` and ``gates`` are in turn, where there is one.
    """

    weight: Tensor
    first: Tensor
    gates: Sequence[Tensor]
    joined: Tensor | None = None


_NAMES = {function: name for name, function in MASKED_ACTIVATIONS.items()} | {torch.relu: "relu", F.tanh: "tanh"}
_SAVE_RESULT = (F.relu, torch.relu, torch.tanh, F.elu)  # their derivatives are functions of the result


def residual_network(
    x: Tensor,
    net: ResidualNetwork,
    context: Tensor | None = None,
    *,
    terms: Terms | None = None,
    transposed: bool = False,
    owner: nn.Module | None = None,
) -> Tensor:
    """out [B, n_out] of x [B, n_in].

    Args:
        x: [B, n_in].
        net: the network.
        context: c [B or 1, n_c], of x's dtype (``rows.one_row``).
        terms: ``context_terms(context, net)``, where it was computed before, in place of ``context``.
        transposed: out has strides (1, B): all samples of one output are neighbours in memory, as
            ``linfast.ops.rq_spline`` reads them fastest.
        owner: the module whose weights these are: while it is frozen (``freeze``), they are packed once.
    """
    if terms is None and context is not None:
        context = one_row(context)
        launches = uses_triton(x, net.first[0])
        if launches or context.shape[0] == 1 != x.shape[0]:
            terms = all_context_terms(context, [net])[0] if launches else context_terms(context, net)
            context = None
    rows = rows_at_once(x, lambda: _widths(net))
    if rows is None:
        return _network(x, net, context, terms, transposed, owner)
    given = () if terms is None else (terms.first, *terms.gates)
    cut = [_parts(each, x.shape[0], rows) for each in (context, *given)]
    outs = []
    for part, (of_context, *of_terms) in zip(x.split(rows), zip(*cut, strict=False), strict=False):
        own = None if terms is None else Terms(terms.weight, of_terms[0], of_terms[1:])
        outs.append(_network(part, net, of_context, own, transposed, owner))
    return torch.cat([out.t() for out in outs], dim=1).t() if transposed else torch.cat(outs)


def context_terms(context: Tensor, net: ResidualNetwork) -> Terms:
    """The terms of a context [B or 1, n_c]."""
    of_x, layers = _context_layers(net, context.shape[1])
    first, *gates = (F.linear(context, *layer) for layer in layers)
    return Terms(of_x, first, gates)


def all_context_terms(
    context: Tensor, nets: Sequence[ResidualNetwork], packed: tuple[Tensor, Tensor] | None = None
) -> list[Terms]:
    """The terms of several networks by one product; ``packed``: ``pack_context(nets, n_c)``."""
    found = [_context_layers(net, context.shape[1]) for net in nets]
    layers = [layer for _, of_net in found for layer in of_net]
    weight, bias = _as_one(layers) if packed is None else packed
    product = F.linear(context, weight, bias)
    parts = iter(product.split([len(weight) for weight, _ in layers], dim=1))
    joined = product.split([sum(len(weight) for weight, _ in of_net) for _, of_net in found], dim=1)
    return [
        Terms(of_x, next(parts), [next(parts) for _ in of_net[1:]], own)
        for (of_x, of_net), own in zip(found, joined, strict=True)
    ]


def pack_context(nets: Sequence[ResidualNetwork], features: int) -> tuple[Tensor, Tensor]:
    """The weights of these networks that a context of so many features meets, and their biases, as one layer."""
    return _as_one([layer for net in nets for layer in _context_layers(net, features)[1]])


def _as_one(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in layers]
    return cat([weight for weight, _ in layers]), cat(biases)


def _context_layers(net: ResidualNetwork, features: int) -> tuple[Tensor, list[Layer]]:
    """W, and the layers that read the context: (V, b), then (C, d) of every block."""
    weight, bias = net.first
    of_x, of_context = weight.split((weight.shape[1] - features, features), dim=1)
    return of_x, [(of_context, bias), *(block.gate for block in net.blocks if block.gate is not None)]


def uses_batch(norm: nn.BatchNorm1d) -> bool:
    """Whether its result for a row depends on the other rows."""
    return norm.training or norm.running_mean is None


def _widths(net: ResidualNetwork) -> list[int | None]:
    """Values per row of the layers; None where rows depend on each other, or on random numbers."""
    mixes = net.dropout > 0 or any(map(uses_batch, _norms(net)))
    return [None if mixes else net.first[0].shape[0], net.last[0].shape[0]]


def _parts(tensor: Tensor | None, batch: int, rows: int) -> Iterator[Tensor | None]:
    """The parts of a tensor [B or 1, ...] that belong to the parts of x."""
    if tensor is not None and tensor.shape[0] == batch:
        yield from tensor.split(rows)
        return
    while True:
        yield tensor


def _network(
    x: Tensor, net: ResidualNetwork, context: Tensor | None, terms: Terms | None, transposed: bool,
    owner: nn.Module | None,
) -> Tensor:  # fmt: skip
    """``residual_network`` on all rows at once."""
    norms = _norms(net)
    plain = are_plain(norms, (nn.BatchNorm1d,)) and not has_global_hook()  # a hook may keep what a norm is given
    writes = plain and _may_write(x)
    name = _NAMES.get(net.activation)
    given = context is None or terms is not None
    if writes and given and name is not None and is_one_launch(x, net, terms):
        return residual_stack(x, net, name, terms, transposed, owner)
    (weight, bias), term = net.first, None
    gates: Iterator[Tensor] = iter(())
    if terms is not None:
        context, weight, term, gates = None, terms.weight, terms.first, iter(terms.gates)
        bias, term = (term.flatten(), None) if term.shape[0] == 1 else (None, term)
    # A batch of no rows is torch's, which counts it and leaves the statistics alone.
    fits = x.shape[0] and net.blocks and plain and uses_triton(x, weight) and all(map(_is_known, norms))
    if name is not None and fits:
        h = _fused_blocks(F.linear(x, weight), bias, term, net, gates, name)
    else:
        if term is not None:
            h = torch.addmm(term, x, weight.t())
        elif context is None:
            h = F.linear(x, weight, bias)
        else:
            gates = (F.linear(context, *block.gate) for block in net.blocks if block.gate is not None)
            n = x.shape[1]
            if writes:
                h = F.linear(x, weight[:, :n], bias).addmm_(context, weight[:, n:].t())
            else:  # the gradient of one weight is one product
                h = F.linear(cat((x, context), dim=1), weight, bias)
        h = _plain_blocks(h, net, gates, writes, plain)
    weight, bias = net.last
    if not transposed:
        return F.linear(h, weight, bias)
    out = weight @ h.t() if bias is None else torch.addmm(bias[:, None], weight, h.t())
    return out.t()


def _plain_blocks(h: Tensor, net: ResidualNetwork, gates: Iterator[Tensor], writes: bool, plain: bool) -> Tensor:
    """The blocks in plain torch; ``writes``: a step may overwrite its input, and the first h.

    ``plain``: no hook sees the result of a norm, which an activation may then overwrite.
    """
    activation = net.activation
    in_place = writes or (plain and activation in _SAVE_RESULT)
    on_new = IN_PLACE.get(activation, activation) if in_place else activation
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
    return h


def _fused_blocks(
    r: Tensor, bias: Tensor | None, h: Tensor | None, net: ResidualNetwork, gates: Iterator[Tensor], activation: str
) -> Tensor:
    """The blocks on h_0 = r + bias + h, with kernels between the products."""
    steps: list[Step] = []
    weights: list[Tensor] = []
    norms: list[nn.BatchNorm1d | None] = []
    gate = None
    for block in net.blocks:
        (first, first_bias), (second, second_bias) = block.layers
        norms += block.norms or (None, None)
        steps += [_step(bias, gate, norms[-2]), _step(first_bias, None, norms[-1])]
        weights += [first, second]
        bias, gate = second_bias, next(gates, None)
    steps.append(Step(bias, gate))
    u, statistics = run_blocks(r, None if h is None else h.to(r.dtype), steps, weights, activation, net.dropout)
    counted = [
        (norm, *found)
        for norm, found in zip(norms, statistics, strict=True)
        if norm is not None and norm.training and norm.running_mean is not None
    ]
    if _thread.counted is None:
        _count(counted)
    else:
        _thread.counted += counted
    return u


def _step(bias: Tensor | None, gate: Tensor | None, norm: nn.BatchNorm1d | None) -> Step:
    if norm is None:
        return Step(bias, gate)
    statistics = (None, None) if uses_batch(norm) else (norm.running_mean, norm.running_var)
    return Step(bias, gate, norm.weight, norm.bias, *statistics, uses_batch(norm), norm.eps)


_Counted = tuple[nn.BatchNorm1d, Tensor, Tensor]  # with the mean and variance of the batch


class _Thread(threading.local):
    """What a ``counted_at_once`` block of this thread has to count at its end; None outside."""

    counted: list[_Counted] | None = None


_thread = _Thread()


@contextlib.contextmanager
def counted_at_once() -> Iterator[None]:
    """In the block the norms whose statistics a kernel takes are updated at its end, all networks' at once."""
    before, _thread.counted = _thread.counted, []
    try:
        yield
    finally:
        found, _thread.counted = _thread.counted, before
        _count(found)


def _count(found: Sequence[_Counted]) -> None:
    """Update the statistics of these norms, as they do by themselves, all at once for each momentum.

    A norm that ran several times is updated as often.
    """
    groups: dict[tuple[float | None, int], list[_Counted]] = {}
    times: dict[nn.BatchNorm1d, int] = {}
    for norm, mean, var in found:
        times[norm] = times.get(norm, 0) + 1
        groups.setdefault((norm.momentum, times[norm]), []).append((norm, mean, var))
    with torch.no_grad():
        for (momentum, _), mine in groups.items():
            running: list[Any] = [norm.running_mean for norm, *_ in mine] + [norm.running_var for norm, *_ in mine]
            of_batch = [mean for _, mean, _ in mine] + [var for *_, var in mine]
            of_batch = [b.to(r.dtype) for r, b in zip(running, of_batch, strict=True)]
            counts = [norm.num_batches_tracked for norm, *_ in mine if norm.num_batches_tracked is not None]
            # torch documents its operations on lists of tensors under these names.
            torch._foreach_lerp_(running, of_batch, 0.0 if momentum is None else momentum)
            if counts:
                torch._foreach_add_(counts, 1)


def _norms(net: ResidualNetwork) -> list[nn.BatchNorm1d]:
    return [norm for block in net.blocks for norm in block.norms or ()]


def _is_known(norm: nn.BatchNorm1d) -> bool:
    """Whether the kernel computes what this norm does, if no hook is set: its dtypes and its momentum are known."""
    tensors = [t for t in (norm.weight, norm.running_mean) if t is not None]
    return norm.momentum is not None and (not tensors or uses_triton(*tensors))


def _may_write(x: Tensor) -> bool:
    """Whether a step may overwrite its input: no gradient, transform of torch.func, autocast or tracer needs it."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or autocast_dtype(x.device.type) is not None
        or is_transformed()
    )
