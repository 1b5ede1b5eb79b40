"""Triton's interpreter without work that changes nothing: three quarters of its time on our kernels.

It checks every sum and product of int32 for overflow and, unless debugging, throws the answer away; and it
puts its own functions into triton.language again at every call of one @triton.jit function by another.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from triton.runtime import interpreter

_put_in = interpreter._patch_lang
_done: set[int] = set()


class _Scope:
    """What takes the functions out again at the end of a launch."""

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def restore(self) -> None:
        _done.clear()
        self._scope.restore()


def _once_a_launch(function: Any) -> _Scope | None:
    """The interpreter's functions in place for this module; None where they are."""
    module = id(function.__globals__)
    if module in _done:
        return None
    _done.add(module)
    return _Scope(_put_in(function))


def install() -> None:
    """From here on; for the process."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _once_a_launch
