"""A device by its name or a module's own, and numbers of the host on a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_kind

__all__ = ["check_values", "has_values", "read_at_once", "tensor_of", "tensors_of", "uploaded", "usable_device"]


def usable_device(name: str | torch.device) -> torch.device:
    """The device; ValueError where this machine cannot put a tensor on it."""
    check_kind("device", name, (str, torch.device))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {str(name)!r} cannot be used: {error}") from error
    if device.type == "meta":
        raise ValueError(f"device {str(name)!r} cannot be used: it holds no numbers")
    return device


def uploaded(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``values``, numbers of the host, on a device; a GPU is not waited for, as ``torch.tensor`` does."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def has_values(tensor: Tensor) -> bool:
    """Whether it holds numbers: not on the meta device, and no fake tensor of torch's FakeTensorMode."""
    return not tensor.is_meta and not hasattr(tensor, "fake_mode")


def check_values(name: str, *tensors: Tensor) -> None:
    """ValueError where one of the argument's tensors holds no numbers."""
    if not all(map(has_values, tensors)):
        raise ValueError(f"{name} is on the meta device, or fake: it holds no numbers")


def read_at_once(tensor: Tensor) -> bool:
    """Whether the host reads this tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """What a module computes with, parameters first; in nn.DataParallel's replicas these are plain attributes."""
    plain = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return chain(module.parameters(), plain, module.buffers())


def tensor_of(module: nn.Module) -> Tensor | None:
    """One of the tensors that a module computes with, for their dtype and device."""
    return next(tensors_of(module), None)
