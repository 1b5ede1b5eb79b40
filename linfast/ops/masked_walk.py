"""The inverse of a masked autoregressive transform for about the price of one forward pass.

    y_i = x_i e^{s_i} + t_i   or   (x_i + t_i) e^{s_i},   (t_i, r_i) = net_i(x_1 .. x_{i-1}),   s_i = scale_map(r_i)

The usual inverse evaluates the network D times. Here the hidden units are sorted by degree
(linfast.kernels.masked_spec). Degree d evaluates the parameters of its features from units of lower degrees, then
these features, then the units of degree d, so that every weight is used once: 2 B sum_l H_l H_{l-1} operations.
Tensors are [units, B], in which a range of units is contiguous. Degrees are taken in blocks. One product per layer
gives all that the units of a block read from earlier blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.masked_spec import MaskedSpec
from .activations import IN_PLACE

Pair = tuple[Tensor | None, Tensor | None]
Activation = Callable[[Tensor], Tensor]


class Network(NamedTuple):
    """A masked network with its units sorted by degree; see MaskedSpec for the layers' numbers.

    Args:
        spec: sizes and degrees.
        matrices, biases: of layers 1 .. n, [H_l, H_{l-1}] and [H_l].
        extras: (term, gate) of each hidden layer, [H_l, B] or [H_l, 1].
        activation: elementwise.
        norms: for each hidden layer (scale, shift), [H_l, 1], applied to its value before the activation, or None.
    """

    spec: MaskedSpec
    matrices: Sequence[Tensor]
    biases: Sequence[Tensor]
    extras: Sequence[Pair]
    activation: Activation
    norms: Sequence[tuple[Tensor, Tensor] | None] | None = None

    def bases(self) -> list[Tensor]:
        """For each layer its bias and term, [H_l, 1] or [H_l, B]."""
        columns = [bias.unsqueeze(1) for bias in self.biases]
        for i, (term, _) in enumerate(self.extras):
            if term is not None:
                columns[i] = columns[i] + term
        return columns

    def read(self, layer: int, value: Tensor, rows: slice = slice(None)) -> Tensor:
        """What the next layer reads of rows of a hidden layer's value; possibly the value itself."""
        norm = None if self.norms is None else self.norms[layer - 1]
        if norm is not None:
            value = torch.addcmul(norm[1][rows], value, norm[0][rows])
        return self.activation(value) if self.spec.activated[layer - 1] else value


@dataclass(frozen=True)
class _Sizes:
    """Degrees per block (measured on an AMD EPYC, one thread: docs/autoregressive.md)."""

    short: int = (
        1024  # a batch of fewer rows takes one degree at a time: calls of torch take longer than arithmetic
    )
    many: int = 8


_SIZES = _Sizes()


def blocks(degrees: int, batch: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each block of the degrees 0 .. G."""
    size = 1 if batch < _SIZES.short else _SIZES.many
    for first in range(0, degrees + 1, size):
        yield first, min(first + size, degrees + 1)


class _Step(NamedTuple):
    """values[rows] = W[rows, :stop] read[:stop] + b; or, unless ``start`` is None, += W[rows, start:stop] read[..].

    Args:
        layer: the layer of W, b and values; ``read`` is what the layer before it gives.
        completes: whether no other step adds to these rows.
        features: those of which the rows are the parameters; None in a hidden layer.
    """

    layer: int
    rows: slice
    start: int | None
    stop: int
    completes: bool
    features: slice | None


@functools.lru_cache(64)
def _steps(spec: MaskedSpec, is_short: bool) -> list[_Step]:
    """The steps of a walk: of each block the products with earlier blocks, then of each degree its own."""
    steps, n = [], spec.n_layers
    for first, end in blocks(spec.degrees, 0 if is_short else _SIZES.short):
        alone = end - first == 1
        for layer in range(1, 1 if alone else n + 1):
            rows, stop = rows_of(spec, layer, first, end), spec.cut(layer - 1, first)
            steps.append(_Step(layer, rows, None, stop, False, None))
        for degree in range(first, end):
            for layer in (n, *range(1, n)):
                rows, stop = rows_of(spec, layer, degree, degree + 1), spec.cut(layer - 1, degree + (layer < n))
                start = None if alone else spec.cut(layer - 1, first)
                features = rows_of(spec, 0, degree, degree + 1) if layer == n else None
                steps.append(_Step(layer, rows, start, stop, True, features))
    return [step for step in steps if step.rows.start < step.rows.stop]


def rows_of(spec: MaskedSpec, layer: int, first: int, end: int) -> slice:
    """The rows of a layer with degrees from ``first`` to ``end - 1``; of the parameters, those of such features."""
    if layer == spec.n_layers:
        return slice(spec.per_feature * spec.cut(0, first), spec.per_feature * spec.cut(0, end))
    return slice(spec.cut(layer, first), spec.cut(layer, end))


Solve = Callable[[slice, Tensor, Tensor], None]
"""(features, their parameters [P features, B], where to write x [features, B])."""


def walk(net: Network, batch: int, solve: Solve) -> tuple[Tensor, Tensor]:
    """(x [D, B], parameters [P D, B]) of the inverse, without a graph; ``solve`` inverts features."""
    spec, matrices, bases = net.spec, net.matrices, net.bases()
    new, sizes = matrices[0].new_empty, spec.sizes
    reads = [new(size, batch) for size in sizes[:-1]]
    # A layer's value has a tensor of its own only where a later layer adds it.
    values = [new(sizes[i], batch) if i in spec.adds else read for i, read in enumerate(reads[1:], 1)]
    values.append(new(sizes[-1], batch))  # the parameters
    in_place = IN_PLACE.get(net.activation)
    for layer, rows, start, stop, completes, features in _steps(spec, batch < _SIZES.short):
        value, read = values[layer - 1][rows], reads[layer - 1]
        if start is not None:
            if start < stop:
                value.addmm_(matrices[layer - 1][rows, start:stop], read[start:stop])
        elif stop:
            torch.addmm(bases[layer - 1][rows], matrices[layer - 1][rows, :stop], read[:stop], out=value)
        else:
            value.copy_(bases[layer - 1][rows])
        if not completes:
            continue
        if features is not None:
            solve(features, value, reads[0][features])
            continue
        gate, added = net.extras[layer - 1][1], spec.adds[layer - 1]
        if gate is not None:
            value *= gate[rows]
        if added:
            value += values[added - 1][rows]
        if in_place is None or net.norms is not None or values[layer - 1] is not reads[layer]:
            reads[layer][rows] = net.read(layer, value, rows)
        elif spec.activated[layer - 1]:
            in_place(value)
    return reads[0], values[-1]


Evaluated = tuple[list[Tensor], list[Tensor], Tensor]
"""(read_0 = x .. read_{n-1}, value_1 .. value_{n-1}, parameters [P D, B])."""


def evaluate(net: Network, x: Tensor) -> Evaluated:
    """The network on x [D, B] in one pass."""
    reads, values = [x], [x]
    for layer, (W, base) in enumerate(zip(net.matrices[:-1], net.bases(), strict=False), 1):
        value = torch.addmm(base, W, reads[-1])
        gate = net.extras[layer - 1][1]
        if gate is not None:
            value = value * gate
        if net.spec.adds[layer - 1]:
            value = value + values[net.spec.adds[layer - 1]]
        values.append(value)
        reads.append(net.read(layer, value))
    return reads, values[1:], torch.addmm(net.biases[-1].unsqueeze(1), net.matrices[-1], reads[-1])
