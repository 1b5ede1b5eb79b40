"""The inverse of a masked autoregressive transform for about the price of one forward pass, and its gradient.

    y_i = x_i e^{s_i} + t_i   or   (x_i + t_i) e^{s_i},   (t_i, r_i) = net_i(x_1 .. x_{i-1}),   s_i = scale_map(r_i)

The usual inverse evaluates the network D times. Here the hidden units are sorted by degree
(linfast.kernels.masked_spec). Degree d evaluates the parameters of its features from units of lower degrees, then
these features, then the units of degree d, so that every weight is used once: 2 B sum_l H_l H_{l-1} operations.
Tensors are [units, B], in which a range of units is contiguous. Degrees are taken in blocks. One product per layer
gives all that the units of a block read from earlier blocks.

The gradient is the same walk backwards. a_i, the gradient of x_i, is complete once the parameters of all later
features have been dealt with:

    x e^s + t     dy_i = a_i e^{-s_i}   dt_i = -dy_i   ds_i = -a_i x_i           - dl_i       l = -sum_i s_i
    (x + t) e^s   dy_i = a_i e^{-s_i}   dt_i = -a_i    ds_i = -a_i (x_i + t_i)   - dl_i

(dt_i, dr_i) then go through the units of lower degrees into a_1 .. a_{i-1}, and the gradient of each W is one product
after the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.masked_spec import MaskedSpec

Pair = tuple[Tensor | None, Tensor | None]


class Network(NamedTuple):
    """A masked network with its units sorted by degree; see MaskedSpec for the layers' numbers.

    Args:
        spec: sizes and degrees.
        matrices, biases: of layers 1 .. n, [H_l, H_{l-1}] and [H_l].
        extras: (term, gate) of each hidden layer, [H_l, B].
        activation: elementwise.
        norms: for each hidden layer (scale, shift), [H_l, 1], applied to its value before the activation, or None.
    """

    spec: MaskedSpec
    matrices: Sequence[Tensor]
    biases: Sequence[Tensor]
    extras: Sequence[Pair]
    activation: Callable[[Tensor], Tensor]
    norms: Sequence[tuple[Tensor, Tensor] | None] | None = None

    def read(self, layer: int, value: Tensor, rows: slice = slice(None)) -> Tensor:
        """What the next layer reads of rows of a hidden layer's value; possibly the value itself."""
        norm = None if self.norms is None else self.norms[layer - 1]
        if norm is not None:
            value = torch.addcmul(norm[1][rows], value, norm[0][rows])
        return self.activation(value) if self.spec.activated[layer - 1] else value


@dataclass(frozen=True)
class _Sizes:
    """Degrees per block (measured on an AMD EPYC with one thread: see docs/autoregressive.md)."""

    few: int = 1  # of a short batch, in which a call of torch takes longer than its arithmetic
    many: int = 8
    short: int = 1024  # rows


_SIZES = _Sizes()


def _blocks(degrees: int, rows: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each block of the degrees 0 .. G."""
    size = _SIZES.few if rows < _SIZES.short else _SIZES.many
    for first in range(0, degrees + 1, size):
        yield first, min(first + size, degrees + 1)


Solve = Callable[[slice, Tensor, Tensor], None]
"""(features, their parameters [P features, B], where to write x [features, B])."""


def walk(net: Network, batch: int, solve: Solve) -> tuple[Tensor, Tensor]:
    """(x [D, B], parameters [P D, B]) of the inverse; ``solve`` inverts the elementwise transform."""
    spec, like = net.spec, net.matrices[0]
    n, per_feature, cut = spec.n_layers, spec.per_feature, spec.cut
    reads = [like.new_empty(size, batch) for size in spec.sizes[:-1]]
    values = {layer: reads[layer] if not spec.activated[layer - 1] else like.new_empty(spec.sizes[layer], batch)
              for layer in spec.adds if layer}  # fmt: skip
    x, params = reads[0], like.new_empty(spec.sizes[-1], batch)
    bases = _bases(net)
    for first, end in _blocks(spec.degrees, batch):
        known = [cut(layer, first) for layer in range(n)] if end - first > 1 else [0] * n
        starts = [*known[1:], per_feature * known[0]] if end - first > 1 else [0] * n
        given = bases
        if end - first > 1:
            ends = [*(cut(layer, end) for layer in range(1, n)), per_feature * cut(0, end)]
            given = [
                torch.addmm(base[a:b], W[a:b, :k], read[:k]) if k else base[a:b]
                for base, W, read, a, b, k in zip(bases, net.matrices, reads, starts, ends, known, strict=True)
            ]
        for degree in range(first, end):
            features = slice(cut(0, degree), cut(0, degree + 1))
            if features.stop > features.start:
                rows = slice(per_feature * features.start, per_feature * features.stop)
                of = params[rows]
                _product(net, n, rows, known, starts, given, reads, cut(n - 1, degree), of)
                solve(features, of, x[features])
            for layer in range(1, n):
                rows = slice(cut(layer, degree), cut(layer, degree + 1))
                if rows.stop == rows.start:
                    continue
                value = _product(net, layer, rows, known, starts, given, reads, cut(layer - 1, degree + 1))
                term, gate = net.extras[layer - 1]
                if gate is not None:
                    value = value * gate[rows]
                if spec.adds[layer - 1]:
                    value = value + values[spec.adds[layer - 1]][rows]
                if layer in values:
                    values[layer][rows] = value
                reads[layer][rows] = net.read(layer, value, rows)
    return x, params


def _bases(net: Network) -> list[Tensor]:
    """For each layer its bias and term: [H_l, B], or [H_l, 1] where there is no term."""
    columns = [bias.unsqueeze(1) for bias in net.biases]
    for i, (term, _) in enumerate(net.extras):
        if term is not None:
            columns[i] = columns[i] + term
    return columns


def _product(
    net: Network,
    layer: int,
    rows: slice,
    known: Sequence[int],
    starts: Sequence[int],
    given: Sequence[Tensor],
    reads: Sequence[Tensor],
    end: int,
    out: Tensor | None = None,
) -> Tensor:
    """W read + b + term of these rows; ``given`` contains what the first ``known`` units of the layer before give."""
    before, start = known[layer - 1], starts[layer - 1]
    base = given[layer - 1][rows.start - start : rows.stop - start]
    if end > before:
        return torch.addmm(base, net.matrices[layer - 1][rows, before:end], reads[layer - 1][before:end], out=out)
    if out is None:
        return base.expand(-1, reads[0].shape[1])
    return out.copy_(base)


Evaluated = tuple[list[Tensor], list[Tensor], Tensor]
"""(read_0 = x .. read_{n-1}, value_1 .. value_{n-1}, parameters [P D, B])."""


def evaluate(net: Network, x: Tensor) -> Evaluated:
    """The network on x [D, B] in one pass."""
    reads, values = [x], [x]
    for layer, (W, base) in enumerate(zip(net.matrices[:-1], _bases(net), strict=False), 1):
        value = torch.addmm(base, W, reads[-1])
        gate = net.extras[layer - 1][1]
        if gate is not None:
            value = value * gate
        if net.spec.adds[layer - 1]:
            value = value + values[net.spec.adds[layer - 1]]
        values.append(value)
        reads.append(net.read(layer, value))
    return reads, values[1:], torch.addmm(net.biases[-1].unsqueeze(1), net.matrices[-1], reads[-1])


class Walked(NamedTuple):
    """Gradients of the inverse: of y [D, B], of W_1 .. W_n, of b_1 .. b_n, and (term, gate) of each hidden layer."""

    y: Tensor
    matrices: list[Tensor]
    biases: list[Tensor]
    extras: list[Pair]


def walk_backward(
    net: Network, evaluated: Evaluated, grad: Tensor, pull: Callable[[slice, Tensor], tuple[Tensor, Tensor]]
) -> Walked:
    """The gradients of ``walk``, from ``evaluate(net, x)``; without norms.

    Args:
        grad: that of x [D, B].
        pull: (features, their gradients a [features, B]) -> (gradient of y, of the parameters [P features, B]).
    """
    spec, values, batch = net.spec, evaluated[1], grad.shape[1]
    n, cut = spec.n_layers, spec.cut
    slopes = [_slope(net, layer, value) for layer, value in enumerate(values, 1)]
    of_values = [torch.empty_like(value) for value in values]
    of_products = [
        g if gate is None else torch.empty_like(g) for g, (_, gate) in zip(of_values, net.extras, strict=True)
    ]
    of_products.append(torch.empty_like(evaluated[2]))  # W_l read + b_l
    of_y = torch.empty_like(grad)
    for first, end in reversed([*_blocks(spec.degrees, batch)]):
        later = [_first_later(spec, layer, end) for layer in range(n)]
        given = _from_later(net, of_products, grad, first, end)
        for degree in reversed(range(first, end)):
            for layer in reversed(range(n)):
                rows, start = slice(cut(layer, degree), cut(layer, degree + 1)), cut(layer, first)
                if rows.stop == rows.start:
                    continue
                g = given[layer][rows.start - start : rows.stop - start]
                near = slice(_first_reader(spec, layer, degree), later[layer])
                if near.start < near.stop:
                    g = torch.addmm(g, net.matrices[layer][near, rows].t(), of_products[layer][near])
                if layer == 0:
                    at = slice(spec.per_feature * rows.start, spec.per_feature * rows.stop)
                    of_y[rows], of_products[-1][at] = pull(rows, g)
                    continue
                slope, gate = slopes[layer - 1], net.extras[layer - 1][1]
                g = g if slope is None else g * slope[rows]
                for total, source in enumerate(spec.adds):
                    if source == layer:
                        g = g + of_values[total][rows]
                of_values[layer - 1][rows] = g
                if gate is not None:
                    of_products[layer - 1][rows] = g * gate[rows]
    return Walked(of_y, *_of_weights(net, evaluated, of_values, of_products))


def _first_reader(spec: MaskedSpec, layer: int, degree: int) -> int:
    """The first row of the next layer's matrix that may read units of this degree of a layer."""
    return spec.cut(layer + 1, degree) if layer < spec.n_layers - 1 else spec.per_feature * spec.cut(0, degree + 1)


def _first_later(spec: MaskedSpec, layer: int, end: int) -> int:
    """The first row of the next layer's matrix whose degree is ``end`` or more."""
    return spec.cut(layer + 1, end) if layer < spec.n_layers - 1 else spec.per_feature * spec.cut(0, end)


def _from_later(net: Network, of_products: Sequence[Tensor], grad: Tensor, first: int, end: int) -> list[Tensor]:
    """For each layer from 0, the gradients that its units of a block receive from all later blocks."""
    received = []
    for layer, (W, g) in enumerate(zip(net.matrices, of_products, strict=True)):
        rows = slice(net.spec.cut(layer, first), net.spec.cut(layer, end))
        base = grad[rows] if layer == 0 else grad.new_zeros(()).expand(rows.stop - rows.start, grad.shape[1])
        start = _first_later(net.spec, layer, end)
        received.append(torch.addmm(base, W[start:, rows].t(), g[start:]) if start < len(g) else base)
    return received


def _slope(net: Network, layer: int, value: Tensor) -> Tensor | None:
    """The activation's derivative at a hidden layer's value; None where there is no activation."""
    if not net.spec.activated[layer - 1]:
        return None
    _, pull = torch.func.vjp(net.activation, value)
    slope: Tensor = pull(torch.ones_like(value))[0]
    return slope


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
            base = net.biases[i].unsqueeze(1) if term is None else net.biases[i].unsqueeze(1) + term
            of_gate = of_values[i] * torch.addmm(base, net.matrices[i], reads[i])
        extras.append((None if term is None else of_products[i], of_gate))
    return matrices, biases, extras
