"""The tables of compiled launches, one per version of Triton, and their update."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from linfast.tables import aligned
from tests.static import child
from tests.static.record import Launch

VERSIONS = ("3.7.1", "3.6.0")  # the version in constraints.txt, and that of torch 2.11
READINGS = ("registers", "spills", "shared", "instructions", "mufu", "wide_loads", "matrix", "async_copies")
COLUMNS = ("kernel", "call", "target", *READINGS, "digest")
_AT_ONCE = 24  # compilations per process, which has twenty minutes

Row = dict[str, str]
Key = tuple[str, str, str]
Table = dict[Key, Row]


def installed() -> str:
    """The version of the installed Triton."""
    return version("triton")


def launches(*ops: str, kernels: Path | None = None) -> list[Launch]:
    """The current launches of all ops or of these; ``kernels``: with kernels from another folder."""
    lines = child.run("tests.static.record", " ".join(ops), kernels=kernels).splitlines()
    return [Launch(**json.loads(line)) for line in lines]


def key(launch: Launch) -> Key:
    return launch.kernel, launch.call, launch.target


def path(triton: str) -> Path:
    return Path(__file__).parent / f"triton-{triton}.tsv"


def kept(triton: str) -> Table:
    """The committed table of this version; empty where there is none."""
    if not path(triton).exists():
        return {}
    with path(triton).open(newline="") as file:
        return {(r["kernel"], r["call"], r["target"]): r for r in csv.DictReader(file, delimiter="\t")}


def stale(table: Table, now: Sequence[Launch]) -> list[Launch]:
    """The launches whose kernel or arguments differ from the row in the table."""
    return [launch for launch in now if table.get(key(launch), {}).get("digest") != launch.digest]


def readings(wanted: Sequence[Launch], triton: str | None = None, with_loops: bool = True) -> list[dict[str, Any]]:
    """Figures of these launches, compiled now in a separate process, by the named version of Triton if given."""
    text = "".join(json.dumps({**vars(launch), "with_loops": with_loops}) + "\n" for launch in wanted)
    try:
        lines = child.run("tests.static.worker", text, first=_packages(triton)).splitlines()
    except child.ChildFailed as failed:
        stopped = wanted[len(failed.stdout.splitlines())]
        raise RuntimeError(f"{key(stopped)} did not compile: {failed}") from failed
    return [json.loads(line) for line in lines]


def compiled(wanted: Sequence[Launch], triton: str | None = None) -> Table:
    """Rows of these launches; see ``readings``."""
    read = readings(wanted, triton, with_loops=False)
    return {key(launch): _row(launch, each) for launch, each in zip(wanted, read, strict=True)}


def _row(launch: Launch, reading: dict[str, Any]) -> Row:
    names = dict(zip(COLUMNS, key(launch), strict=False))
    return {**names, **{name: str(reading[name]) for name in READINGS}, "digest": launch.digest}


@functools.cache
def _packages(triton: str | None) -> Path | None:
    """A folder with this version of Triton, downloaded if necessary; None where it is the installed one."""
    if triton in (None, installed()):
        return None
    folder = child.ROOT / "build" / f"triton-{triton}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={triton}"], check=True)
    return folder


def refresh(triton: str, now: Sequence[Launch]) -> Table:
    """Update this version's table: compile stale rows again, and remove rows of launches that no longer exist."""
    table = kept(triton)
    old = stale(table, now)
    _packages(triton)
    parts = [old[i : i + _AT_ONCE] for i in range(0, len(old), _AT_ONCE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(compiled, part, triton) for part in parts]
        try:
            for done in as_completed(running):
                table |= done.result()
                _write(triton, table)  # so that finished work is not lost
        finally:
            pool.shutdown(cancel_futures=True)
    table = {key(launch): table[key(launch)] for launch in now}
    _write(triton, table)
    return table


def _write(triton: str, table: Table) -> None:
    with path(triton).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


def text(table: Table) -> str:
    """The table in aligned columns."""
    return aligned([COLUMNS, *(tuple(row[column] for column in COLUMNS) for row in table.values())])
