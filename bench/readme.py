"""``python -m linfast.bench.readme``: write the README's figures from bench/results/.

Every ``<!-- bench:NAME -->`` ... ``<!-- /bench -->`` in README.md gets the short table of
bench/results/NAME.jsonl, and links to its plots, which are drawn into docs/bench/NAME/. With
``--check`` nothing is written, and the exit status is 1 where the README would change.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from .environment import Environment
from .harness import Result
from .plots import draw
from .report import parse, short_table

__all__ = ["main", "rewritten"]

_BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w.-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or check, the README in the current folder."""
    parser = argparse.ArgumentParser(prog="python -m linfast.bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where something would change")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: here)")
    args = parser.parse_args(argv)
    readme = args.root / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = rewritten(before, args.root)
    if args.check:
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    for match in _BLOCK.finditer(before):
        folder = args.root / "docs/bench" / match["name"]
        folder.mkdir(parents=True, exist_ok=True)
        parsed = _results(args.root, match["name"])
        draw([result for result, _ in parsed], parsed[-1][1], folder)
    return 0


def rewritten(readme: str, root: Path) -> str:
    """The README's text with every block rewritten and everything outside the blocks unchanged."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        names = ("throughput", "roofline", "memory")
        plots = "\n".join(f"![{plot}](docs/bench/{name}/{plot}.png)" for plot in names)
        return f"{match[1]}```\n{short_table(_results(root, name))}\n```\n\n{plots}\n{match[3]}"

    return _BLOCK.sub(block, readme)


def _results(root: Path, name: str) -> list[tuple[Result, Environment]]:
    return parse((root / "bench/results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    raise SystemExit(main())
