"""A time that is one known number for the whole batch: what depends on it alone is derived from the weights.

The number travels on the tensor itself, through code of others that only passes it on: what was computed
with t = 1 can then be kept under 1 inside ``linfast.freeze``, and no device is asked what t holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["constant_time", "first_of", "value_of"]

_VALUE = "_linfast_value"


def constant_time(value: float, x: Tensor) -> Tensor:
    """t [B] for x [B, ...], one number expanded."""
    return _marked(torch.full((1,), value, device=x.device).expand(x.shape[0]), value)


def first_of(t: Tensor) -> Tensor:
    """[1], of a t [B] that is one number expanded; any other t as it is."""
    if t.ndim != 1 or t.shape[0] < 2 or t.stride(0) != 0:
        return t
    return _marked(t[:1], value_of(t))


def value_of(t: Tensor) -> float | None:
    """The number that t holds, where it was made by ``constant_time``."""
    return getattr(t, _VALUE, None)


def _marked(t: Tensor, value: float | None) -> Tensor:
    if value is not None and not torch.compiler.is_compiling():
        setattr(t, _VALUE, value)
    return t
