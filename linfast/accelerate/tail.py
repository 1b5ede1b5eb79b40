"""The elementwise tail of an affine coupling, x = (kept, moved), on whatever features are moved.

    forward  y = moved * scale + shift         inverse  moved = (y - shift) / scale

On a GPU, where the moved features and the parameters lie as ``ops.affine_coupling`` wants them,
that op runs: one kernel for split, map, product, sum and concatenation. Elsewhere, and always on
a CPU, it is plain torch in the library's own formula for the scale, with slices for the gathers
and scatters that regular masks do not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import uses_triton
from ..ops.affine_coupling import affine_coupling, split_sizes
from ..scale_maps import ScaleMap

__all__ = ["Split", "Tail", "couple", "couple_both", "split_of"]

Params = Tensor | tuple[Tensor, Tensor]


_EVERY_OTHER = slice(0, None, 2), slice(1, None, 2)


@dataclass(frozen=True)
class Split:
    """Which features pass and which are moved.

    Args:
        kind: "halves": two runs; "alternate": every other one; "gather": any.
        moves: "first" or "second": whether the run, or the even-numbered features, that come first are moved.
        first: "halves": length of the first run.
    """

    kind: str
    moves: str = "second"
    first: int = 0

    def take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(kept, moved) of x [B, C, ...], as views; not for "gather"."""
        cuts = (slice(self.first), slice(self.first, None)) if self.kind == "halves" else _EVERY_OTHER
        parts = x[:, cuts[0]], x[:, cuts[1]]
        return parts if self.moves == "second" else (parts[1], parts[0])

    def put(self, kept: Tensor, moved: Tensor) -> Tensor:
        """The x of which these are the parts."""
        parts = (kept, moved) if self.moves == "second" else (moved, kept)
        if self.kind == "halves":
            return torch.cat(parts, 1)
        if parts[0].shape == parts[1].shape:
            return torch.stack(parts, 2).flatten(1, 2)
        joined = kept.new_empty((kept.shape[0], kept.shape[1] + moved.shape[1], *kept.shape[2:]))
        joined[:, 0::2], joined[:, 1::2] = parts
        return joined


def split_of(kept: Sequence[int], moved: Sequence[int]) -> Split:
    """The Split with these feature indices."""
    n = len(kept) + len(moved)
    for moves, first, second in (("second", kept, moved), ("first", moved, kept)):
        first, second = list(first), list(second)
        if first == list(range(len(first))) and second == list(range(len(first), n)):
            return Split("halves", moves, len(first))
        if first == list(range(0, n, 2)) and second == list(range(1, n, 2)):
            return Split("alternate", moves)
    return Split("gather")


@dataclass(frozen=True)
class Tail:
    """How parameters give a shift and a scale.

    Args:
        map: of the raw parameters, the library's own formula.
        layout: of params along dim 1: "halves" [shift | raw], "raw_first" [raw | shift], "interleaved";
            "pair": params is (shift, raw).
        scale_map: the map for the kernels; None where they have no such map.
        gives: what ``map`` gives, "log_scale", "scale" or "reciprocal", 1 / scale.
    """

    map: Callable[[Tensor], Tensor]
    layout: str
    scale_map: ScaleMap | None = None
    gives: str = "log_scale"

    def shift_and_raw(self, params: Params, moved: int) -> tuple[Tensor, Tensor]:
        if isinstance(params, tuple):
            return params
        if self.layout == "interleaved":
            return params[:, 0::2], params[:, 1::2]
        first, second = params[:, :moved], params[:, moved:]
        return (first, second) if self.layout == "halves" else (second, first)

    def apply(self, moved: Tensor, params: Params, inverse: bool) -> tuple[Tensor, Callable[[], Tensor]]:
        """(out, () -> log|det| [B] of the forward) in plain torch."""
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


def _total(log_scale: Tensor) -> Tensor:
    return log_scale.sum(tuple(range(1, log_scale.ndim)))


def couple(
    x: Tensor, params_of: Callable[[Tensor], Params], split: Split, tail: Tail, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(y, log_det [B]) of x [B, C, ...], for splits that ``take`` and ``put`` know.

    Args:
        params_of: the conditioner, of the kept features.
    """
    if _fits_kernel(x, split, tail):
        return _couple_by_kernel(x, params_of, split, tail, inverse)
    kept, moved = split.take(x)
    out, log_det = tail.apply(moved, params_of(kept), inverse)
    return split.put(kept, out), -log_det() if inverse else log_det()


def couple_both(
    x: Tensor,
    first: int,
    params_of: Sequence[Callable[[Tensor], Params]],
    tail: Tail,
    inverse: bool,
    log_det: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(y, log_det [B]) of a two-sided coupling: the first ``first`` channels move, then the others.

    Args:
        params_of: of each half that moves, given the other half.
    """
    order = (1, 0) if inverse else (0, 1)
    splits = Split("halves", "first", first), Split("halves", "second", first)
    if all(_fits_kernel(x, split, tail) for split in splits):
        x, one = _couple_by_kernel(x, params_of[order[0]], splits[order[0]], tail, inverse)
        x, two = _couple_by_kernel(x, params_of[order[1]], splits[order[1]], tail, inverse)
        return x, one + two
    parts, totals = [x[:, :first], x[:, first:]], []
    for moves in order:
        parts[moves], total = tail.apply(parts[moves], params_of[moves](parts[1 - moves]), inverse)
        totals.append(total)
    if not log_det:
        return torch.cat(parts, 1), None
    log_dets = totals[0]() + totals[1]()
    return torch.cat(parts, 1), -log_dets if inverse else log_dets


def _fits_kernel(x: Tensor, split: Split, tail: Tail) -> bool:
    if tail.scale_map is None or x.dtype == torch.float64 or not uses_triton(x):
        return False
    if split.kind == "halves":
        return x.ndim >= 2 and split.first == split_sizes(x.shape[1])[0]
    return split.kind == "alternate" and x.ndim == 2 and x.shape[1] % 2 == 0


def _couple_by_kernel(
    x: Tensor, params_of: Callable[[Tensor], Params], split: Split, tail: Tail, inverse: bool
) -> tuple[Tensor, Tensor]:
    assert tail.scale_map is not None
    kept, moved = split.take(x)
    given, layout, view = params_of(kept), tail.layout, x
    if isinstance(given, tuple) or layout == "raw_first":
        params, layout = torch.cat(tail.shift_and_raw(given, moved.shape[1]), 1), "halves"
    else:
        params = given
    if split.kind == "alternate":  # [B, D] as two channels of D / 2 positions
        view = x.unflatten(1, (-1, 2)).mT
        params = params.unflatten(1, (2, -1)) if layout == "halves" else params.unflatten(1, (-1, 2)).mT
        layout = "halves"
    y, log_det = affine_coupling(
        view,
        params,
        tail.scale_map,
        order="scale_first",
        layout=layout,
        moves=split.moves,
        inverse=inverse,
        log_det=True,
    )
    assert log_det is not None
    return (y.mT.flatten(1) if split.kind == "alternate" else y), log_det.to(x.dtype)
