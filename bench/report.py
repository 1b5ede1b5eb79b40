"""Results as aligned plain-text tables, one a case, and as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields

from linfast.tables import aligned

from .crossover import crossovers
from .environment import Environment
from .harness import Result

__all__ = ["json_line", "parse", "shares", "table"]

_COLUMNS = ("p20 ms", "p50 ms", "p80 ms", "x base", "peak MiB", "copy %", "matmul %", "first s", "error")
_LAUNCHED = "launched ms"
LEGEND = (
    "x base: time over the baseline's, below 1 is faster. peak MiB: memory of one call above weights and inputs.\n"
    "copy %, matmul %: the fewest bytes and operations of the call over its time, as a share of a copy and a\n"
    "matrix product timed in this run; * where the inputs fit in 64 MiB of cache. first s: the first call,\n"
    "compilation included. error: relative to float64."
)
CPU_NOTE = (
    "On a CPU linfast runs its eager reference: 'eager' is linfast, 'torch.compile' compiled linfast; "
    "neither is timed twice."
)
GPU_NOTE = "Times are of CUDA graphs; launched ms: one call launched from Python, ! where that is all there is."
_CACHE = 2**26  # bytes: past the 50 MB L2 of an H100 and the L3 that a core can count on


def json_line(result: Result, environment: Environment) -> str:
    """One line of strict JSON: the fields of Result and of the environment. What is not finite is null."""
    record = asdict(result) | {"size": dict(result.size)} | dict(environment)
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[key] = None
    return json.dumps(record, allow_nan=False)


def parse(lines: Iterable[str]) -> list[tuple[Result, Environment]]:
    """The results and environments that ``json_line`` wrote."""
    names = {field.name for field in fields(Result)}
    records = [json.loads(line) for line in lines if line.strip()]
    return [
        (
            Result(**{key: value for key, value in record.items() if key in names}),
            {key: value for key, value in record.items() if key not in names},
        )
        for record in records
    ]


def shares(result: Result, environment: Environment) -> tuple[float | None, float | None]:
    """(bytes a second over the copy's, operations a second over the matrix product's), where both are known."""
    ceilings = (environment.get("copy_bytes_per_s"), environment.get(f"matmul_{result.dtype}_per_s"))
    if result.p50_ms is None:
        return None, None
    rates = (1e3 * amount / result.p50_ms for amount in (result.bytes, result.operations))
    copy, matmul = (
        rate / ceiling if isinstance(ceiling, (int, float)) else None
        for rate, ceiling in zip(rates, ceilings, strict=True)
    )
    return copy, matmul


def table(results: Sequence[Result], environment: Environment) -> str:
    """The environment, a table a case, where each provider starts to win, and what the columns mean."""
    about = ", ".join(f"{key} {_brief(value)}" for key, value in environment.items() if value is not None)
    cases = dict.fromkeys(result.case for result in results)
    parts = [about, *(_of_case([r for r in results if r.case == case], environment) for case in cases)]
    lines = [str(crossover) for crossover in crossovers(results)]
    notes = GPU_NOTE if any(r.launched_ms is not None for r in results) else CPU_NOTE
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else []), f"{LEGEND}\n{notes}"])


def _of_case(results: Sequence[Result], environment: Environment) -> str:
    keys = list(dict.fromkeys(key for result in results for key in result.size))
    launched = any(result.launched_ms is not None for result in results)
    header = ["case", *keys, "provider", *([_LAUNCHED] if launched else []), *_COLUMNS, ""]
    lines = [header, *(_cells(result, keys, launched, environment) for result in results)]
    return aligned(lines, header.index("provider") + 1)


def _cells(result: Result, keys: Sequence[str], launched: bool, environment: Environment) -> list[str]:
    times = [number(ms) for ms in (result.p20_ms, result.p50_ms, result.p80_ms)]
    peak = None if result.peak_bytes is None else result.peak_bytes / 2**20
    cached = "*" if 0 < result.input_bytes < _CACHE else ""
    uncaptured = "!" if result.launched_ms is not None and not result.captured else ""
    return [
        result.case,
        *(str(result.size.get(key, "")) for key in keys),
        result.provider,
        *([number(result.launched_ms) + uncaptured] if launched else []),
        *times,
        "-" if result.ratio is None else f"{result.ratio:.2f}",
        number(peak),
        *("-" if share is None else f"{100 * share:.1f}{cached}" for share in shares(result, environment)),
        "-" if result.first_s is None else f"{result.first_s:.2f}",
        "-" if result.error is None else f"{result.error:.1e}",
        "" if result.refused is None else f"refused: {result.refused}",
    ]


def number(value: float | None) -> str:
    """Four significant digits without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _brief(value: str | float | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
