"""A training's state in one file: written whole or not at all, read without running code, checked before use."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Container, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linfast.io import written_whole
from linfast.sampling.stream import digest

__all__ = ["check_about", "check_kept", "check_same_model", "read_checkpoint", "write_checkpoint"]

_FORMAT = "linfast-training-2"


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a state: tensors, numbers, strings and containers of them.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"format": _FORMAT, **state}
    with written_whole(path) as partial:
        try:
            with open(partial, "wb") as file:
                torch.save({**state, "digest": digest(state)}, file)
        except RuntimeError as error:  # torch's own, in place of or after the system's
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(f"{path}: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, its tensors on the CPU (``weights_only``: no code in the file is run).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not hold what ``write_checkpoint`` wrote.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        state: Any = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        is_whole = isinstance(state, dict) and state.pop("digest", None) == digest(state)
    except PermissionError:
        raise
    except Exception as error:  # torch and pickle raise all kinds of errors for damaged files
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from error
    if not is_whole or state.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint, or a damaged one (it does not hold what was written to it)")
    return state


def check_same_model(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """ValueError unless two state_dicts have the same names, shapes and dtypes."""
    for name in {**own, **saved}:
        had, has = (_described(state, name) for state in (saved, own))
        if had != has:
            raise ValueError(f"it is of another model (it has {had} for {name}; this one has {has})")


def _described(state: Mapping[str, Any], name: str) -> str:
    value = state.get(name)
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def check_about(about: Mapping[str, Any], settings: Container[str]) -> dict[str, Any]:
    """What a checkpoint says of a run besides its settings, with numpy's numbers as Python's own.

    Raises:
        TypeError: a name or a value of another type.
        ValueError: a number that is not finite or too large, or the name of a setting.
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
    """ValueError unless a checkpoint can hold all of a model's state and give it back."""
    for name, value in state.items():
        file = io.BytesIO()
        try:
            torch.save(value.clone() if isinstance(value, Tensor) else value, file)  # not all of its storage
            file.seek(0)
            kept = digest(torch.load(file, map_location="cpu", weights_only=True)) == digest(value)
        except Exception:  # as in read_checkpoint
            kept = False
        if not kept:
            kind = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else "no tensor"
            what = f"{name}, a {type(value).__name__} ({kind})"
            raise ValueError(f"objective has a model that no checkpoint can hold: {what}")
