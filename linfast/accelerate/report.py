"""What accelerate did to each module, as data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from ..tables import aligned


@dataclass(frozen=True)
class Row:
    """One module.

    Args:
        path: its name in the model; "" is the model itself.
        was: library and class.
        runs: what runs now, or None where the module was left alone.
        note: why it was left alone, or a remark on what runs.
        conditioner: of a coupling whose conditioner is a recognised MLP: such as "MLP 32-128-128-64 relu".
        error: largest relative L2 difference from the original in the check; None where it was left alone.
        takes_precision: whether it has matrix products that run in the requested precision.
    """

    path: str
    was: str
    runs: str | None
    note: str = ""
    conditioner: str = ""
    error: float | None = None
    takes_precision: bool = False

    @property
    def swapped(self) -> bool:
        return self.runs is not None


@dataclass(frozen=True)
class Report:
    """What one call of ``accelerate`` did.

    Args:
        rows: the modules of known classes, in the model's order.
        precision: the requested precision.
        unknown: (library and class, count), such as ("normflows Planar", 8), of the learned layers of known
            libraries for which linfast has no formula, in the model's order. They run as before. Permutations,
            linear maps and simple functions of each value do not count, nor do modules inside another layer and
            classes that the library does not define.
        own: whether the model has flows or Linearizers of linfast, which run on its ops without ``accelerate``.
    """

    rows: tuple[Row, ...]
    precision: str | None = None
    unknown: tuple[tuple[str, int], ...] = ()
    own: bool = False

    @property
    def swapped(self) -> tuple[Row, ...]:
        """The modules that run on linfast's ops now."""
        return tuple(row for row in self.rows if row.swapped)

    @property
    def left(self) -> tuple[Row, ...]:
        """The recognised modules that were left alone."""
        return tuple(row for row in self.rows if not row.swapped)

    def __str__(self) -> str:
        if not self.rows and not self.unknown:
            if self.own:
                return "accelerate: nothing to do: linfast's own modules run on its ops without it"
            none = "no module of a known library was found, other than simple maps"
            return f"accelerate: {none}; lf.register_adapter adds a class of yours"
        lines = []
        if self.rows:
            table = [("module", "was", "runs", "why not, or notes"), *_grouped(self.rows)]
            swapped = f"{len(self.swapped)} of {len(self.rows)} recognised modules swapped"
            lines += [aligned(table, rule=True), swapped]
        if self.rows and self.precision is not None:
            reached = sum(row.takes_precision for row in self.swapped)
            rest = "the products of the others, if any, follow torch's own settings"
            lines.append(f"precision {self.precision!r} reaches {reached} of them; {rest}")
        if self.unknown:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.unknown)
            lines.append(f"left alone, because linfast has no formula for them: {kinds}")
        return "\n".join(lines)


def _grouped(rows: tuple[Row, ...]) -> list[tuple[str, str, str, str]]:
    """One line for all modules whose rows differ only in the path."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        runs = ", ".join(part for part in (row.runs or "as before", row.conditioner) if part)
        groups.setdefault((row.was, runs, row.note), []).append(row.path or "(model)")
    return [
        (paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more", *what)
        for what, paths in groups.items()
    ]
