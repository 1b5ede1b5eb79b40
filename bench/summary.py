"""``python -m linfast.bench.summary FILE``: results as a short table, to be read in one reply of the machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from linfast.tables import aligned

from .environment import Environment
from .harness import Result
from .report import number, parse, shares

__all__ = ["short_table"]

_PROVIDERS = ("eager", "torch.compile", "linfast", "linfast compiled")
_WORDS = {"forward+backward": "f+b", "training step": "train", "float32": "fp32", "bfloat16": "bf16"}


def short_table(parsed: Sequence[tuple[Result, Environment]]) -> str:
    """A line a size: the median of each provider, and what share of the ceilings linfast's best reaches."""
    groups: dict[tuple[object, ...], list[tuple[Result, Environment]]] = {}
    for result, environment in parsed:
        groups.setdefault((result.case, *result.size.items()), []).append((result, environment))
    providers = [name for name in _PROVIDERS if any(r.provider == name for r, _ in parsed)]
    header = ["case", "size", *providers, "best other", "copy %", "matmul %"]
    about = {key: value for key, value in parsed[-1][1].items() if value is not None}
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "p50 ms; shares are linfast's best", ""]
    return "\n".join([*lines, aligned([header, *(_line(group, providers) for group in groups.values())], 2)])


def _line(group: Sequence[tuple[Result, Environment]], providers: Sequence[str]) -> list[str]:
    by_name = {result.provider: result for result, _ in group}
    others = [r for r, _ in group if r.provider not in _PROVIDERS and r.p50_ms is not None]
    best = min(others, key=lambda r: r.p50_ms or 0.0, default=None)
    ours = [r for r, _ in group if r.provider.startswith("linfast") and r.p50_ms is not None]
    shown = min(ours, key=lambda r: r.p50_ms or 0.0, default=by_name.get("eager"))
    share = (None, None) if shown is None else shares(shown, group[0][1])
    return [
        group[0][0].case,
        _size(group[0][0]),
        *(_time(by_name.get(name)) for name in providers),
        "-" if best is None else f"{number(best.p50_ms)} {best.provider}",
        *("-" if value is None else f"{100 * value:.0f}" for value in share),
    ]


def _time(result: Result | None) -> str:
    return "-" if result is None else "refused" if result.refused else number(result.p50_ms)


def _size(result: Result) -> str:
    return " ".join(
        _WORDS.get(value, value) if isinstance(value, str) else f"{key}{value}"
        for key, value in result.size.items()
    )


if __name__ == "__main__":
    results = parse(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
    print(short_table(results) if results else "no results")
