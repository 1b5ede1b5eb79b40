"""``python -m tests.static.roofline``: the tables of docs/roofline.md; ``--write`` puts them there.

Stacks of couplings are predicted by tests/static/model.py. A latent product takes START for each launch, one after
another, and the largest of: each tensor once from and to device memory at 0.9 of its rate; L2; and products and
issue, of which half of the shorter is added to the longer.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.static.flagship import MODES
from tests.static.layers import Row, kept
from tests.static.model import (
    FLAGSHIP,
    FP32,
    H100,
    H200,
    IN_TURN,
    MMA_SYNC,
    START,
    Gpu,
    Prediction,
    at_a_time,
    eager,
)

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


class LatentOp(NamedTuple):
    """Counts of one call in fp32, "exact".

    Args:
        name: the op and its sizes.
        launches: kernels, one after another.
        memory: bytes of device memory, each tensor once.
        flop: operations, without those that parts or partly filled tiles add.
        products: seconds of matrix units, or of cuBLAS. Other operations are in ``instructions``.
        l2: bytes read and written through L2, where that is more.
        instructions: of warps.
    """

    name: str
    launches: int
    memory: float
    flop: float
    products: float = 0.0
    l2: float = 0.0
    instructions: float = 0.0


# Instructions per warp are of kernels compiled for sm_90 by Triton 3.7.1, as tests/static/loops.py counts them.
def _bank(K: int, N: int, B: int) -> LatentOp:
    """Rows sorted by operator: at most B / rows + K tiles, counted as full, in six products of parts."""
    few = 16 * max(K, 64) >= B
    rows, warps, around, step, rate = (16, 4, 427, 357, MMA_SYNC) if few else (128, 8, 945, 335, 1.0)
    tiles, columns = B / rows + K, N // 64
    return LatentOp(
        f"latent_matmul, K = {K:,}, N = {N}, B = {B:,}",
        launches=5 + 6,  # of which a sort is 6
        memory=8 * B * N + 4 * K * N * N + 94 * B,  # 94 bytes: the sort and its order
        flop=2 * B * N * N,
        products=6 * 2 * rows * tiles * N * N / (rate * H100.bf16),
        l2=4 * (tiles * N * N + columns * B * N + B * N),
        instructions=warps * tiles * columns * (around + N // 32 * step),
    )


def _latent_ops() -> Iterator[LatentOp]:
    B, N = 1 << 20, 64
    flop = 2 * B * N * N
    yield LatentOp(f"shared A (cuBLAS), N = {N}, B = {B:,}", 1, 8 * B * N, flop, products=flop / FP32)
    yield LatentOp(f"Diagonal (torch), N = {N}, B = {B:,}", 1, 8 * B * N, B * N)
    B, N = 1024, 512
    yield LatentOp(f"A per sample (cuBLAS), N = {N}, B = {B:,}", 1, 4 * B * N * (N + 2), 2 * B * N * N)
    B, N, K = 8192, 64, 8
    yield LatentOp(
        f"latent_matmul, K = {K}, N = {N}, B = {B:,}: row by row", 1, 8 * B * N + 4 * K * N * N,
        2 * B * N * N, l2=4 * B * N * (N + 2), instructions=4 * B * (192 + N // 32 * 56),
    )  # fmt: skip
    for K, N, B in ((16, 64, 1 << 20), (16, 512, 1 << 16), (4096, 128, 1 << 14)):
        yield _bank(K, N, B)
    for N, B, splits, tiles in ((1024, 256, 4, 1), (12288, 128, 24, 2)):
        instructions = 4 * B * (splits * (174 + tiles * 66) + N // 256 * 232)
        yield LatentOp(
            f"low_rank, r = 8, N = {N:,}, B = {B}", 2, 19 * 4 * B * N, 4 * B * N * 8, instructions=instructions
        )
    for k, around, step in ((3, 311, 193), (9, 376, 360)):
        images, values = 512 * 64, 512 * 64 * 32 * 32
        yield LatentOp(
            f"depthwise_conv, {k} x {k}, 64 channels of 32 x 32, B = 512", 1, 8 * values, 2 * k * k * values,
            instructions=4 * images * (around + k * step),
        )  # fmt: skip


def latent() -> str:
    """Latent operators, in microseconds."""

    def cells(op: LatentOp) -> Iterator[str]:
        issue = op.instructions / (4 * H100.sms * H100.clock)
        on_chip = max(op.products, issue) + IN_TURN * min(op.products, issue)
        parts = {
            "memory": op.memory / H100.memory / 0.9,
            "L2": op.l2 / H100.l2,
            "products": op.products,
            "issue": issue,
        }
        yield from (op.name, str(op.launches), f"{op.memory / 1e6:,.0f}", f"{op.flop / 1e9:.2g}")
        yield from (_us(part) if part else "" for part in parts.values())
        times = [max(op.memory / gpu.memory / 0.9, parts["L2"], on_chip) for gpu in (H100, H200)]
        yield " / ".join(_us(START * op.launches + time) for time in times)
        of_units = sorted({"products": op.products, "issue": issue}.items(), key=lambda part: -part[1])
        held = {name: parts[name] for name in ("memory", "L2")}
        held |= {", ".join(name for name, part in of_units if part): on_chip}
        yield from (max(held, key=held.__getitem__), "not measured yet")

    head = "op, launches, MB, GFLOP, memory, L2, products, issue, prediction H100 / H200, held by, measured"
    return _table(head, map(cells, _latent_ops()))


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
