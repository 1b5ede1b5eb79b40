"""``python -m linfast.bench.measurements``: write the tables and plots of docs/measurements.md from bench/results/.

Every ``<!-- bench:NAME -->`` ... ``<!-- /bench -->`` in docs/measurements.md gets the short table of
bench/results/NAME.jsonl, and links to its plots, which are drawn into docs/bench/NAME/. The picture of README.md,
docs/bench/gains.png, is drawn from bench/results/gains.tsv. With ``--check`` nothing is written, and the exit
status is 1 where the page would change.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path

from .plots import NAMES, Gain, draw, draw_gains
from .report import parse, short_table

_BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w.-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or check, docs/measurements.md of a checkout, and draw the pictures."""
    parser = argparse.ArgumentParser(prog="python -m linfast.bench.measurements", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where something would change")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: here)")
    args = parser.parse_args(argv)
    page, folder = args.root / "docs/measurements.md", args.root / "bench/results"
    before = page.read_text(encoding="utf-8")
    names = [match["name"] for match in _BLOCK.finditer(before)]
    lines = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in names}
    results = {name: parse(text.splitlines()) for name, text in lines.items()}

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        plots = (f"![{plot}](bench/{name}/{plot}.png)" for plot in NAMES)
        return "\n".join([f"{match[1]}```text", short_table(results[name]), "```", "", *plots, match[3]])

    after = _BLOCK.sub(block, before)
    if args.check:
        return int(after != before)
    page.write_text(after, encoding="utf-8")
    for name, parsed in results.items():
        plots = args.root / "docs/bench" / name
        plots.mkdir(parents=True, exist_ok=True)
        draw([result for result, _ in parsed], parsed[-1][1], plots)
    if (folder / "gains.tsv").exists():
        draw_gains(gains(folder / "gains.tsv"), args.root / "docs/bench/gains.png")
    return 0


def gains(path: Path) -> list[Gain]:
    """The rows of gains.tsv."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Gain(**row) for row in csv.DictReader(file, delimiter="\t")]


if __name__ == "__main__":
    raise SystemExit(main())
