"""Helpers of all launchers: the options of couplings, views, tiles, offsets.

Kernels address a tensor as [batch, channel, position] with three strides: a vector has one position, and NCHW and
channels_last differ only in strides. Importing this module, or any kernel's, queries no driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

_INT32_ELEMENTS = 2**31
Tile = Mapping[str, int]  # num_warps, and the sizes of a program's tile, which its kernel takes as constants
# For kernels that store a sum of products over lanes. With multiply and add fused, a lane rounds the other lane's
# product but not its own. Lanes then differ in the last bit, and it is undefined whose value is stored.
UNFUSED = {"enable_fp_fusion": False}


class CouplingSpec(NamedTuple):
    """The options of an affine coupling: the constants of the raw ops, in their order.

    Args:
        kind, bound, floor: the scale map's id, its c and its floor.
        scale_first: m e^s + t in place of (m + t) e^s.
        interleaved: params is shift_i, raw_i alternating, in place of [shift | raw].
        moves_second: the second half of the channels moves in place of the first.
        inverse: apply the coupling's inverse.
        log_det: also sum the log-scales.
    """

    kind: int
    bound: float
    floor: float
    scale_first: bool
    interleaved: bool
    moves_second: bool
    inverse: bool
    log_det: bool

    @property
    def constexprs(self) -> dict[str, int]:
        return {"KIND": self.kind, "SCALE_FIRST": self.scale_first, "INVERSE": self.inverse}

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(moved, kept) views along dim 1."""
        first = (x.shape[1] + 1) // 2
        parts = (x[:, :first], x[:, first:])
        return parts[::-1] if self.moves_second else parts

    def shift_and_raw(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the shifts and of the raw log-scales in params, along dim 1."""
        if self.interleaved:
            return params[:, 0::2], params[:, 1::2]
        return params[:, : params.shape[1] // 2], params[:, params.shape[1] // 2 :]


COUPLING_SCHEMA = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(CouplingSpec).items())


@dataclass(frozen=True)
class Walk:
    """The order in which elementwise kernels visit [batch, channel, position]: rows (batch, outer), columns inner.

    ``outer`` and ``inner`` are dimensions, 1 (channel) or 2 (position). Where ``outer`` is None both are merged: a
    sample is one run of channels times positions, whose stride is that of ``inner``.
    """

    outer: int | None
    inner: int

    def sizes(self, view: Tensor) -> tuple[int, int]:
        """(outer, inner) extents of a view."""
        if self.outer is None:
            return 1, view.shape[1] * view.shape[2]
        return view.shape[self.outer], view.shape[self.inner]

    def strides(self, view: Tensor) -> tuple[int, int, int]:
        """(batch, outer, inner) strides of a view, in elements."""
        outer = 0 if self.outer is None else view.stride(self.outer)
        return view.stride(0), outer, view.stride(self.inner)


def walk(*views: Tensor) -> Walk:
    """The walk with the longest runs in these views; unless all can be merged, the first view decides."""
    if all(_merges(view) for view in views):
        return Walk(None, 2 if views[0].shape[2] > 1 else 1)
    channels_innermost = views[0].stride(1) < views[0].stride(2) or views[0].shape[2] == 1
    return Walk(2, 1) if channels_innermost else Walk(1, 2)


def _merges(view: Tensor) -> bool:
    """Whether channels times positions are one run with one stride."""
    _, channels, count = view.shape
    return channels <= 1 or count <= 1 or view.stride(1) == count * view.stride(2)


def positions(x: Tensor) -> Tensor:
    """x [B, C, ...] as [B, C, P]; a copy only where the positions' strides cannot be merged."""
    return x[:, :, None] if x.ndim == 2 else x.flatten(2)


def like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape and memory order, whose positions can be merged into one dimension."""
    return torch.empty_like(positions(x)).view(x.shape)


def with_channels(x: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty [B, channels, ...] for x [B, C, ...]: channels innermost where they are in x, else contiguous."""
    if x.stride(1) == 1 and x.stride(-1) != 1:
        return x.new_empty((x.shape[0], *x.shape[2:], channels), dtype=dtype).movedim(-1, 1)
    return x.new_empty((x.shape[0], channels, *x.shape[2:]), dtype=dtype)


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an offset within one of the tensors is 2^31 elements or more."""
    return any(tensor is not None and _extent(tensor) >= _INT32_ELEMENTS for tensor in tensors)


def _extent(tensor: Tensor) -> int:
    return sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def tile_for(size: int, table: Sequence[tuple[int, Tile]]) -> Tile:
    """The first tile for this size in a table of (largest size, tile)."""
    return next(tile for largest, tile in table if size <= largest)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
