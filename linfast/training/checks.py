"""Ranges of settings: what a field may be, and an error that names it where it is something else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["LARGEST", "Check", "check_fields", "one_of", "real", "whole"]

# Larger numbers are mistakes, not models: couplings, widths of layers, pixels a side, rows a step, steps.
LARGEST = {"depth": 1000, "width": 65_536, "side": 4096, "rows": 2**20, "steps": 10**9, "seed": 2**63 - 1}


class Check(NamedTuple):
    """A condition on a value, and its words after "must be"."""

    holds: Callable[[Any], bool]
    words: str


def whole(low: int, high: int, optional: bool = False) -> Check:
    """A whole number from low to high; or None, where it is optional."""

    def holds(value: Any) -> bool:
        return type(value) is int and low <= value <= high

    return Check(
        (lambda value: value is None or holds(value)) if optional else holds,
        f"at least {low} and at most {high}, a whole number",
    )


def real(high: float = math.inf, *, above: bool = False, below: bool = False) -> Check:
    """A finite number from 0 to high; ``above`` and ``below``: not 0, not high itself."""

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (value > 0 if above else value >= 0) and (value < high if below else value <= high)

    if high == math.inf:
        return Check(holds, f"{'positive' if above else 'at least 0'} and finite")
    return Check(holds, f"in {'(' if above else '['}0, {high:g}{')' if below else ']'}")


def one_of(*choices: Any) -> Check:
    """One of these."""
    return Check(lambda value: value in choices, f"one of {', '.join(map(repr, choices))}")


def check_fields(settings: object, checks: dict[str, Check]) -> None:
    """Check the attributes of these names.

    Raises:
        ValueError: the first that is out of range, by its name.
    """
    for name, check in checks.items():
        if not check.holds(value := getattr(settings, name)):
            raise ValueError(f"{name} must be {check.words}; got {value!r}")
