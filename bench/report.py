"""Results as an aligned plain-text table and as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from .environment import Environment
from .harness import Result

__all__ = ["json_line", "table"]


def json_line(result: Result, environment: Environment) -> str:
    """One line of strict JSON: the fields of Result and of the environment. What is not finite is null."""
    record = asdict(result) | {"size": dict(result.size)} | dict(environment)
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[key] = None
    return json.dumps(record, allow_nan=False)


def table(results: Sequence[Result], environment: Environment) -> str:
    """The environment, then one line a result: times in ms, peak memory in MiB, the error over float64."""
    keys = list(dict.fromkeys(key for result in results for key in result.size))
    header = ["case", *keys, "provider", "p20 ms", "p50 ms", "p80 ms", "x base", "peak MiB", "error", ""]
    lines = [header, *(_cells(result, keys) for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = header.index("p20 ms")
    text = "\n".join(
        "  ".join(
            cell.rjust(width) if j >= numeric and header[j] else cell.ljust(width)
            for j, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    about = ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)
    return f"{about}\n\n{text}"


def _cells(result: Result, keys: Sequence[str]) -> list[str]:
    times = [_number(ms) for ms in (result.p20_ms, result.p50_ms, result.p80_ms)]
    peak = None if result.peak_bytes is None else result.peak_bytes / 2**20
    return [
        result.case,
        *(str(result.size.get(key, "")) for key in keys),
        result.provider,
        *times,
        "-" if result.ratio is None else f"{result.ratio:.2f}",
        _number(peak),
        "-" if result.error is None else f"{result.error:.1e}",
        "" if result.refused is None else f"refused: {result.refused}",
    ]


def _number(value: float | None) -> str:
    """Four significant digits without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}"
