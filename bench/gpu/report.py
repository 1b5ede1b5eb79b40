"""What has happened so far: the logs line by line, and summary.txt written again at every change."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Entry", "Report"]

MOST_NOTES, MOST_TIMINGS = 25, 60  # of a stage, in the summary; its log has them all
_RESERVED = 2**16  # bytes of the disk that summary.txt takes at the start, so that a full one does not cut it
_KEEP_SIZE = 1


@dataclass
class Entry:
    """A stage: when it began, how it goes, what was counted, what a reader must see, and what took how long."""

    start: float
    status: str = "running"
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    timings: list[str] = field(default_factory=list)

    def text(self, name: str, now: float) -> list[str]:
        """Its lines of the summary."""
        counted = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        status = self.status if self.status != "running" else f"running, {now - self.start:.0f} s"
        shown = [f"    {line}" for line in (*_first(self.notes, MOST_NOTES), *_first(self.timings, MOST_TIMINGS))]
        return [f"{name}: {status}{f': {counted}' if counted else ''}", *shown]


def _first(lines: list[str], most: int) -> list[str]:
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


class Report:
    """The folder of a call. What cannot be written is said once, on screen and in the summary; nothing raises."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.start = folder, time.monotonic()
        self.title, self.problems, self.tail = "starting", list[str](), ""
        self.entries: dict[str, Entry] = {}
        self.lock = threading.RLock()
        with self._noting("summary.txt"):
            self._summary = os.open(folder / "summary.txt", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            with contextlib.suppress(AttributeError):  # a C library without it
                ctypes.CDLL(None).fallocate(self._summary, _KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(_RESERVED))
        self._length = 0
        for name in files:
            with self._noting(name):
                (folder / name).write_bytes(b"")
        self.write()

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def problem(self, text: str) -> None:
        """Something that is missing or was left out."""
        with self.lock:
            if text not in self.problems:
                self.problems.append(text)
                print(text, file=sys.stderr, flush=True)

    def append(self, name: str, line: str) -> None:
        """A line to one of the files."""
        with self.lock, self._noting(name), (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(line)

    def text(self) -> str:
        """The summary."""
        now = self.seconds()
        with self.lock:
            stages = [line for name, entry in self.entries.items() for line in entry.text(name, now)]
            lines = [f"{self.title}, {now:.0f} s", *self.problems, *stages, self.tail]
        return "\n".join(lines).rstrip() + "\n"

    def write(self) -> None:
        """summary.txt as of now, in place and at once: whoever kills this process finds a whole one."""
        with self.lock, self._noting("summary.txt"):
            data = self.text().encode()
            os.pwrite(self._summary, data.ljust(self._length, b"\n"), 0)
            self._length = max(self._length, len(data))

    def close(self) -> None:
        """The last summary, cut to its length, here and on the screen."""
        self.write()
        with self._noting("summary.txt"):
            os.ftruncate(self._summary, len(self.text().encode()))
        print(self.text(), end="", flush=True)

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, AttributeError) as error:  # AttributeError: summary.txt could not be made
            if isinstance(error, OSError):
                self.problem(f"cannot write {name}: {error.strerror}")
