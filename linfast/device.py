"""A device by its name, checked before any work."""

from __future__ import annotations

import torch

__all__ = ["usable_device"]


def usable_device(name: str) -> torch.device:
    """The device; ValueError where this machine cannot put a tensor on it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from error
    return device
