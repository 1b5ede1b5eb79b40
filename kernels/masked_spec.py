"""MaskedSpec, which describes a masked autoregressive transform: its degrees, and the memory layout of its weights.

The features x_1 .. x_D have degrees 1 .. G; features of one degree do not depend on each other. A hidden unit has
the largest degree among the features that it depends on, 0 where it depends on none. The parameters of a feature of
degree d depend only on hidden units of degrees below d. Units of degree G reach no parameter and are dropped.

Layers are numbered from 0, the features, to n, the parameters: P per feature, shift_i and raw_i alternating,
shift_i alone, or the raw widths, heights and derivatives of a spline of K bins: P = 3 K - 1 to 3 K + 1. In each
layer the units are sorted by degree, so that what a degree reads is a prefix of the layer before. The
weights of one transform are one vector:

    W_1 [H_1, K_0]  W_2 [H_2, K_1] .. W_n [H_n, K_{n-1}]  |  b_1 [H_1] .. b_n [H_n]         H_0 = D, H_n = P D

K_l is H_l rounded up to a multiple of ``ALIGNED``; the padding of a row is zeros, as are masked weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

ALIGNED = 16  # columns: each row of a matrix in half precision then starts at a multiple of 32 bytes
TERM, GATE = 1, 2


@dataclass(frozen=True)
class MaskedSpec:
    """A masked autoregressive transform without its weights, and the options of a call.

    Args:
        degrees: G.
        per_feature: P, parameters per feature: 2 (shift, raw), 1 (shift) without a scale, or those of a spline.
        order: [D], the features in the order of their degrees.
        cuts: for each layer from 0 to n - 1 in turn, G + 2 numbers: how many of its units have a degree below 0, 1,
            .. G + 1.
        activated: [n - 1], per hidden layer: 1 where the next layer reads its activation, 0 its value.
        adds: [n - 1], per hidden layer: the number of the hidden layer whose value is added to its own; 0 for none.
        extra_kinds: [n - 1], per hidden layer: TERM where a term per sample is added to W h + b, GATE where the
            result is multiplied by a gate per sample, TERM + GATE for both, 0 for neither.
        activation: its number in linfast.ops.masked_autoregressive.MASKED_ACTIVATIONS.
        kind, bound, floor: the scale map's id, its c and its floor; not used without a scale.
        scale_first: y = x e^s + t in place of (x + t) e^s.
        inverse: apply the inverse.
        precision: one of linfast.precision.PRECISIONS.
        spline: the fields of a Spline (linfast.kernels.spline_spec) in place of scale and shift; () for none.
    """

    degrees: int
    per_feature: int
    order: tuple[int, ...]
    cuts: tuple[int, ...]
    activated: tuple[int, ...]
    adds: tuple[int, ...]
    extra_kinds: tuple[int, ...]
    activation: int
    kind: int
    bound: float
    floor: float
    scale_first: bool
    inverse: bool
    precision: str
    spline: tuple[float, ...] = ()
    n_layers: int = field(init=False, compare=False, repr=False)  # n
    sizes: tuple[int, ...] = field(init=False, compare=False, repr=False)  # (H_0, .., H_n)
    parts: tuple[int, ...] = field(init=False, compare=False, repr=False)  # the lengths of W_1 .. W_n
    offsets: tuple[int, ...] = field(init=False, compare=False, repr=False)  # of W_1 .. W_n, then of b_1 .. b_n
    total: int = field(init=False, compare=False, repr=False)  # the number of packed weights
    n_extras: int = field(init=False, compare=False, repr=False)  # columns of all terms and gates

    def __post_init__(self) -> None:
        n, per_layer = len(self.activated) + 1, self.degrees + 2
        sizes = [self.cuts[(layer + 1) * per_layer - 1] for layer in range(n)]
        sizes.append(sizes[0] * self.per_feature)
        parts = [size * padded(before) for before, size in pairwise(sizes)]
        offsets = [0, *accumulate([*parts, *sizes[1:]])]
        n_extras = sum([size * kind.bit_count() for size, kind in zip(sizes[1:-1], self.extra_kinds, strict=True)])
        computed: dict[str, Any] = {
            "n_layers": n,
            "sizes": tuple(sizes),
            "parts": tuple(parts),
            "offsets": tuple(offsets[:-1]),
            "total": offsets[-1],
            "n_extras": n_extras,
        }
        for name, value in computed.items():
            object.__setattr__(self, name, value)  # frozen; Dynamo of torch 2.11 knows no update of vars()

    @property
    def n_matrices(self) -> int:
        """The number of packed weights of the matrices, a multiple of ``ALIGNED``; the biases follow."""
        return self.offsets[self.n_layers]

    @property
    def constants(self) -> tuple[Any, ...]:
        """The fields in their order: the raw op's arguments after its tensors."""
        return tuple([getattr(self, name) for name in _NAMES])

    def cut(self, layer: int, degree: int) -> int:
        """How many units of a layer before the last have a degree below this one."""
        return self.cuts[layer * (self.degrees + 2) + degree]

    def matrices(self, weights: Tensor) -> list[Tensor]:
        """W_1 .. W_n, each [H_l, H_{l-1}]: views of the packed weights."""
        parts = weights[: self.n_matrices].split_with_sizes(self.parts)
        sizes = zip(self.sizes[1:], self.sizes[:-1], strict=True)
        return [part.view(n, padded(n_in))[:, :n_in] for part, (n, n_in) in zip(parts, sizes, strict=True)]

    def biases(self, weights: Tensor) -> list[Tensor]:
        """b_1 .. b_n: views of the packed weights."""
        return list(weights[self.offsets[self.n_layers] :].split_with_sizes(self.sizes[1:]))

    def split_extras(self, extras: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]]:
        """(term, gate) of each hidden layer, from all of them along dim 0."""
        at, found = 0, []
        for size, kind in zip(self.sizes[1:-1], self.extra_kinds, strict=True):
            pair: list[Tensor | None] = [None, None]
            for i, which in enumerate((TERM, GATE)):
                if kind & which:
                    assert extras is not None
                    pair[i] = extras[at : at + size]
                    at += size
            found.append((pair[0], pair[1]))
        return found


_FIELDS = tuple([field for field in fields(MaskedSpec) if field.init])
_NAMES = tuple([field.name for field in _FIELDS])
_TYPES = {"tuple[int, ...]": "int[]", "tuple[float, ...]": "float[]"}
MASKED_SCHEMA = ", ".join(f"{_TYPES.get(str(field.type), field.type)} {field.name}" for field in _FIELDS)
_spec_of = functools.lru_cache(256)(MaskedSpec)


def masked_spec_of(*constants: Any) -> MaskedSpec:
    """The spec from a raw op's constants, in which tuples have become lists."""
    return _spec_of(*[tuple(value) if isinstance(value, list) else value for value in constants])


def padded(columns: int) -> int:
    """The number of columns of a packed matrix."""
    return -(-columns // ALIGNED) * ALIGNED
