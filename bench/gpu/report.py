"""The files of a call: logs, written line by line, and summary.txt, which is rewritten every second."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_NOTES, MOST_TIMINGS = 25, 60  # lines of a stage in the summary; its log has them all
_WIDTH = 160


def record(line: str) -> dict[str, Any] | None:
    """The line as a JSON object, or None where it is not one."""
    try:
        value = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@dataclass
class Entry:
    """The summary's entry of one stage: start, status, counts, notes for the reader, and times."""

    start: float
    status: str = "running"
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    timings: list[str] = field(default_factory=list)

    def text(self, name: str, now: float) -> list[str]:
        """The stage's lines in the summary."""
        counted = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        status = self.status if self.status != "running" else f"running, {now - self.start:.0f} s"
        lines = [f"{name}: {status}{counted and f': {counted}'}"]
        for told, most in ((self.notes, MOST_NOTES), (self.timings, MOST_TIMINGS)):
            left = [f"and {len(told) - most} more"] if len(told) > most else []
            lines += [f"    {line.strip()[:_WIDTH]}" for line in (*told[:most], *left)]
        return lines

    def take(self, stage: str, line: str) -> None:
        """Count a line of the stage's output; a line that the reader must see becomes a note."""
        if (found := record(line)) is not None:
            self._take_record(found)
        elif counts := re.match(r"\.*COUNTS (\d+) passed, (\d+) failed, (\d+) skipped", line):
            self.counts = Counter(
                dict(zip(("passed", "failed", "skipped"), map(int, counts.groups()), strict=True))
            )
        elif errors := re.search(r"ERROR SUMMARY: (\d+) error", line):
            self.counts.update({"processes checked": 1, "errors": int(errors[1])})
        elif re.match(_SEEN.get(stage, "leaving out "), line):
            self.notes.append(line)

    def _take_record(self, found: Mapping[str, Any]) -> None:
        if "smoke" in found:
            self._count(found["smoke"], "right", "wrong", found["wrong"])
        elif "provider" in found:
            name = " ".join([found["case"], *map(str, found["size"].values()), found["provider"]])
            if self._count(name, "timed", "refused", found["refused"]):
                self.timings.append(f"{name}: {found['p50_ms']:.4g} ms")

    def _count(self, name: str, good: str, bad: str, reason: object) -> bool:
        """Count a result as good, or with a reason as bad, and note the reason. Returns whether it is good."""
        self.counts[bad if reason else good] += 1
        self.notes += [f"{bad}: {name}: {reason}"] if reason else []
        return not reason


_SEEN = {  # lines of a stage's output that become notes; in other stages the sizes that a benchmark leaves out
    "tests": r".{0,7}FAILED |(ERROR|INTERNALERROR|LEFT)\b",
    "memcheck": r".*=========.*(Invalid|Error|Misaligned|Leaked|at \w+_kernel)",
}


class Report:
    """The folder of a call. A file that cannot be written is reported once, on screen and in the summary."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.start = folder, time.monotonic()
        self.title, self.problems, self.tail = "starting", list[str](), ""
        self.entries: dict[str, Entry] = {}
        self._length, self._summary = 0, -1
        with self.noting("summary.txt"):
            self._summary = os.open(folder / "summary.txt", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        for name in files:
            with self.noting(name):
                (folder / name).write_bytes(b"")
        self.write()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def problem(self, text: str) -> None:
        """Record and print something that is missing or was left out."""
        if text not in self.problems:
            self.problems.append(text)
            print(text, file=sys.stderr, flush=True)

    def append(self, name: str, line: str) -> None:
        """Append a line to the file of this name."""
        with self.noting(name), (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(line)

    def text(self) -> str:
        """The text of the summary as of now."""
        now = self.seconds()
        stages = [line for name, entry in self.entries.items() for line in entry.text(name, now)]
        lines = [f"{self.title}, {now:.0f} s", *self.problems, *stages, self.tail]
        return "\n".join(lines).rstrip() + "\n"

    def write(self) -> None:
        """Rewrite summary.txt in place by one write, so that it is whole whenever this process is killed."""
        if self._summary < 0:
            return
        data = self.text().encode()
        with self.noting("summary.txt"):
            os.pwrite(self._summary, data.ljust(self._length, b"\n"), 0)
            self._length = max(self._length, len(data))

    def close(self) -> None:
        """Write the last summary, cut the file to its length, and print it."""
        self.write()
        if self._summary >= 0:
            with self.noting("summary.txt"):
                os.ftruncate(self._summary, len(self.text().encode()))
        print(self.text(), end="", flush=True)

    @contextlib.contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """A context in which an OSError of the file ``name`` is reported as a problem and not raised."""
        try:
            yield
        except OSError as error:
            self.problem(f"cannot write {name}: {error.strerror}")
