"""Named ranges around every op and stage, for Nsight Systems, Nsight Compute and torch.profiler.

    with linfast.profiling.ranges():
        f(x)

or the environment variable LINFAST_RANGES=1. Off by default, and then a call costs a global's
read. On, each range is an NVTX range (where the ``nvtx`` package is installed) in the domain
"linfast" and a ``torch.profiler.record_function``. Names: a function's own, "Class.method" for
methods, the op's for a kernel's launch (low_rank, low_rank_backward). Inside torch.compile only
the last are left: the compiled graph has no Python to mark. See docs/profiling.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar, cast

import torch

__all__ = ["annotate", "in_range", "ranges"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_on = os.environ.get("LINFAST_RANGES", "0") == "1"


@contextlib.contextmanager
def ranges(on: bool = True) -> Iterator[None]:
    """Mark ops and stages inside the block, in every thread."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def in_range(name: str, function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` inside a range of this name while ranges are on."""

    def ranged(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not _on or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with _range(name):
            return function(*args, **kwargs)

    return ranged


def annotate(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: the function in a range of its name, a method in "Class.method" of its object's class."""
    is_method = "." in function.__qualname__.rpartition("<locals>.")[2]

    @functools.wraps(function)
    def annotated(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not _on or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        owner = f"{type(args[0]).__name__}." if is_method else ""
        with _range(owner + function.__name__):
            return function(*args, **kwargs)

    # Code of its own: torch.compile counts recompilations by code object, and all would share one limit.
    code = annotated.__code__.replace(co_name=function.__qualname__)  # type: ignore[attr-defined]
    annotated.__code__ = code  # type: ignore[attr-defined]
    return annotated


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = _nvtx()
    with torch.profiler.record_function(name), nvtx(name, domain="linfast") if nvtx else contextlib.nullcontext():
        yield


@functools.cache
def _nvtx() -> Callable[..., contextlib.AbstractContextManager[None]] | None:
    try:
        import nvtx
    except ImportError:
        return None
    return cast("Callable[..., contextlib.AbstractContextManager[None]]", nvtx.annotate)
