"""Settings: frozen dataclasses whose fields hold their default, their description and the range of their values.

The command line is made from them, so that an option is described in one place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

from linfast.checks import check_choice, check_count, check_number

__all__ = ["DEPTH", "SIDE", "WIDTH", "Settings", "add_options", "choice", "picked", "real", "setting", "whole"]

DEPTH, WIDTH, SIDE = 1000, 65_536, 4096  # larger numbers of couplings, units and pixels are mistakes, not models

Check = Callable[[str, Any], Any]
"""(name, value) -> the value, NumPy's numbers converted to Python's; raises TypeError or ValueError."""


def whole(low: int, high: int) -> Check:
    """A whole number from low to high."""
    return lambda name, value: check_count(name, value, low, high)


def real(high: float = sys.float_info.max, *, above: bool = False, below: bool = False) -> Check:
    """A finite number from 0 to high; ``above`` excludes 0, ``below`` excludes high."""
    return lambda name, value: check_number(name, value, 0.0, high, above, below)


def setting(default: Any, text: str, check: Check | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of a ``Settings`` class. With ``MISSING`` as default it is required, with None it may be None."""
    return field(default=default, metadata={"text": text, "check": check, "choices": choices})


def choice(default: str | None, text: str, *choices: str) -> Any:
    """A ``setting`` that is one of these strings."""
    return setting(default, text, lambda name, value: check_choice(name, value, choices), choices)


class Settings:
    """The base of frozen dataclasses of ``setting`` fields.

    Raises:
        TypeError, ValueError: a value is out of its range; the message names the first.
    """

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            value, check = getattr(self, one.name), one.metadata["check"]
            if check is not None and (value is not None or one.default is not None):
                object.__setattr__(self, one.name, check(one.name, value))


_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}


def add_options(parser: argparse.ArgumentParser, cls: Any, **defaults: Any) -> None:
    """Add an option for each field of a ``Settings`` class; ``defaults`` replace the class's own."""
    for one in fields(cls):
        option, text = f"--{one.name.replace('_', '-')}", one.metadata["text"]
        if one.type == "bool":
            parser.add_argument(option, action="store_true", help=text)
            continue
        default, kind = defaults.get(one.name, one.default), _TYPES[str(one.type).partition(" ")[0]]
        text = text if default is None else f"{text} (default: %(default)s)"
        parser.add_argument(option, type=kind, default=default, choices=one.metadata["choices"] or None, help=text)


def picked(cls: Any, options: argparse.Namespace) -> Any:
    """An instance of a dataclass from the options that have its fields' names."""
    return cls(**{one.name: getattr(options, one.name) for one in fields(cls) if hasattr(options, one.name)})
