"""A training's state in one file, written whole or not at all, read without running code, checked before use."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io import written_whole
from ..sampling.fingerprint import digest

__all__ = [
    "check_moments",
    "check_progress",
    "check_settings",
    "check_tensors",
    "check_unchanged",
    "read_checkpoint",
    "write_checkpoint",
]

_FORMAT = "linfast-training-1"
_KEYS = ("settings", "step", "model", "optimizer", "averaged", "terms", "losses")
_DIGEST = "digest"  # of what is under these keys
_MOMENTS = ("exp_avg", "exp_avg_sq")


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a training's state: tensors, numbers, strings and containers of them.

    Raises:
        OSError: it cannot be written; by its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        try:
            with open(partial, "wb") as file:
                torch.save({"format": _FORMAT, **state, _DIGEST: _digest(state)}, file)
        except RuntimeError as error:  # torch's own, in place of or after the system's
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(f"{path}: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, its tensors on the CPU (weights_only: no code of the file's is run).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a linfast checkpoint, or a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch and pickle raise what they like at damaged files
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path}: not a checkpoint, or a damaged one (its part {damaged} has changed)")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint of format {_FORMAT!r}")
    if missing := [key for key in (*_KEYS, _DIGEST) if key not in state]:
        raise ValueError(f"{path}: not a whole checkpoint, it lacks {', '.join(missing)}")
    return state


def check_unchanged(state: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint holds what was written: what other checks let pass can be wrong too."""
    try:
        unchanged = _digest(state) == state[_DIGEST]
    except TypeError as error:
        raise ValueError(f"damaged: {error}") from error
    if not unchanged:
        raise ValueError("damaged: it does not hold what was written to it")


def _digest(state: Mapping[str, Any]) -> str:
    return digest([state[key] for key in _KEYS])


def check_settings(saved: Any, wanted: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint's settings are these."""
    if not isinstance(saved, dict) or saved.keys() != wanted.keys():
        raise ValueError(f"its settings must be {', '.join(wanted)}; got {_named(saved)}")
    for name, value in saved.items():
        if not isinstance(value, (bool, int, float, str, type(None))) or wanted[name] != value:
            raise ValueError(f"its training had {name}={value!r:.60}; got {wanted[name]!r}")


def check_progress(state: Mapping[str, Any], steps: int, last_term: str) -> None:
    """Raise unless the step, the terms and their losses are what a training can have written."""
    step, terms, losses = state["step"], state["terms"], state["losses"]
    if type(step) is not int or not 1 <= step <= steps:
        raise ValueError(f"its step must be from 1 to {steps}; got {step!r:.60}")
    named = isinstance(terms, list) and all(isinstance(term, str) for term in terms)
    if not named or len(set(terms)) < len(terms) or terms[-1:] != [last_term]:
        raise ValueError(f"its terms must be different names, {last_term!r} the last; got {terms!r:.60}")
    _check_tensor("losses", losses, torch.empty(step, len(terms), dtype=torch.float64, device="meta"))
    _check_finite("losses", losses)
    if bool((losses[:, -1] < 0).any()):
        raise ValueError("its losses have a negative gradient norm")


def check_tensors(what: str, saved: Any, like: Mapping[str, Any]) -> None:
    """Raise unless a state_dict has the names, shapes and dtypes of this one, and numbers where it has them."""
    if not isinstance(saved, dict) or saved.keys() != like.keys():
        raise ValueError(f"of another model ({what} must hold {_named(like)}; got {_named(saved)})")
    for name, value in like.items():
        if isinstance(value, Tensor):
            _check_tensor(f"{what} {name}", saved[name], value)
            if value.is_floating_point() and bool(value.isfinite().all()):
                _check_finite(f"{what} {name}", saved[name])


def check_moments(saved: Any, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """The state_dict of an Adam whose moments are those of a checkpoint written at this step."""
    own = optimizer.state_dict()
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    entries = saved.get("state") if isinstance(saved, dict) else None
    if (
        not isinstance(entries, dict)
        or not isinstance(groups, list)
        or _numbers(groups) != _numbers(own["param_groups"])
    ):
        raise ValueError("its optimizer is of another model")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not entries and any(parameter.requires_grad for parameter in parameters):
        raise ValueError("its optimizer has taken no steps")
    for index, entry in entries.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"its optimizer has a parameter {index!r:.60} of {len(parameters)}")
        if not isinstance(entry, dict) or entry.keys() != {"step", *_MOMENTS}:
            raise ValueError(
                f"its optimizer must hold step, {', '.join(_MOMENTS)} of a parameter; got {_named(entry)}"
            )
        for name in _MOMENTS:
            _check_tensor(f"{name} of parameter {index}", entry[name], parameters[index])
            _check_finite(f"{name} of parameter {index}", entry[name])
        taken = entry["step"]
        if not isinstance(taken, Tensor) or taken.ndim or taken.is_meta or not 1 <= float(taken) <= step:
            raise ValueError(f"its optimizer must have taken 1 to {step} steps; got {taken!r:.60}")
        squares = entry["exp_avg_sq"]
        if bool(((torch.view_as_real(squares) if squares.is_complex() else squares) < 0).any()):
            raise ValueError(f"its optimizer has a negative exp_avg_sq of parameter {index}")
    return {"state": entries, "param_groups": own["param_groups"]}


def _numbers(groups: list[Any]) -> str:
    return repr([group.get("params") if isinstance(group, dict) else None for group in groups])


def _named(value: Any) -> str:
    return ", ".join(map(str, value))[:200] if isinstance(value, Mapping) else type(value).__name__


def _check_tensor(name: str, value: Any, like: Tensor) -> None:
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    if not plain or value.shape != like.shape or value.dtype != like.dtype:
        where = " without values" if isinstance(value, Tensor) and value.is_meta else ""
        got = f"{tuple(value.shape)} {value.dtype}{where}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"of another model ({name} must be {tuple(like.shape)} {like.dtype}; got {got})")


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise ValueError(f"its {name} has NaN or infinite values")
