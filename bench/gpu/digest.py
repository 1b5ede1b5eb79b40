"""What a line of a stage's output means for the summary."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from .report import Entry

__all__ = ["digest", "record"]

_WIDTH = 160


def record(line: str) -> dict[str, Any] | None:
    """The line as a JSON object; None where it is none."""
    try:
        value = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def digest(stage: str, line: str, entry: Entry) -> None:
    """Counts the line, and notes it where a reader must see it."""
    if (found := record(line)) is not None:
        for key, read in _RECORDS.items():
            if key in found:
                read(found, entry)
                return
    elif stage == "tests":
        _test(line, entry)
    elif stage == "memcheck":
        _memcheck(line, entry)
    elif line.startswith("leaving out "):
        _note(entry, line)


def _note(entry: Entry, text: str) -> None:
    entry.notes.append(text.strip()[:_WIDTH])


def _smoke(found: Mapping[str, Any], entry: Entry) -> None:
    outcome = "wrong" if found["wrong"] else "right"
    entry.counts[outcome] += 1
    if outcome == "wrong":
        _note(entry, f"wrong: {found['smoke']}: {found['wrong']}")


def _result(found: Mapping[str, Any], entry: Entry) -> None:
    size = " ".join(str(value) for value in found["size"].values())
    name = f"{found['case']} {size} {found['provider']}"
    entry.counts["refused" if found["refused"] else "timed"] += 1
    if found["refused"]:
        _note(entry, f"refused: {name}: {found['refused']}")
    else:
        entry.timings.append(f"{name}: {found['p50_ms']:.4g} ms")


def _library(found: Mapping[str, Any], entry: Entry) -> None:
    name = f"accelerate {found['library']} {found.get('direction', '')}".strip()
    if "missing" in found:
        entry.counts["libraries not installed"] += 1
    elif "wrong" in found:
        entry.counts["refused"] += 1
        _note(entry, f"{name}: refused: differs by {found['wrong']}")
    else:
        entry.counts["timed"] += 1
        before, after = found["original_wall_ms"], found["accelerated_wall_ms"]
        compiled = f", compiled {found['compiled_wall_ms']:.4g} ms" if "compiled_wall_ms" in found else ""
        _note(entry, f"{name}: {before:.4g} -> {after:.4g} ms{compiled}")


def _stream(found: Mapping[str, Any], entry: Entry) -> None:
    entry.counts["timed"] += 1
    _note(entry, f"stream {found['stream']}: {found['rows_per_s']:.4g} rows/s")


_RECORDS: Mapping[str, Callable[[Mapping[str, Any], Entry], None]] = {
    "smoke": _smoke,
    "provider": _result,
    "library": _library,
    "stream": _stream,
}


def _test(line: str, entry: Entry) -> None:
    if found := re.match(r"\.*COUNTS (\d+) passed, (\d+) failed, (\d+) skipped", line):
        passed, failed, skipped = map(int, found.groups())
        entry.counts = Counter(passed=passed, failed=failed, skipped=skipped)
    elif "FAILED " in line[:8] or re.match(r"(ERROR|INTERNALERROR|LEFT)\b", line):
        _note(entry, line)


def _memcheck(line: str, entry: Entry) -> None:
    if found := re.search(r"ERROR SUMMARY: (\d+) error", line):
        entry.counts["processes checked"] += 1
        entry.counts["errors"] += int(found[1])
    elif re.search(r"=========.*(Invalid|Error|Misaligned|Leaked|at \w+_kernel)", line):
        _note(entry, line)
