"""``python -m tests.static.roofline``: the tables of docs/roofline.md; ``--write`` puts them there.

Stacks of couplings are predicted by tests/static/model.py, other tables are those of tests/static/roofline_ops.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator

from tests.static.flagship import MODES
from tests.static.layers import Row, kept
from tests.static.model import FLAGSHIP, H100, START, Gpu, Prediction, at_a_time, eager
from tests.static.roofline_ops import backward, latent, layers
from tests.static.roofline_text import NOT_YET, ROOT, measured, ms, or_not_yet, table

PAGE = ROOT / "docs" / "roofline.md"


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


def _flagship(mode: str, provider: str = "linfast frozen", **size: int) -> float | None:
    """As ``measured``, of the flagship Linearizer: frozen, since a prediction is for one launch."""
    sizes = {"D": 64, "depth": 8, "hidden": 128, "batch": FLAGSHIP} | size
    return measured("linearizer", provider, direction="forward", precision=mode, **sizes)


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
    return table(head, map(cells, MODES))


def flagship() -> str:
    """Floor and prediction per mode, in milliseconds, beside estimates of plain torch."""

    def cells(mode: str) -> Iterator[str]:
        here, old = predicted(mode), predicted(mode, triton="3.6.0")
        yield from (mode, ms(here.floor), f"**{ms(here.time)}**", ms(old.time), here.held_by)
        for plain in (eager(mode, H100), eager(mode, H100, fused=True)):
            yield f"{ms(plain)} ({plain / here.time:.1f} times)"
        ours, theirs = _flagship(mode), _flagship(mode, "eager")
        beside = f", eager {ms(theirs)} ({theirs / ours:.1f} times)" if ours and theirs else ""
        yield or_not_yet(ours) + beside

    head = "mode, floor, prediction, under Triton 3.6, held by, eager, torch.compile, measured"
    return table(head, map(cells, MODES))


def bounds() -> str:
    """The time of each unit per mode, in milliseconds."""
    units = ("memory", "L2", "matrix", "shared", "MUFU", "issue")

    def cells(mode: str) -> Iterator[str]:
        here = predicted(mode)
        yield from (mode, *(ms(here.bounds[unit]) for unit in units), ms(here.waiting))

    return table(f"mode, {', '.join(units)}, waiting", map(cells, MODES))


def batches() -> str:
    """Predictions by batch, in milliseconds."""

    def cells(batch: int) -> Iterator[str]:
        yield f"{batch:,}"
        yield from (ms(predicted(mode, batch).time) for mode in MODES)
        found = [_flagship(mode, batch=batch) for mode in MODES]
        yield " / ".join("-" if time is None else ms(time) for time in found) if any(found) else NOT_YET

    sizes = (1, 64, 256, 1024, 4096, 1 << 14, 1 << 17, 1 << 20, 1 << 22)
    return table(f"B, {', '.join(MODES)}, measured", map(cells, sizes))


def large() -> str:
    """D = 128, H = 256: a whole Linearizer in one launch, or, where that takes less, each of its stacks and A."""

    def cells(mode: str) -> Iterator[str]:
        alone = mode == "fast"
        row = chosen(f"{'linearizer' if alone else 'stack'} {mode} D=128")
        here = Prediction(row, H100, FLAGSHIP, bytes_per_row=1024 if alone else 2048)
        time = here.time + (0 if alone else 2 * START + FLAGSHIP * 1024 / H100.memory / 0.9)
        yield from (mode, "1" if alone else "3", row["rows"], row["instructions"], row["spills"])
        yield from (ms(here.bounds[k]) for k in ("memory", "L2", "matrix", "shared", "issue"))
        yield from (ms(here.waiting), ms(here.floor), f"**{ms(time)}**", here.held_by)
        yield ms(eager(mode, H100, fused=True, D=128, H=256))
        yield or_not_yet(_flagship(mode, D=128, hidden=256))

    head = (
        "mode, launches, rows, instructions, spills, memory, L2, matrix, shared, issue, waiting, floor, "
        "prediction, held by, library, measured"
    )
    return table(head, map(cells, ("fast", "tf32")))


TABLES: dict[str, Callable[[], str]] = {
    "counts": counts, "flagship": flagship, "bounds": bounds, "backward": backward, "batches": batches,
    "large": large, "layers": layers, "latent": latent,
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
    for name, made in TABLES.items():
        print(f"{name}\n{made()}\n")


if __name__ == "__main__":
    main()
