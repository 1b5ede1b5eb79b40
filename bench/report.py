"""Results as plain-text tables and as JSON lines.

``python -m linfast.bench.report FILE`` prints the short table of a file of JSON lines.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from linfast.tables import aligned

from .environment import Environment
from .harness import CONTROL, Result

OURS = ("eager", "torch.compile", "linfast", "linfast frozen", "linfast compiled", "accelerated")
_COLUMNS = (
    *("p20 ms", "p50 ms", "p80 ms", "cpu ms", "x base", "x base cpu", "peak MiB", "copy %", "matmul %"),
    *("first s", "error"),
)
_LAUNCHED = "launched ms"
LEGEND = (
    "x base: time over the baseline's, below 1 is faster; cpu: by the CPU time of the process. peak MiB: memory\n"
    "of one call above weights and inputs. copy %, matmul %: the fewest bytes and operations of the call over\n"
    "its time, as a share of a copy and a matrix product timed in this run; * where the inputs fit in 64 MiB of\n"
    "cache. first s: the first call, compilation included. error: relative to float64."
)
CPU_NOTE = (
    "On a CPU linfast runs its eager reference: 'eager' is linfast, 'torch.compile' compiled linfast; "
    "neither is timed twice."
)
GPU_NOTE = "Times are of CUDA graphs; launched ms: one call launched from Python, ! where that is all there is."
_CACHE = 2**26  # bytes: more than the 50 MB L2 of an H100, and than a core's share of an L3
_SHORT = {"forward+backward": "f+b", "training step": "train", "float32": "fp32", "bfloat16": "bf16"}


def json_line(result: Result, environment: Environment) -> str:
    """One line of strict JSON: the fields of Result and of the environment, with null for nan and infinities."""
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
    """(bytes per second over those of the copy, operations per second over the matrix product's); None: unknown."""
    ceilings = (environment.get("copy_bytes_per_s"), environment.get(f"matmul_{result.dtype}_per_s"))
    if result.p50_ms is None:
        return None, None
    rates = (1e3 * amount / result.p50_ms for amount in (result.bytes, result.operations))
    copy, matmul = (
        rate / ceiling if isinstance(ceiling, (int, float)) else None
        for rate, ceiling in zip(rates, ceilings, strict=True)
    )
    return copy, matmul


def beside_the_fastest(results: Sequence[Result]) -> list[str]:
    """For each size with other libraries, a line with the time of our fastest provider over that of their fastest.

    Both times are ratios to the baseline in the same round, in which drift of the machine cancels.
    """
    lines = []
    for of_size in _by_size(results).values():
        times = []
        for word, key in (("by the clock", "ratio"), ("by CPU time", "cpu_ratio")):
            timed = [(getattr(r, key), r.provider) for r in of_size if getattr(r, key) is not None]
            ours = [ratio for ratio, name in timed if name in OURS]
            others = [pair for pair in timed if pair[1] not in (*OURS, CONTROL)]
            if ours and others:
                times.append(f"{min(ours) / min(others)[0]:.2f} of {min(others)[1]}'s time {word}")
        if times:
            size = size_in_words(of_size[0])
            lines.append(f"{of_size[0].case} {size}: our fastest takes {', '.join(times)}")
    return lines


def table(results: Sequence[Result], environment: Environment) -> str:
    """The environment, one table per case, our fastest against other libraries, and what the columns mean."""
    about = ", ".join(
        f"{key} {f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in environment.items()
        if value is not None
    )
    cases = dict.fromkeys(result.case for result in results)
    parts = [about, *(_of_case([r for r in results if r.case == case], environment) for case in cases)]
    lines = beside_the_fastest(results)
    notes = GPU_NOTE if any(r.launched_ms is not None for r in results) else CPU_NOTE
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else []), f"{LEGEND}\n{notes}"])


def _of_case(results: Sequence[Result], environment: Environment) -> str:
    keys = list(dict.fromkeys(key for result in results for key in result.size))
    launched = any(result.launched_ms is not None for result in results)
    header = ["case", *keys, "provider", *([_LAUNCHED] if launched else []), *_COLUMNS, ""]
    lines = [header, *(_cells(result, keys, launched, environment) for result in results)]
    return aligned(lines, header.index("provider") + 1)


def _cells(result: Result, keys: Sequence[str], launched: bool, environment: Environment) -> list[str]:
    peak = None if result.peak_bytes is None else result.peak_bytes / 2**20
    cached = "*" if 0 < result.input_bytes < _CACHE else ""
    uncaptured = "!" if result.launched_ms is not None and not result.captured else ""
    return [
        result.case,
        *(str(result.size.get(key, "")) for key in keys),
        result.provider,
        *([number(result.launched_ms) + uncaptured] if launched else []),
        *(number(ms) for ms in (result.p20_ms, result.p50_ms, result.p80_ms, result.cpu_ms)),
        *("-" if ratio is None else f"{ratio:.2f}" for ratio in (result.ratio, result.cpu_ratio)),
        number(peak),
        *("-" if share is None else f"{100 * share:.1f}{cached}" for share in shares(result, environment)),
        "-" if result.first_s is None else f"{result.first_s:.2f}",
        "-" if result.error is None else f"{result.error:.1e}",
        "" if result.refused is None else f"refused: {result.refused}",
    ]


def short_table(parsed: Sequence[tuple[Result, Environment]]) -> str:
    """One line per size: the median time of each provider, and the shares of the ceilings that linfast reaches."""
    environment = parsed[-1][1]
    groups = _by_size([result for result, _ in parsed])
    providers = [name for name in OURS if any(r.provider == name for r, _ in parsed)]
    header = ["case", "size", *providers, "best other", "copy %", "matmul %"]
    about = ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)
    rows = [header, *(_short_line(group, providers, environment) for group in groups.values())]
    return "\n".join([about, "p50 ms; shares are linfast's best", "", aligned(rows, 2)])


def _short_line(group: Sequence[Result], providers: Sequence[str], environment: Environment) -> list[str]:
    by_name = {result.provider: result for result in group}
    timed = [result for result in group if result.p50_ms is not None]
    others = [result for result in timed if result.provider not in (*OURS, CONTROL)]
    best = min(others, key=lambda r: r.p50_ms or 0.0, default=None)
    ours = [result for result in timed if result.provider.startswith("linfast")]
    shown = min(ours, key=lambda r: r.p50_ms or 0.0, default=by_name.get("eager"))
    share = (None, None) if shown is None else shares(shown, environment)
    return [
        group[0].case,
        size_in_words(group[0]),
        *(
            "-" if (r := by_name.get(name)) is None else "refused" if r.refused else number(r.p50_ms)
            for name in providers
        ),
        "-" if best is None else f"{number(best.p50_ms)} {best.provider}",
        *("-" if value is None else f"{100 * value:.0f}" for value in share),
    ]


def _by_size(results: Sequence[Result]) -> dict[tuple[object, ...], list[Result]]:
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case, *result.size.items()), []).append(result)
    return groups


def size_in_words(result: Result, but: str | None = None) -> str:
    """The result's size on one line, without its entry ``but``."""
    entries = [(key, value) for key, value in result.size.items() if key != but]
    return " ".join(_SHORT.get(v, v) if isinstance(v, str) else f"{key}{v}" for key, v in entries)


def number(value: float | None) -> str:
    """Four significant digits without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


if __name__ == "__main__":
    found = parse(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
    print(short_table(found) if found else "no results")
