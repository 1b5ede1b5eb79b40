"""``python -m tests.static.roofline``: the tables of docs/roofline.md; ``--write`` puts them there.

Stacks of couplings are predicted by tests/static/model.py. Latent products have bytes and operations alone: each
tensor once from and to device memory at 0.9 of its rate, and the products of parts by mma.sync, or multiply-adds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.static.flagship import MODES
from tests.static.layers import Row, kept
from tests.static.model import FLAGSHIP, H100, H200, MMA_SYNC, START, Gpu, Prediction, at_a_time, eager

PAGE = Path(__file__).parents[2] / "docs" / "roofline.md"


def chosen(call: str, batch: int = FLAGSHIP, triton: str = "3.7.1", target: str = "sm_90") -> Row:
    """The row of a call of tests/static/flagship.py for this batch."""
    rows = {
        int(row["call"].rpartition(" B=")[2]): row
        for row in kept()
        if (row["triton"], row["target"]) == (triton, target) and row["call"].startswith(f"{call} B=")
    }
    return rows[max([size for size in rows if size <= batch], default=min(rows))]


def predicted(mode: str, batch: int = FLAGSHIP, gpu: Gpu = H100, triton: str = "3.7.1") -> Prediction:
    """Of the flagship Linearizer."""
    return Prediction(chosen(f"linearizer {mode} D=64", batch, triton), gpu, batch)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2g}" if seconds < 9.95e-3 else f"{1e3 * seconds:,.0f}"


def _us(seconds: float) -> str:
    return _ms(1e3 * seconds)


def _table(head: str, rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head.split(", "), *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head.split(", ")), *lines[1:]])


def counts() -> str:
    """What is counted, per mode: under Triton 3.7.1, and where they differ under 3.6."""

    def cells(mode: str) -> Iterator[str]:
        rows = [chosen(f"linearizer {mode} D=64", triton=triton) for triton in ("3.7.1", "3.6.0")]
        row = rows[0]
        yield from (mode, row["rows"], row["warps"], str(at_a_time(row, H100)))
        yield "wgmma" if float(row["wgmma"]) else "mma.sync"
        for name in ("instructions", "matrix", "registers", "spills"):
            yield " / ".join(dict.fromkeys(each[name] for each in rows))
        yield from (row[name] for name in ("mufu", "products", "shared_bytes", "weights", "waits", "beside"))

    head = (
        "mode, rows, warps, programs at once, products by, instructions, matrix instructions, registers, spills, "
        "MUFU, multiply-adds, bytes of shared memory, bytes of weights, waits, instructions beside"
    )
    return _table(head, map(cells, MODES))


def flagship() -> str:
    """Floor and prediction per mode, in milliseconds, beside estimates of plain torch."""

    def cells(mode: str) -> Iterator[str]:
        here, old = predicted(mode), predicted(mode, triton="3.6.0")
        yield from (mode, _ms(here.floor), f"**{_ms(here.time)}**", _ms(old.time), here.held_by)
        for plain in (eager(mode, H100), eager(mode, H100, fused=True)):
            yield f"{_ms(plain)} ({plain / here.time:.1f} times)"
        yield "not measured yet"

    head = "mode, floor, prediction, under Triton 3.6, held by, eager, torch.compile, measured"
    return _table(head, map(cells, MODES))


def bounds() -> str:
    """The time of each unit per mode, in milliseconds."""
    units = ("memory", "L2", "matrix", "shared", "MUFU", "issue")

    def cells(mode: str) -> Iterator[str]:
        here = predicted(mode)
        yield from (mode, *(_ms(here.bounds[unit]) for unit in units), _ms(here.waiting))

    return _table(f"mode, {', '.join(units)}, waiting", map(cells, MODES))


def batches() -> str:
    """Predictions by batch, in milliseconds."""

    def cells(batch: int) -> Iterator[str]:
        yield f"{batch:,}"
        yield from (_ms(predicted(mode, batch).time) for mode in MODES)
        yield "not measured yet"

    sizes = (1, 64, 256, 1024, 4096, 1 << 14, 1 << 17, 1 << 20, 1 << 22)
    return _table(f"B, {', '.join(MODES)}, measured", map(cells, sizes))


def large() -> str:
    """D = 128, H = 256 in one launch, where it fits."""

    def cells(mode: str) -> Iterator[str]:
        row = chosen(f"linearizer {mode} D=128")
        here = Prediction(row, H100, FLAGSHIP, bytes_per_row=1024)
        yield from (mode, row["rows"], row["instructions"], row["spills"])
        yield from (_ms(here.bounds[k]) for k in ("memory", "L2", "matrix", "shared", "issue"))
        yield from (_ms(here.waiting), _ms(here.floor), f"**{_ms(here.time)}**", here.held_by)
        yield from (_ms(eager(mode, H100, fused=True, D=128, H=256)), "not measured yet")

    head = (
        "mode, rows, instructions, spills, memory, L2, matrix, shared, issue, waiting, floor, prediction, held by, "
        "library, measured"
    )
    return _table(head, map(cells, ("fast", "tf32")))


# Bytes and operations in fp32 of one call, and whether products run on matrix units.
def _latent_ops() -> Iterator[tuple[str, float, float, bool]]:
    for K in (8, 64):
        B, N = 4096, 256
        yield f"latent_matmul, K = {K}, N = {N}, B = {B}", 4 * (2 * B * N + K * N * N), 2 * B * N * N, True
    yield f"latent_matmul, an operator per sample, N = {N}, B = {B}", 4 * B * (2 * N + N * N), 2 * B * N * N, False
    for N, B in ((1024, 256), (12288, 128)):
        yield f"low_rank, r = 8, N = {N}, B = {B}", 4 * B * N * (2 + 2 * 8), 4 * B * N * 8, False
    for k in (3, 9):
        values = 512 * 64 * 32 * 32
        yield f"depthwise_conv, {k} x {k}, 64 channels of 32 x 32, B = 512", 8 * values, 2 * k * k * values, False


def latent() -> str:
    """Latent operators, in microseconds."""

    def cells(name: str, size: float, flop: float, matrix: bool) -> Iterator[str]:
        def times(gpu: Gpu) -> tuple[float, float]:
            rate = gpu.bf16 * MMA_SYNC / 6 if matrix else gpu.sms * 128 * 2 * gpu.clock
            return size / gpu.memory / 0.9, flop / rate

        yield from (name, f"{size / 1e6:,.0f}", f"{flop / 1e9:.2g}")
        yield from (_us(part) for part in times(H100))
        yield " / ".join(_us(START + max(times(gpu))) for gpu in (H100, H200))
        yield from ("memory" if times(H100)[0] > times(H100)[1] else "arithmetic", "not measured yet")

    head = "op, MB, GFLOP, memory, arithmetic, prediction H100 / H200, held by, measured"
    return _table(head, (cells(*op) for op in _latent_ops()))


TABLES: dict[str, Callable[[], str]] = {
    "counts": counts, "flagship": flagship, "bounds": bounds, "batches": batches, "large": large,
    "latent": latent,
}  # fmt: skip


def with_tables(page: str) -> str:
    """The page with each table between <!-- NAME --> and <!-- --> made anew."""

    def anew(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- -->", anew, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.static.roofline")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/roofline.md")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text()))
    for name, table in TABLES.items():
        print(f"{name}\n{table()}\n")


if __name__ == "__main__":
    main()
