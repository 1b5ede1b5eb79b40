"""Cuts a long batch into parts of few rows, so that the activations between the layers stay in a CPU's cache.

A layer of H units writes B H values, which the next layer reads. On a CPU they travel through main memory unless B
is small. Rows do not depend on each other, so that computing b rows at a time gives the same result:

    [y_1 | ... | y_n] = [f(x_1) | ... | f(x_n)]    x_i [b, ...] of x [B, ...],  b H itemsize ~ 1 MiB per thread

This is plain differentiable torch: autograd sums the weights' gradients over the parts. Under torch.compile and
torch.jit.trace the batch is not cut, because the graph would contain the layers once per part.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .dispatch import chosen_backend, is_transformed

Work = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class _Sizes:
    """Sizes of parts that fit the cache (measured on an AMD EPYC, 1 MiB of L2 per core: docs/accelerate.md)."""

    bytes: int = 1 << 20  # of the widest layer's output, per thread; half or twice as many cost up to 8%
    weights: int = 32  # of an MLP, per input and output: with fewer, joining the parts takes longer than it saves
    fewest: int = 256  # rows per thread; with fewer, products are slower and torch's overhead per call is larger
    apart: int = 512  # rows from which a product with one row apart saves more than its calls cost (8 layers of 64)


_SIZES = _Sizes()
SHORT = 2 * _SIZES.fewest
"""A batch of fewer rows is never cut, whatever the number of threads."""


def is_worth_cutting(sizes: Sequence[int]) -> bool:
    """Whether an MLP with layers of these sizes has enough weights for its inputs and outputs."""
    weights = sum(a * b for a, b in itertools.pairwise(sizes))
    return weights >= _SIZES.weights * (sizes[0] + sizes[-1])


def rows_at_once(x: Tensor, widths: Callable[[], Sequence[int | None]]) -> int | None:
    """How many rows of x [B, ...] to take at a time; None for all at once.

    Args:
        widths: returns the number of values per row for each layer, None for a layer whose rows may depend on each
            other. It is called only where x is long.
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
    """The number of rows that a thread takes at a time, with ``width`` values per row of ``size`` bytes each."""
    return max(_SIZES.fewest, _SIZES.bytes // (width * size))


class _Asked(threading.local):
    all_lengths = False


_asked = _Asked()


@contextlib.contextmanager
def all_lengths() -> Iterator[None]:
    """Inside the block no batch counts as short: comparisons on few rows then run the code for long batches."""
    before, _asked.all_lengths = _asked.all_lengths, True
    try:
        yield
    finally:
        _asked.all_lengths = before


def checks_all_lengths() -> bool:
    """Whether this thread is inside an ``all_lengths`` block."""
    return _asked.all_lengths


def is_short(given: Any, least: float) -> bool:
    """Whether x, or the first of several inputs, is on a CPU and has fewer than ``least`` rows per thread."""
    x = given[0] if isinstance(given, (tuple, list)) and given else given
    if not isinstance(x, Tensor) or not x.is_cpu or _asked.all_lengths or chosen_backend() == "triton":
        return False
    if torch.compiler.is_compiling():  # it never cuts, and would guard on the comparison
        return True
    return not x.ndim or x.shape[0] < least * torch.get_num_threads()


def one_row(rows: Tensor) -> Tensor:
    """Rows [B, C] as [1, C] where one row was expanded to all, with stride 0; others as they are.

    The rows of an expanded tensor that requires a gradient, or is transformed by torch.func, count as different:
    each has its own gradient. Under torch.compile, torch.jit.trace and make_fx none is looked for, because the
    program must be right for every context.
    """
    if torch.compiler.is_compiling() or rows.shape[0] < 2 or rows.stride(0):
        return rows
    if torch.jit.is_tracing() or get_proxy_mode() is not None:
        return rows
    return rows if rows.requires_grad or is_transformed() else rows[:1]


def is_apart(given: Tensor, x: Tensor) -> bool:
    """Whether V c + b is computed once, for a row c [1, C], in place of [W | V] [x | c] + b for x [B, ...]."""
    if given.shape[0] != 1:
        return False
    return torch.compiler.is_compiling() or x.shape[0] >= (_SIZES.apart if x.is_cpu else 2)


def by_rows(work: Callable[..., Any], x: Tensor, rows: int, *more: Any) -> tuple[Tensor, Any]:
    """``work``, which returns (y [b, ...], log_det [b] or None), on each b = ``rows`` rows of x, concatenated.

    ``work`` takes these rows, and those of each of ``more``: tensors of as many rows, or None.
    """
    parts = [itertools.repeat(None) if each is None else each.split(rows) for each in more]
    ys, log_dets = zip(*[work(*part) for part in zip(x.split(rows), *parts, strict=False)], strict=True)
    return torch.cat(ys), None if log_dets[0] is None else torch.cat(log_dets)
