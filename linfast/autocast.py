"""What is computed outside autocast, which rounds the operands of a product: right for activations alone.

Weights derived from weights (inverses, factors, decompositions): W and a separately rounded W^{-1} are no
longer inverses, and torch.linalg has no half-precision routines. And what an op does inside, forward and
backward: its public function has read autocast, and a backward's bits must not depend on where it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .device import tensor_of

__all__ = ["autocast_dtype", "cat", "outside_autocast", "without_autocast"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast rounds to on devices of this type; None where it is off, or there is none, as on "meta"."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(device: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` with autocast off on devices of this type."""
    if autocast_dtype(device) is None:
        return function(*args, **kwargs)
    with torch.autocast(device, enabled=False):
        return function(*args, **kwargs)


def cat(tensors: tuple[Tensor, ...] | list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat, which under autocast refuses a half type that is not autocast's."""
    if tensors[0].dtype in (torch.float16, torch.bfloat16):
        return without_autocast(tensors[0].device.type, torch.cat, tensors, dim)
    return torch.cat(tensors, dim)


def outside_autocast(method: _Method) -> _Method:
    """Decorator of a module's method: autocast is off on the module's device while it runs."""

    @functools.wraps(method)
    def run(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensor = tensor_of(self)
        if tensor is None:
            return method(self, *args, **kwargs)
        return without_autocast(tensor.device.type, method, self, *args, **kwargs)

    return run  # type: ignore[return-value]
