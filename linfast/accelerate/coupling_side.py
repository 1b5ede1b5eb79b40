"""One side of an affine coupling: which features move, how, and given what; in plain torch.

    forward  y = moved * scale + shift         inverse  moved = (y - shift) / scale

The library's own formula for the scale, with slices for the gathers and scatters that regular
masks do not need. coupling.py says what runs where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..scale_maps import ScaleMap

__all__ = ["ADDITIVE", "Params", "Side", "Split", "Tail", "split_of"]

Params = Tensor | tuple[Tensor, Tensor]


# Views by one op, whose backward is one pass: each slice would have a backward of its own over all of x.
def _halves(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    one, two = x.split((first, x.shape[1] - first), 1)
    return one, two


def _every_other(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] % 2:
        return x[:, 0::2], x[:, 1::2]
    one, two = x.unflatten(1, (-1, 2)).unbind(2)
    return one, two


@dataclass(frozen=True)
class Split:
    """Which features pass and which are moved.

    Args:
        kind: "halves": two runs; "alternate": every other one; "gather": any.
        moves: "first" or "second": whether the run, or the even-numbered features, that come first are moved.
        first: "halves": length of the first run; None is half of the features, rounded up.
        features: how many there are, where that is known beforehand.
        indices: "gather": the kept and the moved features.
    """

    kind: str
    moves: str = "second"
    first: int | None = None
    features: int | None = None
    indices: tuple[Tensor, Tensor] | None = field(default=None, compare=False)
    _elsewhere: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def indices_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``indices`` on a device, copied there once: a copy at every call would wait for the device."""
        assert self.indices is not None
        if self.indices[0].device == device:
            return self.indices
        if device not in self._elsewhere:
            kept, moved = self.indices
            with torch.inference_mode(False):  # which they outlive
                self._elsewhere[device] = kept.to(device), moved.to(device)
        return self._elsewhere[device]

    def sizes(self, features: int) -> tuple[int, int]:
        """How many of so many features (are kept, move)."""
        if self.indices is not None:
            return len(self.indices[0]), len(self.indices[1])
        first = (features + 1) // 2 if self.first is None else self.first
        return (first, features - first) if self.moves == "second" else (features - first, first)

    def take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(kept, moved) of x [B, C, ...]; views but for "gather"."""
        if self.indices is not None:
            kept, moved = self.indices_on(x.device)
            return x[:, kept], x[:, moved]
        first = (x.shape[1] + 1) // 2 if self.first is None else self.first
        parts = _halves(x, first) if self.kind == "halves" else _every_other(x)
        return parts if self.moves == "second" else (parts[1], parts[0])

    def put(self, x: Tensor, kept: Tensor, moved: Tensor) -> Tensor:
        """x with other features moved; the kept ones are its own."""
        if self.indices is not None:
            return x.index_copy(1, self.indices_on(x.device)[1], moved.to(x.dtype))
        parts = (kept, moved) if self.moves == "second" else (moved, kept)
        if self.kind == "halves":
            return torch.cat(parts, 1)
        if parts[0].shape == parts[1].shape:
            return torch.stack(parts, 2).flatten(1, 2)
        joined = kept.new_empty((kept.shape[0], kept.shape[1] + moved.shape[1], *kept.shape[2:]))
        joined[:, 0::2], joined[:, 1::2] = parts
        return joined


def split_of(passes: Tensor) -> Split:
    """The Split of which these features, a bool each, are kept."""
    kept, moved = ([i for i, kept in enumerate(passes.tolist()) if kept == which] for which in (True, False))
    n = len(kept) + len(moved)
    for moves, first, second in (("second", kept, moved), ("first", moved, kept)):
        if first == list(range(len(first))) and second == list(range(len(first), n)):
            return Split("halves", moves, len(first), n)
        if first == list(range(0, n, 2)) and second == list(range(1, n, 2)):
            return Split("alternate", moves, features=n)
    indices = passes.nonzero().squeeze(1), passes.logical_not().nonzero().squeeze(1)
    return Split("gather", features=n, indices=indices)


def _same(raw: Tensor) -> Tensor:
    return raw


@dataclass(frozen=True)
class Tail:
    """How parameters give a shift and a scale.

    Args:
        map: of the raw parameters, the library's own formula.
        layout: of params along dim 1: "halves" [shift | raw], "raw_first" [raw | shift], "interleaved",
            "shift", which has no scale; "pair": params is (shift, raw).
        scale_map: the map for the kernels; None where they have no such map.
        gives: what ``map`` gives, "log_scale", "scale" or "reciprocal", 1 / scale; ``scale_map`` is the
            logarithm of the last two.
        order: "scale_first" as above, or "shift_first", y = (moved + shift) scale, which only kernels run here.
    """

    map: Callable[[Tensor], Tensor]
    layout: str
    scale_map: ScaleMap | None = None
    gives: str = "log_scale"
    order: str = "scale_first"

    def shift_and_raw(self, params: Params, moved: int) -> tuple[Tensor, Tensor]:
        if isinstance(params, tuple):
            return params
        if self.layout == "interleaved":
            return _every_other(params)
        first, second = _halves(params, moved)
        return (first, second) if self.layout == "halves" else (second, first)

    @property
    def log_scale(self) -> Callable[[Tensor], Tensor] | None:
        """From raw to log_s; None where there is no scale."""
        if self.layout == "shift":
            return None
        if self.gives == "log_scale":
            return self.map
        sign = 1 if self.gives == "scale" else -1
        return lambda raw: self.map(raw).log() if sign == 1 else -self.map(raw).log()

    def apply(self, moved: Tensor, params: Params, inverse: bool) -> tuple[Tensor, Callable[[], Tensor]]:
        """(out, () -> log|det| [B] of the forward) in plain torch."""
        if self.layout == "shift":
            assert isinstance(params, Tensor)
            out = moved - params if inverse else moved + params
            # Not new_zeros, which torch.func.vmap makes one of each of its rows: libraries add to it in place.
            return out, lambda: torch.zeros(moved.shape[0], dtype=moved.dtype, device=moved.device)
        shift, raw = self.shift_and_raw(params, moved.shape[1])
        value = self.map(raw)
        if self.gives == "scale":
            return (moved - shift) / value if inverse else torch.addcmul(shift, moved, value), lambda: _total(
                value.log()
            )
        if self.gives == "reciprocal":
            out = (moved - shift) * value if inverse else (moved / value).add_(shift)
            return out, lambda: -_total(value.log())
        if inverse:
            return (moved - shift) * (-value).exp(), lambda: _total(value)
        return torch.addcmul(shift, moved, value.exp()), lambda: _total(value)


ADDITIVE = Tail(_same, "shift", ScaleMap("exp"))
"""y = moved + params."""


def _total(log_scale: Tensor) -> Tensor:
    return log_scale.sum(tuple(range(1, log_scale.ndim)))


@dataclass(frozen=True)
class Side:
    """One side of a coupling.

    Args:
        split, tail: what moves, and how.
        run: the conditioner, of the kept features.
        owner: the module whose parameters ``nets`` have.
        nets: the modules that ``run`` runs on the kept features alone: one, or for "pair" the shift's
            and the raw value's, which may be the same. Empty where there is more to ``run``.
        factor: what ``run`` multiplies the nets' output by.
        full: whether the nets take and give all features: those that move as zeros, those that stay for nothing.
    """

    split: Split
    tail: Tail
    run: Callable[[Tensor], Params]
    owner: nn.Module
    nets: tuple[nn.Module, ...] = ()
    factor: float = 1.0
    full: bool = False
