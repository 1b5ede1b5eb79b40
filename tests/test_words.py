"""The texts use the field's standard terms, such as "per sample", and no shorthand that readers must guess."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("linfast", "kernels", "bench", "examples", "docs", "tests")

_THINGS = (
    "byte|channel|element|frame|instruction|kernel|launch|mask|number|operation|operator|position|product|register|"
    "row|sample|scale|shift|sum|value"
)
_UNITS = (
    "call|channel|clock|column|core|coupling|cycle|element|feature|file|group|launch|layer|model|number|op|pixel|"
    "position|process|program|row|sample|step|thread|tile|value"
)
SHORTHAND = {  # by what to write instead
    "values per row": rf"\b(?:{_THINGS})(?:e?s)?\s+an?\s+(?:{_UNITS})\b",
    "one per sample": r"\bone\s+an?\s+(?:call|layer|op|row|sample|thread)\b",
    "once per call": r"\b(?:once|twice)\s+an?\s+(?:call|coupling|layer|row|sample|step|tile)\b",
    "8 per thread": rf"\b\d[\d,]*\s+an?\s+(?:{_UNITS})\b",
    "one file per op": r"\b(?:case|file|test)\s+an?\s+(?:file|library|op)\b",
    "as many rows as fit the cache": r"\bso\s+many\s+(?:\w+\s+)?at\s+a\s+time\b",
    "is not one": r"(?<!there )\b(?:is|are)\s+none\b",
    "frozen": r"\b(?:promised|held)\s+still\b",
}


def texts() -> Iterator[tuple[Path, str]]:
    """Every page and module but this one; links are not followed."""
    yield ROOT / "README.md", (ROOT / "README.md").read_text()
    for folder in FOLDERS:
        for where, _, names in os.walk(ROOT / folder):
            for path in (Path(where, name) for name in names if name.endswith((".py", ".md", ".sh"))):
                if path != Path(__file__):
                    yield path, path.read_text()


@pytest.mark.parametrize("term", SHORTHAND)
def test_no_shorthand(term: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()!r}"
        for path, text in texts()
        for match in re.finditer(SHORTHAND[term], text)
    ]
    assert not found, f"write as in {term!r}:\n" + "\n".join(found)
