"""``python -m tests.static.layers``: compile the flagship's launches, update layers.tsv and print it.

A row is a launch with figures of its loop over layers (tests/static/loops.py), the mean where there are several:

    instructions, mufu, matrix and of these wgmma, products, shared_bytes, bytes, local    per row and layer
    waits      how often a layer waits for weights that it copies asynchronously
    beside     instructions of a warp that run while such a copy is under way
    weights    bytes of a layer's weights, which every program reads
    around     instructions per row outside the loop over layers
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linfast.tables import aligned
from tests.static import child, table
from tests.static.loops import Loop, loop_of
from tests.static.record import Launch

PATH = Path(__file__).parent / "layers.tsv"
PER_LAYER = ("instructions", "mufu", "matrix", "wgmma", "products", "shared_bytes", "bytes", "local")
OF_LAYER = ("waits", "beside", "weights")
COLUMNS = (
    "triton", "call", "target", "rows", "warps", "registers", "shared", "spills", *PER_LAYER, *OF_LAYER, "type",
    "around", "digest",
)  # fmt: skip
_ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}

Row = dict[str, str]


def launches() -> list[Launch]:
    """The current launches of tests/static/flagship.py that run all layers of what the call names."""
    made = [Launch(**json.loads(line)) for line in child.run("tests.static.flagship").splitlines()]
    kernels = {"stack": "_coupling_stack_kernel", "linearizer": "_linearizer_stack_kernel"}
    return [launch for launch in made if launch.kernel == kernels[launch.call.partition(" ")[0]]]


def compiled(wanted: list[Launch], triton: str) -> list[Row]:
    """Rows of these launches, compiled by this version of Triton."""
    return [_row(*pair, triton) for pair in zip(wanted, table.readings(wanted, triton), strict=True)]


def _row(launch: Launch, reading: dict[str, Any], triton: str) -> Row:
    kernel = loop_of(reading["loops"])
    rows, warps, kind = launch.constants["ROWS"], launch.options.get("num_warps", 4), _type(launch)
    layers = [_of_layer(loop) for loop in _layers(kernel)]
    figures = {name: sum(layer[name] for layer in layers) / len(layers) for name in (*PER_LAYER, "waits", "beside")}
    for name in PER_LAYER:
        figures[name] *= warps / rows
    for name in ("shared_bytes", "bytes"):
        figures[name] *= 32  # threads of a warp
    figures |= {"weights": _weights(launch, kind), "around": _around(kernel)["instructions"] * warps / rows}
    return {
        "triton": triton, "call": launch.call, "target": launch.target, "rows": str(rows), "warps": str(warps),
        **{name: str(reading[name]) for name in ("registers", "shared", "spills")},
        **{name: f"{value:.4g}" if value < 1e4 else f"{value:.0f}" for name, value in figures.items()},
        "type": kind, "digest": launch.digest,
    }  # fmt: skip


def _layers(kernel: Loop) -> list[Loop]:
    return [loop for _, loop in kernel.walk() if "n_layers" in loop.source]


def _of_layer(layer: Loop) -> Counter[str]:
    copies = list(_copies(layer, 1))
    waits = sum(times for times, _ in copies)
    total = layer.total()
    total["waits"], total["beside"] = waits, sum(n * beside for n, beside in copies) // max(waits, 1)
    return total


def _copies(loop: Loop, times: int) -> Iterator[tuple[int, int]]:
    """(how often in a layer, instructions beside) of each place where weights are copied."""
    if loop.own["copies"]:
        yield times, loop.beside
    for inner in loop.inner:
        yield from _copies(inner, times * (inner.trips or 1))


def _around(kernel: Loop) -> Counter[str]:
    """What is outside the loops over layers."""
    total = Counter(kernel.own)
    for loop in kernel.inner:
        if loop.trips is not None:
            total.update({name: n * loop.trips for name, n in loop.total().items()})
    return total


def _type(launch: Launch) -> str:
    """Of the operands of products."""
    pointer = next(kind for name, kind in launch.signature.items() if name.startswith("operands"))
    return pointer.removeprefix("*")


def _weights(launch: Launch, kind: str) -> int:
    """Bytes of a layer's matrices, in parts, and of its biases in fp32; for the halves of x as they are padded."""
    half, hidden, n = (launch.constants[name] for name in ("HALF", "HIDDEN", "N_LINEAR"))
    widths = [half, *[hidden] * (n - 1), 2 * half]
    elements = sum(a * b for a, b in itertools.pairwise(widths))
    return elements * launch.constants["PARTS"] * _ITEMSIZE[kind] + 4 * sum(widths[1:])


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
