"""Weights derived from weights (inverses, factors, decompositions) are computed outside autocast.

Autocast rounds the operands of a product: right for activations, but W and a separately
rounded W^{-1} are no longer inverses, and torch.linalg has no half-precision routines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch

__all__ = ["outside_autocast"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def outside_autocast(method: _Method) -> _Method:
    """Decorator of a module's method: autocast is off on the module's device while it runs."""

    @functools.wraps(method)
    def run(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensor = next(chain(self.parameters(), self.buffers()), None)
        if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
            return method(self, *args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]
