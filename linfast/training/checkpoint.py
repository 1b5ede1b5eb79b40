"""A training's state in one file, written whole or not at all and read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..io import written_whole

__all__ = ["read_checkpoint", "write_checkpoint"]

_FORMAT = "linfast-training-1"


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a training's state: tensors, numbers, strings and containers of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        torch.save({"format": _FORMAT, **state}, partial)


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state in a checkpoint, its tensors on this device (weights_only: no code of the file's is run).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a linfast checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a checkpoint ({error})") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint of format {_FORMAT!r}")
    return state
