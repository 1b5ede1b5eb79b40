"""A chain of affine couplings with MLP conditioners, and maps between them, in one loop of plain torch, for CPUs.

    (shift, raw) = W_n act(W_{n-1} ... act(W_1 k + b_1) ...) + b_n      k is the kept half, m the moved half
    m <- (m + shift) e^s  or  m e^s + shift                             s = scale_map(raw)

or the inverse. x [B, D] is split into halves before the first of several couplings and joined after the last, and
log_s is summed over the features once. At small batches joins, checks and calls of modules in every coupling would
take longer than the arithmetic. Gradients are autograd's. Under autocast the products are in its dtype; the state,
the shift and the scale are in fp32 or wider, and the state is rounded to x's dtype after each coupling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import cat
from ..rows import is_apart


class PlainCoupling(NamedTuple):
    """One coupling.

    Args:
        weights, biases: of the conditioner's linear layers, [out, in] and [out] or None.
        activation: applied between them.
        log_scale: maps raw to log_s; None for an additive coupling, which has no raw.
        scale_first: m e^s + shift in place of (m + shift) e^s.
        interleaved: the conditioner's output is shift_i, raw_i alternating, in place of [shift | raw].
        moves: which half moves, 0 or 1.
        raw_first: the conditioner's output is [raw | shift].
        raw_net: weights and biases of a second conditioner, for raw; the first then computes only the shift.
        factor: multiplies the (first) conditioner's output.
        keeps_volume: log_s sums to zero over the features, and is not summed.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    activation: Callable[[Tensor], Tensor]
    log_scale: Callable[[Tensor], Tensor] | None
    scale_first: bool
    interleaved: bool
    moves: int
    raw_first: bool = False
    raw_net: tuple[Sequence[Tensor], Sequence[Tensor | None]] | None = None
    factor: float = 1.0
    keeps_volume: bool = False


Map = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
"""(x [B, D], inverse) -> (y, log|det|) of a map or its inverse; log|det| is [B], one number, or None for zero."""


def run_couplings(
    x: Tensor,
    couplings: Sequence[PlainCoupling | Map],
    context: Tensor | None,
    inverse: bool,
    log_det: bool,
    first: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [B, D], log|det| [B] or None) of couplings and maps, first to last, or of their inverses, last to first.

    Args:
        x: [B, D].
        couplings: their shapes are not checked.
        context: [B, C], or [1, C] for all samples, appended to every conditioner's input; or None.
        first: features in the first half; None for half of them, rounded up.
    """
    dtype, first = x.dtype, (x.shape[1] + 1) // 2 if first is None else first
    wide = torch.promote_types(dtype, torch.float32)
    same = dtype == wide  # on a small batch a cast to the same dtype takes as long as an elementwise operation
    apart = context is not None and is_apart(context, x)
    joined = None if context is None or apart else context.expand(x.shape[0], -1)
    whole = x
    halves: list[Tensor] = []  # the state; empty before and after a map, where it is in ``whole``
    sums: list[Tensor | None] = [None, None]
    of_maps: Tensor | None = None
    for coupling in reversed(couplings) if inverse else couplings:
        if not isinstance(coupling, PlainCoupling):
            whole, part = coupling(cat(halves, dim=1) if halves else whole, inverse)
            halves = []
            if part is not None:
                of_maps = part if of_maps is None else of_maps + part
            continue
        halves = halves or list(whole.split((first, whole.shape[1] - first), dim=1))
        weights, biases, activation, log_scale, scale_first, interleaved, moves, raw_first = coupling[:8]
        raw_net, factor, keeps_volume = coupling[8:]
        kept = h = halves[1 - moves]
        if joined is not None:
            kept = h = cat((kept, joined), dim=1)
        elif context is not None:
            weights, biases = _absorbed(weights, biases, context)
            raw_net = None if raw_net is None else _absorbed(*raw_net, context)
        last = len(weights) - 1
        for i in range(last):  # _mlp, inlined: at small batches a call per coupling is measurable
            h = activation(F.linear(h, weights[i], biases[i]))
        h = F.linear(h, weights[last], biases[last])
        if h.dtype != wide:
            h = h.to(wide)
        if factor != 1:
            h = h.mul_(factor)  # in place: nothing else refers to h
        m = halves[moves] if same else halves[moves].to(wide)
        if log_scale is None:
            halves[moves] = (m - h if inverse else m + h).to(dtype)
            continue
        if raw_net is not None:
            shift, raw = h, _mlp(kept, *raw_net, activation).to(wide)
        else:
            shift, raw = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=1)
            if raw_first:
                shift, raw = raw, shift
        log_s = log_scale(raw)
        if inverse:
            m = (m - shift) * (-log_s).exp() if scale_first else m * (-log_s).exp() - shift
        else:
            m = m * log_s.exp() + shift if scale_first else (m + shift) * log_s.exp()
        halves[moves] = m if same else m.to(dtype)
        if log_det and not keeps_volume:
            before = sums[moves]
            sums[moves] = log_s if before is None else before + log_s
    y = cat(halves, dim=1) if halves else whole
    if not log_det:
        return y, None
    of_halves = [log_s.sum(dim=1) for log_s in sums if log_s is not None]
    if not of_halves:
        total = torch.zeros(x.shape[0], dtype=wide, device=x.device)
    else:
        total = of_halves[0] if len(of_halves) == 1 else of_halves[0] + of_halves[1]
        total = -total if inverse else total
    return y, total if of_maps is None else total + of_maps


def _absorbed(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], context: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The layers of an equal network without the context [1, C]."""
    weight, shift = absorb(weights[0], biases[0], context)
    return (weight, *weights[1:]), (shift, *biases[1:])


def absorb(weight: Tensor, bias: Tensor | None, given: Tensor) -> tuple[Tensor, Tensor]:
    """(W, V c + b): the layer [W | V], b, for one row c [1, n], as a layer of the other inputs alone."""
    of_x, of_given = weight.split((weight.shape[1] - given.shape[1], given.shape[1]), dim=1)
    return of_x, F.linear(given, of_given, bias)[0]


def _mlp(
    h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = activation(F.linear(h, weight, bias))
    return F.linear(h, weights[-1], biases[-1])
