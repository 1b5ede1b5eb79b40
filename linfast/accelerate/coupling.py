"""What runs a coupling: one launch, a fused tail, plain torch, or the library's own code.

one launch   an MLP conditioner that ``ops.coupling_stack`` has a tile for, on vectors: coupling_launch.py
fused tail   ``ops.affine_coupling``: split, map, product, sum and concatenation in one kernel
plain torch  coupling_side.py: on a GPU in float64, and where the kernels lack the library's map or split;
             on a CPU of long batches with MLP conditioners, so many rows at a time as a cache holds: rows.py

On a CPU nothing else gains, and ``gains`` sends it to the library's own code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import uses_triton
from ..ops.affine_coupling import affine_coupling, split_sizes
from ..rows import Work, by_rows, on_plain_cpu, rows_at_once, rows_in_cache
from .coupling_launch import fits_whole, whole_layer, widest
from .coupling_side import Side

__all__ = ["couple", "couple_both", "described", "gains", "in_cache", "least_rows"]

Kernel = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


def couple(x: Tensor, side: Side, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, log_det [B]) of x [B, C, ...]."""
    kernel = _kernel(x, side)
    if kernel is not None:
        return kernel(x, inverse)

    def plainly(x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = side.split.take(x)
        out, log_det = side.tail.apply(moved, side.run(kept), inverse)
        return side.split.put(x, kept, out), -log_det() if inverse else log_det()

    return in_cache(plainly, x, (side,))


def couple_both(
    x: Tensor, sides: Sequence[Side], inverse: bool, log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(y, log_det [B]) of a two-sided coupling: the first run of channels moves, then the others.

    Args:
        sides: that which moves the first run, and that which moves the second.
    """
    order = (1, 0) if inverse else (0, 1)
    kernels = [_kernel(x, side) for side in sides]
    if all(kernels):
        x, one = kernels[order[0]](x, inverse)  # type: ignore[misc]
        x, two = kernels[order[1]](x, inverse)  # type: ignore[misc]
        return x, one + two

    def plainly(x: Tensor) -> tuple[Tensor, Tensor | None]:
        second, first = sides[0].split.take(x)
        parts, totals = [first, second], []
        for moves in order:
            side = sides[moves]
            parts[moves], total = side.tail.apply(parts[moves], side.run(parts[1 - moves]), inverse)
            totals.append(total)
        if not log_det:
            return torch.cat(parts, 1), None
        log_dets = totals[0]() + totals[1]()
        return torch.cat(parts, 1), -log_dets if inverse else log_dets

    return in_cache(plainly, x, sides)


def gains(given: Any, sides: Sequence[Side]) -> bool:
    """Whether x, or the first of several, runs faster by this module than by the library's own code."""
    x = given[0] if isinstance(given, (tuple, list)) and given else given
    return not isinstance(x, Tensor) or not on_plain_cpu(x) or _rows(x, sides) is not None


def _rows(x: Tensor, sides: Sequence[Side]) -> int | None:
    return rows_at_once(x, lambda: [widest(side) for side in sides])


def in_cache(work: Work, x: Tensor, sides: Sequence[Side]) -> tuple[Tensor, Any]:
    """``work`` on x, by rows where the conditioners are MLPs, which see each row alone, and x has many."""
    rows = _rows(x, sides)
    return work(x) if rows is None else by_rows(work, x, rows)


def described(what: str, sides: Sequence[Side]) -> str:
    """``what``, and what runs it where the module is now, for the report; on a CPU also what a GPU would run."""
    like = next((p for side in sides for p in side.owner.parameters() if p.is_floating_point()), torch.empty(0))
    fused = " and ".join(dict.fromkeys(_best(side, like) for side in sides))
    if like.is_cuda:
        return f"{what} ({fused})"
    rows, here = least_rows(sides), "the original's own code"
    if rows < math.inf:
        here += f", and from {rows * torch.get_num_threads()} rows on as many at a time as fit its cache"
    return f"{what} (on a GPU: {fused}; on this CPU: {here})"


def least_rows(sides: Sequence[Side]) -> float:
    """From how many rows per thread on a CPU gains by cutting the batch; infinity where it never does."""
    like = next((p for side in sides for p in side.owner.parameters() if p.is_floating_point()), None)
    widths = [widest(side) for side in sides]
    known = [width for width in widths if width is not None]
    if like is None or not known or len(known) < len(widths):
        return math.inf
    return 2 * rows_in_cache(max(known), like.element_size())


def _best(side: Side, like: Tensor) -> str:
    """What a GPU runs for this side."""
    if fits_whole(side, like):
        return "one launch"
    return "fused tail" if _has_tail_kernel(side, side.split.features) else "plain torch"


def _kernel(x: Tensor, side: Side) -> Kernel | None:
    """What runs in place of plain torch on x."""
    if side.tail.scale_map is None or not uses_triton(x):
        return None
    whole = whole_layer(x, side)
    if whole is not None:
        return whole
    fits = _has_tail_kernel(side, x.shape[1]) and (side.split.kind == "halves" or x.ndim == 2)
    return functools.partial(_by_tail, side) if fits else None


def _has_tail_kernel(side: Side, features: int | None) -> bool:
    """Whether the kernel has this tail and split; features None: unknown."""
    split = side.split
    if side.tail.scale_map is None or side.tail.layout == "shift" or split.kind == "gather":
        return False
    if split.kind == "alternate":
        return features is None or features % 2 == 0
    return split.first is None or features is None or split.first == split_sizes(features)[0]


def _by_tail(side: Side, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    tail, alternate, view = side.tail, side.split.kind == "alternate", x
    assert tail.scale_map is not None
    kept, moved = side.split.take(x)
    given, layout, undo = side.run(kept), tail.layout, tail.gives == "reciprocal"
    if isinstance(given, tuple) or layout == "raw_first" or undo:
        shift, raw = tail.shift_and_raw(given, moved.shape[1])
        params, layout = torch.cat((-shift if undo else shift, raw), 1), "halves"
    else:
        params = given
    if alternate:  # [B, D] as two channels of D / 2 positions
        view = x.unflatten(1, (-1, 2)).mT
        params = params.unflatten(1, (2, -1)) if layout == "halves" else params.unflatten(1, (-1, 2)).mT
        layout = "halves"
    y, log_det = affine_coupling(
        view,
        params,
        tail.scale_map,
        order="shift_first" if undo else "scale_first",  # m / s + t undoes (m - t) s
        layout=layout,
        moves=side.split.moves,
        inverse=inverse != undo,
        log_det=True,
    )
    assert log_det is not None
    return (y.mT.flatten(1) if alternate else y), log_det.to(x.dtype)
