"""Cells and tables of docs/roofline.md, and what was measured: bench/results/gpu.jsonl, if it exists.

That file is a copy of results.jsonl of bench/gpu.sh.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from linfast.bench.report import parse

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "gpu.jsonl"
NOT_YET = "not measured yet"


@functools.cache
def _results(path: Path) -> list[Any]:
    return [result for result, _ in parse(path.read_text().splitlines())] if path.exists() else []


def measured(case: str, provider: str, **size: int | str) -> float | None:
    """The seconds that the provider took at this size in bench/results/gpu.jsonl, by a CUDA graph; None if none."""
    found = [
        1e-3 * result.p50_ms for result in _results(RESULTS)
        if (result.case, result.provider) == (case, provider) and result.size.items() >= size.items()
        and result.p50_ms is not None
    ]  # fmt: skip
    return min(found, default=None)


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2g}" if seconds < 9.95e-3 else f"{1e3 * seconds:,.0f}"


def or_not_yet(seconds: float | None, per: float = 1.0) -> str:
    return NOT_YET if seconds is None else ms(per * seconds)


def us(seconds: float) -> str:
    return ms(1e3 * seconds)


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head.split(", "), *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head.split(", ")), *lines[1:]])
