"""One side of an affine coupling (which features move, the formula, the conditioner); the maps between couplings.

forward  y = moved * scale + shift         inverse  moved = (y - shift) / scale
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.channel_mix import channel_mix
from ..ops.stack_weights import AffineMap
from ..scale_maps import ScaleMap
from .adapter import Unfit

Params = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """Which features are kept and which move.

    Args:
        kind: "halves": two contiguous parts; "alternate": the even and the odd features; "gather": any two sets.
        moves: which part moves: "first", which with "alternate" is the even features, or "second".
        first: of "halves": length of the first part; None is half of the features, rounded up.
        features: the number of features; None where any number will do.
        indices: of "gather": the kept and the moved features.
    """

    kind: str
    moves: str = "second"
    first: int | None = None
    features: int | None = None
    indices: tuple[list[int], list[int]] | None = None
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def features_of(self, count: int) -> tuple[list[int], list[int]]:
        """(kept, moved): the indices of ``count`` features."""
        if self.indices is not None:
            return self.indices
        kept, moved = (list(range(count)[part]) for part in self._slices(count))
        return kept, moved

    def _slices(self, count: int) -> tuple[slice, slice]:
        if self.kind == "halves":
            first = (count + 1) // 2 if self.first is None else self.first
            parts = slice(0, first), slice(first, None)
        else:
            parts = slice(0, None, 2), slice(1, None, 2)
        return parts if self.moves == "second" else parts[::-1]

    def parts(self, count: int, device: torch.device) -> tuple[Any, Any]:
        """(kept, moved) as indices of a dimension of ``count`` features: slices, or tensors on the device."""
        if self.indices is None:
            return self._slices(count)
        if device not in self._on:  # copied once: a copy at every call would wait for the device
            with torch.inference_mode(False):  # the indices are used outside too
                kept, moved = (torch.tensor(part, device=device) for part in self.indices)
                self._on[device] = kept, moved
        return self._on[device]


def split_of(passes: Tensor) -> Split:
    """The Split of a mask, bool [features], that is True for the kept features."""
    kept, moved = ([i for i, kept in enumerate(passes.tolist()) if kept == which] for which in (True, False))
    n = len(kept) + len(moved)
    for moves in ("second", "first"):
        first = len(kept if moves == "second" else moved)
        for split in (Split("halves", moves, first, n), Split("alternate", moves, features=n)):
            if split.features_of(n) == (kept, moved):
                return split
    return Split("gather", features=n, indices=(kept, moved))


def split_of_indices(features: int, kept: Tensor, moved: Tensor) -> Split:
    """The Split of the indices of the kept and of the moved features; raises Unfit where they are not in order."""
    passes = torch.ones(features, dtype=torch.bool, device=moved.device)
    passes[moved] = False
    if not torch.equal(passes.nonzero().squeeze(1), kept):
        raise Unfit("its features are not in order")
    return split_of(passes)


@dataclass(frozen=True)
class Tail:
    """How a conditioner's output gives a shift and a scale.

    Args:
        layout: of the output along dim 1: "halves" [shift | raw], "raw_first" [raw | shift], "interleaved",
            "shift" without a scale; "pair" for two outputs (shift, raw).
        scale_map: the kernels' map from raw to log_scale; None where they have no such map.
        own: the same map as a function, where the library's own formula is to run in plain torch.
        undoes: whether the scale is the reciprocal of the kernels': y = m / s + t, the inverse of (m - t) s.
        keeps_volume: whether log_scale sums to zero, so that it is not summed.
        order: "scale_first" as above, or "shift_first", y = (moved + shift) scale.
    """

    layout: str
    scale_map: ScaleMap | None = None
    own: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    undoes: bool = False
    order: str = "scale_first"
    keeps_volume: bool = False

    @property
    def params(self) -> int:
        """A net's outputs per moved feature."""
        return 1 if self.layout in ("pair", "shift") else 2

    @property
    def log_scale(self) -> Callable[[Tensor], Tensor] | None:
        """From raw to log_scale in plain torch; None where there is no scale."""
        if self.layout == "shift" or self.own is not None:
            return self.own
        assert self.scale_map is not None
        return self.scale_map.log_scale_function

    def halves(self, params: Params) -> Tensor:
        """[shift | raw] of params [B, 2 moved, ...], or of a pair; the shift is negated where ``undoes``."""
        if self.layout == "shift":
            assert isinstance(params, Tensor)
            shift, raw = params, torch.zeros_like(params)
        elif isinstance(params, tuple):
            shift, raw = params
        elif self.layout == "interleaved":
            shift, raw = params[:, 0::2], params[:, 1::2]
        else:
            first, second = params.chunk(2, 1)
            shift, raw = (second, first) if self.layout == "raw_first" else (first, second)
        return torch.cat((-shift if self.undoes else shift, raw), 1)


ADDITIVE = Tail("shift", ScaleMap("exp"), keeps_volume=True)
"""y = moved + params."""


def known_map(
    name: str, function: Callable[[Tensor], Tensor], known: Mapping[ScaleMap, Callable[[Tensor], Tensor]]
) -> ScaleMap | None:
    """The known map whose values equal those of ``function`` (a lambda cannot be recognised otherwise), or None.

    A function that holds a learned tensor is no known map, whatever its values are now.
    """
    points = torch.linspace(-12, 12, 97, dtype=torch.float64)
    try:
        with torch.enable_grad():
            values = function(points)
        if values.requires_grad:
            return None
        return next((m for m, of in known.items() if torch.allclose(of(points), values, 1e-13, 1e-15)), None)
    except Exception as error:
        raise Unfit(f"its {name} raised {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Side:
    """One side of a coupling.

    Args:
        split, tail: which features move, and how.
        run: the conditioner, kept features -> params; None where it runs only as MLPs in a kernel or loop.
        nets: the modules that ``run`` calls on the kept features alone: one, or for "pair" those of the shift
            and the raw value, which may be the same. Empty where ``run`` does anything else.
        calls: the module that ``run`` calls on the kept features and a context of as many rows.
        factor: the factor by which ``run`` multiplies the nets' output.
        full: whether the nets take all features, the moved ones as zeros, and return all, the kept ones unused.
    """

    split: Split
    tail: Tail
    run: Callable[[Tensor], Params] | None
    nets: tuple[nn.Module, ...] = ()
    calls: tuple[nn.Module, ...] = ()
    factor: float = 1.0
    full: bool = False

    def widths(self, kept: int, moved: int) -> tuple[int, int]:
        """(input, output) features of the conditioner, for these numbers of kept and moved features."""
        return (kept + moved, kept + moved) if self.full else (kept, moved * self.tail.params)


@dataclass(frozen=True, eq=False)
class Affine:
    """An affine map of all features; ``make(True)`` gives it with its inverse, ``make(False)`` without.

    Args:
        module: runs it by the library's own code; None for a diagonal map, which is a multiply-add, and for an
            orthogonal matrix.
        orthogonal: whether it is an orthogonal matrix, whose log_det is zero and is not given. ``make`` gives it
            without a bias, and both directions with its inverse.
        per_batch: whether to make it takes as long as to apply it to many rows.
        inverse_of: the orthogonal map whose inverse this is: what its ``make`` has given need not be made again.
    """

    make: Callable[[bool], AffineMap]
    module: nn.Module | None = None
    orthogonal: bool = False
    per_batch: bool = False
    inverse_of: Affine | None = None

    @property
    def diagonal(self) -> bool:
        return self.module is None and not self.orthogonal

    def __call__(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor | None]:
        """(y, log_det) of x [B, D, ...], or of the inverse, where the map has no module.

        log_det is one number for all samples, or None for zero.
        """
        made = self.make(inverse)
        return self.apply(made._replace(log_det=made.log_abs_det()) if self.diagonal else made, x, inverse)

    def apply(self, made: AffineMap, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor | None]:
        """``__call__`` with what ``make`` has given, and without the log_det that it has not."""
        if self.orthogonal:
            matrix = made.inverse if inverse else made.weight
            assert matrix is not None
            return F.linear(x, matrix) if x.ndim == 2 else channel_mix(x, matrix), None
        scale, shift, log_det = made.weight, made.bias, made.log_det
        assert shift is not None
        if x.ndim > 2:
            scale, shift = (t.view(-1, *[1] * (x.ndim - 2)) for t in (scale, shift))
            log_det = None if log_det is None else log_det * x.shape[2:].numel()
        if inverse:
            return (x - shift) / scale, None if log_det is None else -log_det
        return torch.addcmul(shift, x, scale), log_det


@dataclass(frozen=True, eq=False)
class Triangular(Affine):
    """An nflows LULinear, ``module``, whose factors can be taken from its entries (``lu_maps.py``)."""


@dataclass(frozen=True, eq=False)
class Index:
    """y = x[:, index]."""

    index: list[int]
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The index and its inverse permutation, on the device."""
        if device not in self._on:
            with torch.inference_mode(False):  # they are used outside too
                index = torch.tensor(self.index, device=device)
                self._on[device] = index, index.argsort()
        return self._on[device]

    def __call__(self, x: Tensor, inverse: bool) -> tuple[Tensor, None]:
        return x.index_select(1, self.on(x.device)[inverse]), None


def index_of(forth: Tensor, back: Tensor) -> Index | None:
    """A library's permutation, y = x[:, forth] and x = y[:, back]; None where back is not the inverse of forth."""
    index = forth.tolist()
    return Index(index) if [index[i] for i in back.tolist()] == [*range(len(index))] else None
