"""Ranges of settings: a check for each field, by name; the first field that is out of range is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..checks import check_choice, check_count, check_number

__all__ = ["LARGEST", "check_fields", "one_of", "real", "whole"]

Check = Callable[[str, Any], Any]
"""(name, value) -> the value, as Python's own number where it is numpy's; TypeError or ValueError."""

# Larger numbers are mistakes, not models: couplings, widths of layers, pixels a side, rows a step, steps.
LARGEST = {"depth": 1000, "width": 65_536, "side": 4096, "rows": 2**20, "steps": 10**9, "seed": 2**63 - 1}


def whole(low: int, high: int, optional: bool = False) -> Check:
    """A whole number from low to high; or None, where it is optional."""
    return lambda name, value: value if optional and value is None else check_count(name, value, low, high)


def real(high: float = math.inf, *, above: bool = False, below: bool = False) -> Check:
    """A finite number from 0 to high; ``above`` and ``below``: not 0, not high itself."""
    options: dict[str, Any] = {"above": above, "below": below} | ({} if high == math.inf else {"most": high})
    return lambda name, value: check_number(name, value, 0.0, **options)


def one_of(*choices: str, optional: bool = False) -> Check:
    """One of these; or None, where it is optional."""

    def check(name: str, value: Any) -> Any:
        if value is not None or not optional:
            check_choice(name, value, choices)
        return value

    return check


def check_fields(settings: object, checks: Mapping[str, Check]) -> None:
    """Check the attributes of these names, and keep them as the checks return them.

    Raises:
        TypeError, ValueError: the first that is out of range, by its name.
    """
    for name, check in checks.items():
        object.__setattr__(settings, name, check(name, getattr(settings, name)))  # the classes are frozen
