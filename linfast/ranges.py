"""Named ranges around ops and stages, for torch.profiler, Nsight Systems and Nsight Compute.

    with linfast.ranges.ranges():  # or LINFAST_RANGES=1 in the environment, for the whole process
        f(x)

A stage runs its body inside ``with range_(name, self):``. Ranges are off by default: a range is then an empty
context. While they are on, each is a ``torch.profiler.record_function`` and, where the ``nvtx`` package is
installed, an NVTX range in the domain "linfast". In code compiled by torch.compile only the
launches of ops are named. See docs/profiling.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import cast

import torch

_on = os.environ.get("LINFAST_RANGES", "0") == "1"
_EMPTY = contextlib.nullcontext()


@contextlib.contextmanager
def ranges(on: bool = True) -> Iterator[None]:
    """Switch ranges on inside the block, or off with ``on=False``, in every thread."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def range_(name: str, owner: object = None) -> contextlib.AbstractContextManager[None]:
    """A range called ``name``, or "Class.name" by the class of ``owner``; an empty context while ranges are off."""
    if not _on or torch.compiler.is_compiling():
        return _EMPTY
    return _marked(name if owner is None else f"{type(owner).__name__}.{name}")


@contextlib.contextmanager
def _marked(name: str) -> Iterator[None]:
    nvtx = _nvtx()
    with torch.profiler.record_function(name), nvtx(name, domain="linfast") if nvtx else _EMPTY:
        yield


@functools.cache
def _nvtx() -> Callable[..., contextlib.AbstractContextManager[None]] | None:
    try:
        from nvtx import annotate
    except ImportError:
        return None
    return cast("Callable[..., contextlib.AbstractContextManager[None]]", annotate)
