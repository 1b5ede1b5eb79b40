"""``python -m tests.static.roofline``: the tables of docs/roofline.md, from layers.tsv; ``--write`` puts them there.

A model of time. An iteration of the loop over layers has a bound for each unit of a multiprocessor, in clocks of one
program, with n the counts of layers.tsv per row and layer, and all rows of the program:

    issue     n instructions / 4           four schedulers, an instruction of a warp each per clock
    MUFU      32 n mufu / 16               sixteen special functions per clock
    matrix    2 n products / rate          mma.sync at 0.6 of the rate that was measured with wgmma; tf32 at half
    shared    n bytes / 128                bytes per clock, and of operands that wgmma reads there, once for 64 rows
    L2        weights / rate               the multiprocessor's share of L2's rate, at most 64 bytes per clock

The floor is the largest of them, or device memory's time for x and y. The prediction adds what one program cannot do at
once: matrix units and the other units are at work in turn, so that half of the shorter one's time is added to the
longer one's; and where weights are copied, what is left of LATENCY and of the copy once the instructions beside it have
run. With P programs on a multiprocessor at once, a P-th of both is added. A launch begins after START.

Programs run on SMs multiprocessors, in ceil(programs / SMs) rounds. The share of one half, LATENCY, START and mma.sync's
rate are assumptions; other rates are data sheets' or were measured by others. All modes and sizes have the same model.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.static.layers import Row, kept

PAGE = Path(__file__).parents[2] / "docs" / "roofline.md"
LATENCY = 500  # clocks until the first bytes from a busy L2
START = 3e-6  # seconds: a launch, and the first access to memory
MMA_SYNC = 0.6
MODES = ("fast", "tf32", "high", "exact")
LAYERS = 16


@dataclass(frozen=True)
class Gpu:
    """Rates per second: bytes of memory and L2, and operations of a product in bf16 by wgmma."""

    name: str
    memory: float
    sms: int = 132
    clock: float = 1.755e9
    l2: float = 5.5e12
    bf16: float = 790e12
    shared: int = 233_472  # bytes of a multiprocessor
    registers: int = 65_536


H100, H200 = Gpu("H100", 3.35e12), Gpu("H200", 4.8e12)


class Prediction:
    """Seconds that a launch takes, and why.

    Args:
        row: of layers.tsv.
        gpu: where.
        batch: rows of x.
        layers: in all.
        bytes_per_row: of x and y in device memory.
    """

    def __init__(self, row: Row, gpu: Gpu, batch: int, layers: int = LAYERS, bytes_per_row: int = 512) -> None:
        n, rows, warps = {k: float(row[k]) for k in row.keys() - {"triton", "call", "target", "type", "digest"}}, *(
            int(row[k]) for k in ("rows", "warps")
        )
        programs = math.ceil(batch / rows)
        active, rounds = min(programs, gpu.sms), math.ceil(programs / gpu.sms)
        self.resident = min(rounds, _fit(row, gpu))
        schedulers, wgmma, itemsize = min(4, warps), n["wgmma"] > 0, 4 if row["type"] == "fp32" else 2
        rate = gpu.bf16 / gpu.sms / gpu.clock * 2 / itemsize * (1 if wgmma else MMA_SYNC)
        operands = n["products"] / 64 * itemsize if wgmma else 0
        l2 = min(64, gpu.l2 / gpu.clock / active)
        clocks = {
            "issue": n["instructions"] * rows / schedulers,
            "MUFU": n["mufu"] * rows * 32 / 16,
            "matrix": 2 * n["products"] * rows / rate,
            "shared": (n["shared_bytes"] + operands) * rows / 128,
            "L2": n["weights"] / l2,
        }
        others, matrix = max(clocks["issue"], clocks["MUFU"]), max(clocks["matrix"], clocks["shared"])
        in_turn = min(others, matrix) / 2
        beside = n["beside"] * warps / schedulers
        waiting = n["waits"] * max(0, LATENCY + n["weights"] / n["waits"] / 64 - beside)
        layer = max(max(others, matrix) + (in_turn + waiting) / self.resident, clocks["L2"])
        per_clock = rounds * layers / gpu.clock
        around = rounds * n["around"] * rows / schedulers / gpu.clock
        self.bounds = {"memory": batch * bytes_per_row / gpu.memory} | {k: v * per_clock for k, v in clocks.items()}
        self.waiting = waiting / self.resident * per_clock
        self.floor = max(self.bounds.values())
        self.time = START + max(self.bounds["memory"], layer * per_clock + around)

    @property
    def held_by(self) -> str:
        """The largest two of the bounds and of the waiting, the larger one first."""
        parts = self.bounds | {"waiting": self.waiting}
        return ", ".join(sorted(parts, key=parts.__getitem__, reverse=True)[:2])


def _fit(row: Row, gpu: Gpu) -> int:
    """Programs that fit a multiprocessor at once."""
    threads, registers = 32 * int(row["warps"]), -(-int(row["registers"]) // 8) * 8
    return min(gpu.registers // (registers * threads), gpu.shared // (int(row["shared"]) + 1024), 2048 // threads)


def chosen(call: str, triton: str = "3.7.1", target: str = "sm_90") -> Row:
    """The row of a call of tests/static/flagship.py."""
    (row,) = [r for r in kept() if (r["call"], r["triton"], r["target"]) == (call, triton, target)]
    return row


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2g}" if seconds < 9.95e-3 else f"{1e3 * seconds:.0f}"


def _markdown(head: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [head, re.sub(r"[^|]+", "---", head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def counts() -> str:
    def cells(mode: str) -> Iterable[str]:
        new, old = chosen(f"linearizer {mode}"), chosen(f"linearizer {mode}", "3.6.0")
        fits = str(_fit(new, H100))
        yield from (mode, f"{new['rows']} rows, {new['warps']} warps, {fits}", "wgmma" if float(new["wgmma"]) else "mma.sync")
        yield from (f"{new[name]} / {old[name]}" for name in ("instructions", "registers", "spills"))
        yield from (new[name] for name in ("mufu", "products", "shared_bytes", "weights", "waits", "beside"))

    head = (
        "| mode | rows and warps of a program, programs at once | products by | instructions | registers | spills | MUFU | multiply-adds "
        "| bytes of shared memory | bytes of weights | waits | instructions beside one |"
    )  # fmt: skip
    return _markdown(head, map(cells, MODES))


def flagship() -> str:
    def cells(mode: str) -> Iterable[str]:
        there = Prediction(chosen(f"linearizer {mode}"), H100, 1 << 20)
        yield mode
        yield from (_milliseconds(there.bounds[k]) for k in ("memory", "L2", "matrix", "shared", "MUFU", "issue"))
        yield from (_milliseconds(there.waiting), _milliseconds(there.floor), f"**{_milliseconds(there.time)}**")
        yield _milliseconds(Prediction(chosen(f"linearizer {mode}", "3.6.0"), H100, 1 << 20).time)
        yield from (there.held_by, "not measured yet")

    head = (
        "| mode | memory | L2 | matrix | shared | MUFU | issue | waiting | floor | prediction | under Triton 3.6 "
        "| held by | measured |"
    )  # fmt: skip
    return _markdown(head, map(cells, MODES))


def batches() -> str:
    def cells(batch: int) -> Iterable[str]:
        yield f"{batch:,}"
        yield from (_milliseconds(Prediction(chosen(f"linearizer {mode}"), H100, batch).time) for mode in MODES)
        yield "not measured yet"

    return _markdown("| B | fast | tf32 | high | exact | measured |", map(cells, (1, 64, 256, 1024, 1 << 14, 1 << 17, 1 << 20, 1 << 22)))


TABLES: dict[str, Callable[[], str]] = {"counts": counts, "flagship": flagship, "batches": batches}


def with_tables(page: str) -> str:
    """The page with each table between <!-- NAME --> and <!-- --> made anew."""
    for name, table in TABLES.items():
        page = re.sub(f"(<!-- {name} -->\n).*?(\n<!-- -->)", lambda m, t=table: m[1] + t() + m[2], page, flags=re.S)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.static.roofline")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/roofline.md")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text()))
    for name, table in TABLES.items():
        print(f"{name}\n{table()}\n")


if __name__ == "__main__":
    main()
