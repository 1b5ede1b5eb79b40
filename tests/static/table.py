"""The kept table of what every configuration compiles to, and bringing it up to date."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from linfast.tables import aligned
from tests.static.cases import TARGETS, StaticCase, all_cases

PATH = Path(__file__).parent / "table.tsv"
READINGS = ("registers", "spills", "shared", "instructions", "mufu", "wide_loads", "matrix", "async_copies")
COLUMNS = ("kernel", "config", "target", *READINGS, "digest")
_BATCH = 32  # compilations a process, which has twenty minutes
_ROOT = Path(__file__).parent.parent.parent

Row = dict[str, str]
Key = tuple[str, str, str]


def triton_version() -> str:
    """The installed version; Triton is not imported."""
    from importlib.metadata import version

    return version("triton")


def pinned_version() -> str:
    """The version that the kept table was made with: constraints.txt's."""
    return re.search(r"^triton==(\S+)", (_ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def kept() -> dict[Key, Row]:
    """The table as committed."""
    if not PATH.exists():
        return {}
    with PATH.open(newline="") as file:
        return {(r["kernel"], r["config"], r["target"]): r for r in csv.DictReader(file, delimiter="\t")}


def compiled(wanted: Iterable[tuple[str, int]]) -> dict[Key, Row]:
    """Rows of these (target, number of a case), compiled now in a process of its own."""
    wanted, cases = list(wanted), all_cases()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.static.worker"],
        input=json.dumps(wanted), capture_output=True, text=True, cwd=_ROOT, env=environment, timeout=1200,
    )  # fmt: skip
    rows = {}
    for line, (target, number) in zip(done.stdout.splitlines(), wanted, strict=False):
        row = _row(cases[number], target, json.loads(line))
        rows[row["kernel"], row["config"], target] = row
    if done.returncode or len(rows) < len(wanted):
        target, number = wanted[min(len(rows), len(wanted) - 1)]
        stopped = f"{target}: {cases[number].kernel} {cases[number].config}"
        raise RuntimeError(f"{stopped} did not compile:\n{done.stderr[-2000:]}")
    return rows


def _row(case: StaticCase, target: str, reading: dict[str, int]) -> Row:
    numbers = {name: str(reading[name]) for name in READINGS}
    digest = case.digest(target, triton_version())
    return {"kernel": case.kernel, "config": case.config, "target": target, **numbers, "digest": digest}


def stale(target: str, table: dict[Key, Row]) -> list[int]:
    """Numbers of the cases whose source, configuration or compiler has changed since the kept row."""
    return [
        number
        for number, case in enumerate(all_cases())
        if target in case.targets
        and table.get((case.kernel, case.config, target), {}).get("digest") != case.digest(target, triton_version())
    ]


def refreshed() -> dict[Key, Row]:
    """The table with stale rows compiled again and rows of cases that are gone left out."""
    table = kept()

    def compile_stale(target: str) -> dict[Key, Row]:
        numbers, rows = stale(target, table), {}
        for first in range(0, len(numbers), _BATCH):
            rows |= compiled((target, number) for number in numbers[first : first + _BATCH])
        return rows

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows in list(pool.map(compile_stale, TARGETS)):
            table.update(rows)
    order = [(case.kernel, case.config, target) for case in all_cases() for target in case.targets]
    return {key: table[key] for key in order}


def write(table: dict[Key, Row]) -> None:
    """Keep this table."""
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


def text(table: dict[Key, Row]) -> str:
    """The table in aligned columns."""
    rows = [COLUMNS, *(tuple(row[column] for column in COLUMNS) for row in table.values())]
    return aligned(rows)
