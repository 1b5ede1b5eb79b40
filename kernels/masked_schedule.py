"""The schedule of a masked autoregressive transform: the steps of its kernel, as a table of integers (no Triton).

A step computes up to ``units`` consecutive units of one layer (kernels/masked_spec.py) from a prefix of the layer
before: the units sorted by degree that may reach them. ``STEP`` numbers describe it:

    flags     WAITS: it reads what the steps since the last such flag wrote.  LAST: it computes parameters, of which
              those of feature i are P i .. P i + P - 1, and then transforms the features.  ACTIVATED, KEEPS (its
              value is added later), ADDS, TERMS, GATES: see MaskedSpec
    count     units
    known     k, the length of the prefix
    matrix    where its first row begins in the packed weights, in multiples of ALIGNED
    stride    from one row to the next, likewise
    bias      where its first bias is in the packed weights
    reads     the first unit of the layer before, counted over the layers 0 .. n - 1 in turn
    writes    its own first unit, counted likewise; the first feature of a LAST step
    keeps     its first unit, counted over the layers that are added, in turn, after P parameters of a feature
    adds      the first unit of the value that is added, counted likewise
    term      the column of its first term, and
    gate      of its first gate, among all extras

An inverse takes the degrees 0 .. G in turn: the features of a degree, one per step, then its units, layer by layer.
Every weight that is not masked is used once. A forward takes the layers in turn. After the steps the table holds
the features in the order of their degrees, D numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .masked_spec import ALIGNED, GATE, TERM, MaskedSpec, padded

WAITS, LAST, ACTIVATED, KEEPS, ADDS, TERMS, GATES = 1, 2, 4, 8, 16, 32, 64
STEP = 12
_KEPT = 256  # tables that are cached: 12 KB at D = 16 and two layers of 128, 100 KB at D = 64 and 256
_captured: set[Schedule] = set()


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of one spec on one device.

    Args:
        table: int32, STEP numbers of each step, then the features' order.
        n_steps: the number of steps.
        n_units: units of the layers 0 .. n - 1.
        n_values: units of the layers whose values are added later, and P parameters of the feature at hand.
    """

    table: Tensor
    n_steps: int
    n_units: int
    n_values: int


def schedule_of(spec: MaskedSpec, units: int, device: torch.device) -> Schedule:
    """The schedule with up to ``units`` units per step, from a cache.

    Schedules that a CUDA graph captures are never freed: the graph holds only their addresses.
    """
    schedule = _kept(spec, units, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.add(schedule)
    return schedule


@functools.lru_cache(_KEPT)
def _kept(spec: MaskedSpec, units: int, device: torch.device) -> Schedule:
    numbers = [number for step in _steps(spec, units) for number in step]
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        table = torch.tensor([*numbers, *spec.order], dtype=torch.int32).to(device)
    slots = _slots(spec)
    return Schedule(table, len(numbers) // STEP, sum(spec.sizes[:-1]), slots[-1])


def _steps(spec: MaskedSpec, units: int) -> Iterator[tuple[int, ...]]:
    written = set() if spec.inverse else {0}  # layers with units that were written since all threads last waited
    for layer, first, end in _ranges(spec):
        width = spec.per_feature if spec.inverse and layer == spec.n_layers else units
        for at in range(first, end, width):
            source = spec.adds[layer - 1] if layer < spec.n_layers else 0
            last = layer == spec.n_layers
            # Each feature's parameters take the place of the one's before.
            waits = layer - 1 in written or source in written - {0} or (last and layer in written)
            if waits:
                written.clear()
            yield _step(spec, layer, at, min(width, end - at), waits)
            if last and spec.inverse:
                written.add(layer)
        if end > first:
            written.add(layer % spec.n_layers)


def _ranges(spec: MaskedSpec) -> Iterator[tuple[int, int, int]]:
    """(layer, first unit, end) of units that do not read each other; the last layer's units are parameters."""
    n, P, cut = spec.n_layers, spec.per_feature, spec.cut
    if not spec.inverse:
        for layer in range(1, n + 1):
            yield layer, 0, spec.sizes[layer]
        return
    for degree in range(spec.degrees + 1):
        yield n, P * cut(0, degree), P * cut(0, degree + 1)
        for layer in range(1, n):
            yield layer, cut(layer, degree), cut(layer, degree + 1)


def _known(spec: MaskedSpec, layer: int, end: int) -> int:
    """How many units of the layer before may reach the units before ``end``."""
    of_features = layer == spec.n_layers
    last = (end - 1) // spec.per_feature if of_features else end - 1
    cut = functools.partial(spec.cut, 0 if of_features else layer)
    degree = next(d for d in range(spec.degrees + 1) if cut(d + 1) > last)
    return spec.cut(layer - 1, degree if of_features else degree + 1)


def _step(spec: MaskedSpec, layer: int, at: int, count: int, waits: bool) -> tuple[int, ...]:
    n, sizes = spec.n_layers, spec.sizes
    stride = padded(sizes[layer - 1]) // ALIGNED
    product = (
        *(count, _known(spec, layer, at + count), spec.offsets[layer - 1] // ALIGNED + at * stride, stride),
        *(spec.offsets[n + layer - 1] + at, sum(sizes[: layer - 1])),
    )
    if layer == n:
        return (WAITS * waits + LAST, *product, at // spec.per_feature, 0, 0, 0, 0)
    slots, source, kind = _slots(spec), spec.adds[layer - 1], spec.extra_kinds[layer - 1]
    flags = WAITS * waits + ACTIVATED * spec.activated[layer - 1] + KEEPS * (layer in spec.adds)
    flags += ADDS * (source > 0) + TERMS * bool(kind & TERM) + GATES * bool(kind & GATE)
    before = zip(sizes[1:layer], spec.extra_kinds, strict=False)
    term = sum(size * other.bit_count() for size, other in before) + at
    gate = term + sizes[layer] * bool(kind & TERM)
    return (flags, *product, sum(sizes[:layer]) + at, slots[layer] + at, slots[source] + at, term, gate)


@functools.lru_cache(_KEPT)
def _slots(spec: MaskedSpec) -> tuple[int, ...]:
    """For each layer from 0 to n - 1 where its values begin among those that are kept; then their number.

    The parameters of the feature that an inverse computes come first.
    """
    slots = [spec.per_feature]
    for layer in range(spec.n_layers):
        slots.append(slots[-1] + spec.sizes[layer] * (layer > 0 and layer in spec.adds))
    return tuple(slots)
