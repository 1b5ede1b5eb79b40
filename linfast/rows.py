"""Cuts a long batch into parts of so few rows that what the layers write between them stays in the cache.

A conditioner of H units writes B H values per layer, and reads them again at once. On a CPU they go to memory and
back unless B is small. Rows do not depend on each other, so b of them at a time give the same result:

    [y_1 | ... | y_n] = [f(x_1) | ... | f(x_n)]    x_i [b, ...] of x [B, ...],  b H itemsize ~ 1 MiB per thread

Plain differentiable torch: autograd sums the parts' gradients of the weights. Under torch.compile and
torch.jit.trace the batch stays whole: the parts would be written out in the graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dispatch import chosen_backend

Work = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class _Sizes:
    """What fits a core's cache (measured on an AMD EPYC, 1 MiB of L2 per core: docs/accelerate.md)."""

    bytes: int = 1 << 20  # of the widest layer's output, per thread; half or twice that is within 8%
    fewest: int = 256  # rows per thread; with fewer, the products and torch's own cost of a call slow down


_SIZES = _Sizes()
SHORT = 2 * _SIZES.fewest
"""A batch of fewer rows is never cut, whatever the number of threads."""


def rows_at_once(x: Tensor, widths: Callable[[], Sequence[int | None]]) -> int | None:
    """How many rows of x [B, ...] to take at a time; None for all at once.

    Args:
        widths: values per row of each layer; a None among them says that its rows may depend on each other. It is
            called only where x may be long enough.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.jit.is_tracing():
        return None
    threads = torch.get_num_threads()
    if x.shape[0] < 2 * threads * _SIZES.fewest:
        return None
    found = widths()
    known = [width for width in found if width is not None]
    if not known or len(known) < len(found):
        return None
    rows = threads * rows_in_cache(max(known), x.element_size())
    return rows if x.shape[0] >= 2 * rows else None


def rows_in_cache(width: int, size: int) -> int:
    """How many rows of so many values, each of ``size`` bytes, a thread takes at a time."""
    return max(_SIZES.fewest, _SIZES.bytes // (width * size))


class _Asked(threading.local):
    all_lengths = False


_asked = _Asked()


@contextlib.contextmanager
def all_lengths() -> Iterator[None]:
    """Inside the block no batch is short: what runs on long ones runs on all, as a comparison on few rows needs."""
    before, _asked.all_lengths = _asked.all_lengths, True
    try:
        yield
    finally:
        _asked.all_lengths = before


def checks_all_lengths() -> bool:
    """Whether this is inside ``all_lengths``."""
    return _asked.all_lengths


def is_short(given: Any, least: float) -> bool:
    """Whether x, or the first of several, is on a CPU and has fewer rows per thread than gain by being cut."""
    x = given[0] if isinstance(given, (tuple, list)) and given else given
    if not isinstance(x, Tensor) or not x.is_cpu or _asked.all_lengths or chosen_backend() == "triton":
        return False
    if torch.compiler.is_compiling():  # which never cuts, and would keep the comparison
        return True
    return not x.ndim or x.shape[0] < least * torch.get_num_threads()


def by_rows(work: Work, x: Tensor, rows: int) -> tuple[Tensor, Any]:
    """``work``, (y [b, ...], log_det [b] or None) of b rows, on all rows of x."""
    ys, log_dets = zip(*[work(part) for part in x.split(rows)], strict=True)
    return torch.cat(ys), None if log_dets[0] is None else torch.cat(log_dets)
