"""The gradient of the inverse of a masked autoregressive transform: the walk of masked_walk.py backwards.

a_i, the gradient of x_i, is complete once the parameters of all later features have been dealt with:

    x e^s + t     dy_i = a_i e^{-s_i}   dt_i = -dy_i   ds_i = -a_i x_i           - dl_i       l = -sum_i s_i
    (x + t) e^s   dy_i = a_i e^{-s_i}   dt_i = -a_i    ds_i = -a_i (x_i + t_i)   - dl_i

(dt_i, dr_i) then go through the units of lower degrees into a_1 .. a_{i-1}. The gradient of each W is one product
after the walk. The network is evaluated once, on x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.masked_spec import MaskedSpec
from .masked_walk import Evaluated, Network, Pair, blocks, rows_of


class Walked(NamedTuple):
    """Gradients of the inverse: a [D, B], those of W_1 .. W_n and b_1 .. b_n, (term, gate) of each hidden layer."""

    x: Tensor
    matrices: list[Tensor]
    biases: list[Tensor]
    extras: list[Pair]


SLOPES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: (x > 0).to(x.dtype),
    lambda x: x.sigmoid() * (1 + x * (1 - x.sigmoid())),
    lambda x: 1 - x.tanh().square(),
    lambda x: 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x.square()) / (2 * math.pi) ** 0.5,
    lambda x: x.clamp(max=0).exp(),
)
"""The derivatives of MASKED_ACTIVATIONS, in its order. Automatic ones do not work inside a TorchDispatchMode."""

Pull = Callable[[slice, Tensor, Tensor], None]
"""(features, their gradients a [features, B], where to write those of the parameters [P features, B])."""


def walk_backward(net: Network, evaluated: Evaluated, grad: Tensor, pull: Pull) -> Walked:
    """The gradients of ``walk``, from ``evaluate(net, x)``; without norms. ``grad`` [D, B] is that of x.

    ``pull`` gives the gradients of the parameters. That of y is left to the caller, who knows a.
    """
    spec, values = net.spec, evaluated[1]
    n = spec.n_layers
    slopes = [_slope(net, layer, value) for layer, value in enumerate(values, 1)]
    of_values, of_products = _received(net, evaluated, grad, torch.empty_like(evaluated[2]))
    for first, end in reversed([*blocks(spec.degrees, grad.shape[1])]):
        later = [_first_row(spec, layer + 1, end - (layer == n - 1)) for layer in range(n)]
        for layer in range(n):
            rows = rows_of(spec, layer, first, end)
            _receive(net, layer, rows, slice(later[layer], None), of_values, of_products)
        for degree in reversed(range(first, end)):
            for layer in reversed(range(n)):
                rows = rows_of(spec, layer, degree, degree + 1)
                if rows.start == rows.stop:
                    continue
                near = slice(_first_row(spec, layer + 1, degree), later[layer])
                _receive(net, layer, rows, near, of_values, of_products)
                if layer == 0:
                    pull(rows, of_values[0][rows], of_products[-1][rows_of(spec, n, degree, degree + 1)])
                else:
                    _complete(net, layer, rows, slopes[layer - 1], of_values, of_products)
    return Walked(of_values[0], *_of_weights(net, evaluated, of_values[1:], of_products))


def pass_backward(net: Network, evaluated: Evaluated, grad: Tensor, of_params: Tensor) -> Walked:
    """The gradients of ``evaluate(net, x)``, whose result this is; ``grad`` [D, B] is added to that of x."""
    n, every = net.spec.n_layers, slice(None)
    of_values, of_products = _received(net, evaluated, grad, of_params)
    for layer in reversed(range(n)):
        _receive(net, layer, every, every, of_values, of_products)
        if layer:
            slope = _slope(net, layer, evaluated[1][layer - 1])
            _complete(net, layer, every, slope, of_values, of_products)
    return Walked(of_values[0], *_of_weights(net, evaluated, of_values[1:], of_products))


def _received(
    net: Network, evaluated: Evaluated, grad: Tensor, of_params: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """(those of x and the hidden layers' values, those of each W_l read + b_l): the gradients before a backward."""
    of_values = [grad.clone(), *map(torch.zeros_like, evaluated[1])]
    gated = zip(of_values[1:], net.extras, strict=True)
    return of_values, [*(g if gate is None else torch.empty_like(g) for g, (_, gate) in gated), of_params]


def _first_row(spec: MaskedSpec, layer: int, degree: int) -> int:
    """The first row of a layer that may read units of this degree."""
    return spec.cut(layer, degree) if layer < spec.n_layers else spec.per_feature * spec.cut(0, degree + 1)


def _receive(
    net: Network,
    layer: int,
    rows: slice,
    readers: slice,
    of_values: Sequence[Tensor],
    of_products: Sequence[Tensor],
) -> None:
    """Add to the gradients of these rows of a layer what the readers, rows of the next layer, send back."""
    into, sent = of_values[layer][rows], of_products[layer][readers]
    if len(sent) and len(into):
        into.addmm_(net.matrices[layer][readers, rows].t(), sent)


def _complete(
    net: Network, layer: int, rows: slice, slope: Tensor | None, of_values: Sequence[Tensor],
    of_products: Sequence[Tensor],
) -> None:  # fmt: skip
    """Complete the gradient of a hidden layer's value from that of what the next layer reads."""
    into, gate = of_values[layer][rows], net.extras[layer - 1][1]
    if slope is not None:
        into *= slope[rows]
    for total, source in enumerate(net.spec.adds, 1):
        if source == layer:
            into += of_values[total][rows]
    if gate is not None:
        torch.mul(into, gate[rows], out=of_products[layer - 1][rows])


def _slope(net: Network, layer: int, value: Tensor) -> Tensor | None:
    """The activation's derivative at a hidden layer's value; None where there is no activation."""
    if not net.spec.activated[layer - 1]:
        return None
    return SLOPES[net.spec.activation](value)


def _of_weights(
    net: Network, evaluated: Evaluated, of_values: Sequence[Tensor], of_products: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Pair]]:
    """The gradients of the matrices, biases and extras."""
    reads = evaluated[0]
    matrices = [g @ read.t() for g, read in zip(of_products, reads, strict=True)]
    biases = [g.sum(1) for g in of_products]
    extras: list[Pair] = []
    for i, (term, gate) in enumerate(net.extras):
        of_gate = None
        if gate is not None:
            of_gate = of_values[i] * torch.addmm(net.bases()[i], net.matrices[i], reads[i])
        extras.append((None if term is None else of_products[i], of_gate))
    return matrices, biases, extras
