"""``python -m tests.static.layers``: compile the flagship's launches, update layers.tsv and print it.

A row is a launch with figures of its loop over layers (tests/static/loops.py) per row of x and layer, the mean where
a launch has several such loops; ``around`` are instructions per row outside these loops, all layers together.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path

from linfast.tables import aligned
from tests.static import child, table
from tests.static.loops import Loop, loop_of
from tests.static.record import Launch

PATH = Path(__file__).parent / "layers.tsv"
PER_LAYER = ("instructions", "mufu", "matrix", "products", "shared_bytes", "bytes", "local")
COLUMNS = (
    "triton", "call", "target", "rows", "warps", "registers", "shared", "spills", *PER_LAYER, "around", "digest"
)  # fmt: skip

Row = dict[str, str]


def launches() -> list[Launch]:
    """The current launches of tests/static/flagship.py, without those that pack weights."""
    made = [Launch(**json.loads(line)) for line in child.run("tests.static.flagship").splitlines()]
    return [launch for launch in made if "ROWS" in launch.constants]


def compiled(wanted: list[Launch], triton: str) -> list[Row]:
    """Rows of these launches, compiled by this version of Triton."""
    rows = []
    for launch, reading in zip(wanted, table.readings(wanted, triton), strict=True):
        size, warps = launch.constants["ROWS"], launch.options.get("num_warps", 4)
        kernel = loop_of(reading["loops"])
        layer, around = _layer(kernel), _around(kernel)
        figures = {name: layer[name] * warps / size for name in PER_LAYER}
        figures |= {name: figures[name] * 32 for name in ("shared_bytes", "bytes")}  # of a warp's threads
        figures["around"] = around["instructions"] * warps / size
        row = {name: f"{value:.4g}" for name, value in figures.items()}
        row |= {name: str(reading[name]) for name in ("registers", "shared", "spills")}
        head = {"triton": triton, "call": launch.call, "target": launch.target, "rows": str(size)}
        rows.append({**head, "warps": str(warps), **row, "digest": launch.digest})
    return rows


def _layer(kernel: Loop) -> Counter[str]:
    """The mean of the loops over layers; where there is none the kernel is one layer."""
    loops = [loop.total() for _, loop in kernel.walk() if "n_layers" in loop.source] or [kernel.total()]
    return Counter({name: sum(loop[name] for loop in loops) / len(loops) for name in PER_LAYER})  # type: ignore[misc]


def _around(kernel: Loop) -> Counter[str]:
    """What is outside the loops over layers."""
    total = Counter(kernel.own)
    for loop in kernel.inner:
        if loop.trips is not None:
            total.update({name: n * loop.trips for name, n in loop.total().items()})
    return total


def kept() -> list[Row]:
    """The committed rows."""
    with PATH.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.static.layers", description=__doc__)
    parser.parse_args()
    wanted = launches()
    rows = [row for triton in table.VERSIONS for row in compiled(wanted, triton)]
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(aligned([COLUMNS, *(tuple(row[column] for column in COLUMNS) for row in rows)]))


if __name__ == "__main__":
    main()
