"""The raw coupling stack on packed weights, in plain differentiable torch: forward, and backward written out.

x [B, D] is held as z [B, 2 P], both halves padded with zeros (linfast.kernels.stack_layout). The
steps of a stack, in the order they run, are maps and couplings. Backward recomputes from x,
keeping each step's input, and walks the steps in reverse. With g = dL/dz after a step:

    map       z' = z M^T + c                     dM = g^T z     dc = sum_b g     dz = g M
    diagonal  z' = z m + c                       dm = sum_b g z                  dz = g m
    coupling  (dm, dshift, dlog_s) as linfast.kernels.affine_coupling derives them,
              draw = dlog_s log_s'(raw), and with (h_0 = k, p_i = h_{i-1} W_i^T + b_i, h_i = act(p_i))
              d = (dshift_j, draw_j) in turn, for i = n .. 1:
              dW_i = d^T h_{i-1}   db_i = sum_b d   d <- (d W_i) act'(p_{i-1})   and  dk = g_k + d W_1

Recomputing from x and not by inverting y: no drift, at the cost of one more forward.
In mode "fast" operands of the conditioner's products are rounded as the kernel rounds them;
the other modes' rounding is fp32's, or is left to the kernel's budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.stack_layout import DENSE, StackLayout
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap
from .activations import ACTIVATION_NAMES, ACTIVATIONS, derivative
from .affine_coupling import ORDERS, couple, couple_backward

__all__ = ["StackOptions", "stack_backward", "stack_forward"]


@dataclass(frozen=True)
class StackOptions:
    """The raw op's constants, by name."""

    layout: StackLayout
    activation: str
    scale_map: ScaleMap
    order: str
    moves_second: bool
    inverse: bool
    log_det: bool
    precision: str

    @classmethod
    def of(cls, features: int, *constants: Any) -> StackOptions:
        n_linear, hidden, maps, head, activation, kind, bound, floor, scale_first, *rest = constants
        return cls(
            StackLayout(features, n_linear, hidden, maps, head),
            ACTIVATION_NAMES[activation],
            ScaleMap(SCALE_MAP_KINDS[kind], bound, floor),
            ORDERS[scale_first],
            *rest,
        )

    def steps(self, weights: Tensor) -> list[tuple[str, int]]:
        """("map", row) and ("coupling", layer) in the order they run."""
        head, maps = int(self.layout.head), self.layout.maps
        steps: list[tuple[str, int]] = [("map", 0)] if head else []
        for layer in range(self.layout.n_layers(weights)):
            steps += [("coupling", layer), *([("map", layer + head)] if maps else [])]
        return steps[::-1] if self.inverse else steps

    def halves(self, z: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(kept, moved) of z [B, 2 P]."""
        first, second = z.split(self.layout.half, dim=1)
        return (second, first) if self.moves_first(layer) else (first, second)

    def joined(self, kept: Tensor, moved: Tensor, layer: int) -> Tensor:
        return torch.cat((moved, kept) if self.moves_first(layer) else (kept, moved), dim=1)

    def moves_first(self, layer: int) -> bool:
        return (layer + self.moves_second) % 2 == 0

    def moved_size(self, layer: int) -> int:
        return self.layout.sizes[0 if self.moves_first(layer) else 1]


class _Conditioned(NamedTuple):
    """A conditioner's run: what went into each linear layer, what came out of the hidden ones, the last."""

    inputs: list[Tensor]
    hidden: list[Tensor]
    shift: Tensor
    raw: Tensor


def stack_forward(
    x: Tensor, weights: Tensor, operands: Tensor, options: StackOptions
) -> tuple[Tensor, Tensor | None]:
    """(y of x's dtype, log_det [B] of the couplings or None)."""
    z = options.layout.pad(x.to(weights.dtype))
    total = z.new_zeros(z.shape[0]) if options.log_det else None
    for step, index in options.steps(weights):
        if step == "map":
            z = _apply_map(z, weights[index], options)
            continue
        z, log_s, _, _ = _couple(z, weights, operands.dtype, index, options)
        if total is not None:
            total = total + log_s[:, : options.moved_size(index)].sum(1)
    if total is not None and options.inverse:
        total = -total
    return options.layout.unpad(z).to(x.dtype), total


def stack_backward(
    x: Tensor,
    weights: Tensor,
    operands: Tensor,
    grad: Tensor | None,
    grad_log_det: Tensor | None,
    options: StackOptions,
) -> tuple[Tensor, Tensor]:
    """(dx of x's dtype, dweights); the formulas are at the top of this file."""
    layout, steps = options.layout, options.steps(weights)
    z, inputs = layout.pad(x.to(weights.dtype)), []
    for step, index in steps:
        inputs.append(z)
        if step == "map":
            z = _apply_map(z, weights[index], options)
        else:
            z = _couple(z, weights, operands.dtype, index, options)[0]
    g = torch.zeros_like(z) if grad is None else layout.pad(grad.to(weights.dtype))
    conditioners: dict[int, Tensor] = {}
    maps: dict[int, Tensor] = {}
    for (step, index), z in zip(steps[::-1], inputs[::-1], strict=True):
        if step == "map":
            g, maps[index] = _map_backward(z, g, weights[index], options)
        else:
            row = index + layout.head
            g, conditioners[row] = _coupling_backward(z, g, grad_log_det, weights, operands.dtype, index, options)
    empty = weights.new_zeros(layout.map_offset)
    rows = [
        torch.cat([conditioners.get(row, empty), *([maps[row]] if layout.maps else [])])
        for row in range(weights.shape[0])
    ]
    dweights = torch.stack(rows) if rows else torch.zeros_like(weights)
    return layout.unpad(g).to(x.dtype), dweights


def _apply_map(z: Tensor, row: Tensor, options: StackOptions) -> Tensor:
    _, _, matrix, bias = options.layout.unpack(row)
    return (z @ matrix.mT if options.layout.maps == DENSE else z * matrix) + bias


def _map_backward(z: Tensor, g: Tensor, row: Tensor, options: StackOptions) -> tuple[Tensor, Tensor]:
    """(dz, [dmap | dbias])."""
    _, _, matrix, _ = options.layout.unpack(row)
    if options.layout.maps == DENSE:
        return g @ matrix, torch.cat(((g.mT @ z).flatten(), g.sum(0)))
    return g * matrix, torch.cat(((g * z).sum(0), g.sum(0)))


def _rounded(tensor: Tensor, half: torch.dtype, options: StackOptions) -> Tensor:
    return tensor.to(half).to(tensor.dtype) if options.precision == "fast" else tensor


def _condition(
    kept: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor], half: torch.dtype, options: StackOptions
) -> _Conditioned:
    activate = ACTIVATIONS[options.activation]
    h, inputs, hidden = kept, [], []
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        inputs.append(_rounded(h, half, options))
        h = F.linear(inputs[-1], _rounded(matrix, half, options), bias)
        if i < len(matrices) - 1:
            hidden.append(h)
            h = activate(h)
    shift, raw = h.unflatten(1, (-1, 2)).unbind(2)
    return _Conditioned(inputs, hidden, shift, raw)


def _couple(
    z: Tensor, weights: Tensor, half: torch.dtype, layer: int, options: StackOptions
) -> tuple[Tensor, Tensor, Tensor, _Conditioned]:
    """(z after the coupling, log_s, the moved half after it, the conditioner's run)."""
    matrices, biases, _, _ = options.layout.unpack(weights[layer + options.layout.head])
    kept, moved = options.halves(z, layer)
    run = _condition(kept, matrices, biases, half, options)
    log_s = options.scale_map.log_scale(run.raw)
    out = couple(moved, run.shift, log_s, options.order, options.inverse)
    return options.joined(kept, out, layer), log_s, out, run


def _coupling_backward(
    z: Tensor,
    g: Tensor,
    grad_log_det: Tensor | None,
    weights: Tensor,
    half: torch.dtype,
    layer: int,
    options: StackOptions,
) -> tuple[Tensor, Tensor]:
    """(dz, [dW_1 | ... | dW_n | db_1 | ... | db_n]) from the coupling's input."""
    matrices, _, _, _ = options.layout.unpack(weights[layer + options.layout.head])
    _, log_s, out, run = _couple(z, weights, half, layer, options)
    dkept, dout = options.halves(g, layer)
    # Columns of padding gain a gradient from log_det, which meets only weights of padding.
    inside = torch.arange(options.layout.half, device=z.device) < options.moved_size(layer)
    h = 0.0 if grad_log_det is None else grad_log_det[:, None].to(g.dtype) * inside
    dmoved, dshift, dlog_s = couple_backward(out, run.shift, log_s, dout, h, options.order, options.inverse)
    d = torch.stack((dshift, dlog_s * options.scale_map.derivative(run.raw)), dim=2).flatten(1)
    dmatrices, dbiases = [], []
    for i in reversed(range(len(matrices))):
        dmatrices.append(d.mT @ run.inputs[i])
        dbiases.append(d.sum(0))
        d = d @ _rounded(matrices[i], half, options)
        if i:
            d = d * derivative(options.activation, run.hidden[i - 1])
    pieces = [*dmatrices[::-1], *dbiases[::-1]]
    return options.joined(dkept + d, dmoved, layer), torch.cat([piece.flatten() for piece in pieces])
