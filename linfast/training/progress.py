"""How far a run is: a bar on a terminal, where tqdm is installed; a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from .._command import say

__all__ = ["Progress"]

_SECONDS = 5.0  # between two lines


class Progress:
    """Units done of all, on stderr.

    Args:
        what: the bar's or the line's first word.
        done, total: units at the start, and in all.
        unit: what is counted.
        enabled: whether to show anything.

    Attributes:
        note: what stands at the end of the bar or line, such as the loss.
    """

    def __init__(self, what: str, done: int, total: int, unit: str, enabled: bool = True) -> None:
        self.what, self.total, self.unit, self.note = what, total, unit, ""
        self.enabled = enabled and sys.stderr is not None
        self._bar = _bar(what, done, total, unit) if self.enabled and sys.stderr.isatty() else None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int) -> None:
        """So many are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self.enabled and (done == self.total or time.monotonic() >= self._last + _SECONDS):
            self._last = time.monotonic()
            parts = f"{done}/{self.total} {self.unit}s", f"{self._last - self._start:.0f} s", self.note
            say(f"{self.what}: {', '.join(filter(None, parts))}")


def _bar(what: str, done: int, total: int, unit: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=done, total=total, desc=what, unit=unit, mininterval=0.5)
