"""``python -m linfast.bench.readme``: write the benchmark tables and plots of README.md from bench/results/.

Every ``<!-- bench:NAME -->`` ... ``<!-- /bench -->`` in README.md gets the short table of
bench/results/NAME.jsonl, and links to its plots, which are drawn into docs/bench/NAME/. With
``--check`` nothing is written, and the exit status is 1 where the README would change.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from .plots import NAMES, draw
from .report import parse, short_table

_BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w.-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or check, the README in the current folder."""
    parser = argparse.ArgumentParser(prog="python -m linfast.bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where something would change")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: here)")
    args = parser.parse_args(argv)
    readme = args.root / "README.md"
    before = readme.read_text(encoding="utf-8")
    names = [match["name"] for match in _BLOCK.finditer(before)]
    lines = {name: (args.root / "bench/results" / f"{name}.jsonl").read_text(encoding="utf-8") for name in names}
    results = {name: parse(text.splitlines()) for name, text in lines.items()}

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        plots = (f"![{plot}](docs/bench/{name}/{plot}.png)" for plot in NAMES)
        return "\n".join([f"{match[1]}```", short_table(results[name]), "```", "", *plots, match[3]])

    after = _BLOCK.sub(block, before)
    if args.check:
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    for name, parsed in results.items():
        folder = args.root / "docs/bench" / name
        folder.mkdir(parents=True, exist_ok=True)
        draw([result for result, _ in parsed], parsed[-1][1], folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
