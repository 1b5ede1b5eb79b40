"""A device by its name, checked before any work; and numbers of the host on a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_kind

__all__ = ["uploaded", "usable_device"]


def usable_device(name: str | torch.device) -> torch.device:
    """The device; ValueError where this machine cannot put a tensor on it."""
    check_kind("device", name, (str, torch.device))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from error
    return device


def uploaded(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``values``, numbers of the host, on a device; a GPU is not waited for, as ``torch.tensor`` does."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
