"""Named ranges around ops and stages, for torch.profiler, Nsight Systems and Nsight Compute.

    with linfast.ranges.ranges():  # or LINFAST_RANGES=1 in the environment, for the whole process
        f(x)

A stage runs its body inside ``with range_(name, self):``. Ranges are off by default, and a range then is an empty
context. While they are on, each is a ``torch.profiler.record_function`` and, where the ``nvtx`` package is
installed, an NVTX range in the domain "linfast". Code under torch.compile has no Python to mark: there only the
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
    """Name ops and stages inside the block, in every thread; ``on=False`` names none."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def range_(name: str, owner: object = None) -> contextlib.AbstractContextManager[None]:
    """A range of this name while ranges are on, of "Class.name" where its owner is given; else an empty context."""
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
