"""Rows of text as a table in aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], numeric: int | None = None, rule: bool = False) -> str:
    """The rows, the first of which holds the headings, in columns of equal width.

    Args:
        numeric: from this column on, columns with a heading are right-aligned; None: no column is.
        rule: whether to draw dashes below the headings.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [numeric is not None and j >= numeric and bool(heading) for j, heading in enumerate(rows[0])]
    columns = zip(right, widths, strict=True)
    form = "  ".join(f"{{:{'>' if to_right else '<'}{width}}}" for to_right, width in columns)
    lines = [form.format(*row).rstrip() for row in rows]
    if rule:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
