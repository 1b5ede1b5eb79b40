"""Ranges of settings: a check for each field, by name; the first field that is out of range is named."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Container, Mapping
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from .checkpoint import check_tensors

__all__ = ["LARGEST", "check_about", "check_fields", "check_kept", "one_of", "real", "whole"]

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


def check_about(about: Mapping[str, Any], settings: Container[str]) -> dict[str, Any]:
    """What a checkpoint says of a run besides these settings; numpy's numbers as Python's own.

    Raises:
        TypeError: a name or a value of another type.
        ValueError: a number that is not finite, or a setting's name.
    """
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in about.items()}
    for name, value in plain.items():
        if type(name) is not str or type(value) not in (bool, int, float, str, NoneType):
            raise TypeError(f"about must hold numbers, strings and None by name; got {name!r:.60}: {value!r:.60}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"about[{name!r}] must be finite; got {value}")
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError(f"about[{name!r}] is too large")
        if name in settings:
            raise ValueError(f"about must not hold {name!r}, which is one of settings")
    return plain


def check_kept(state: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint can hold all of a model's state, and can be read again."""
    for name, value in state.items():
        _check_kept(name, value)


def _check_kept(name: str, value: Any) -> None:
    file = io.BytesIO()
    try:
        torch.save({name: value.clone() if isinstance(value, Tensor) else value}, file)  # not all of its storage
        file.seek(0)
        check_tensors("", torch.load(file, map_location="cpu", weights_only=True), {name: value})
    except Exception as error:  # torch and pickle raise what they like
        kind = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else "no tensor"
        what = f"{name}, a {type(value).__name__} ({kind})"
        raise ValueError(f"objective has a model that no checkpoint can hold: {what}") from error
