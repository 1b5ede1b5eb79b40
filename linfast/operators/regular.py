"""Whether an operator is finite, or has an inverse: read on the host, from a device once for each state of weights.

Reading it there waits for the device and cannot be captured into a CUDA graph, so that later inverses go unread.
Where there is none, they are NaN: a singular operator is seen in any case. An inverse of a time-dependent
operator is read for each time that is a number, and for times in tensors once. Captured, compiled or
without values, as on the meta device, it is not read.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..dispatch import capturing, has_values, read_at_once

__all__ = ["check_finite", "is_unread", "mark_read"]

_MOST = 1024  # times that are remembered of one operator

# Of each operator the state of its weights, and for which times it was read.
_read: WeakKeyDictionary[nn.Module, tuple[Hashable, set[Hashable]]] = WeakKeyDictionary()


def is_unread(operator: nn.Module, at: Hashable) -> bool:
    """Whether the host has to read if this operator, with its weights as they are, has an inverse ``at`` a time."""
    if torch.compiler.is_compiling() or any(capturing(t) or not has_values(t) for t in _tensors(operator)):
        return False
    if all(read_at_once(tensor) for tensor in _tensors(operator)):
        return True
    state, seen = _read.get(operator, (None, ()))
    return state is None or at not in seen or state != _state(operator)


def mark_read(operator: nn.Module, at: Hashable) -> None:
    """It has one."""
    state = _state(operator)
    if state is None:
        return
    known, seen = _read.get(operator, (None, set()))
    if known != state or len(seen) >= _MOST:
        seen = set()
    _read[operator] = state, {*seen, at}


def check_finite(operator: nn.Module) -> None:
    """ValueError where it has NaN or infinite values, which not every decomposition would show."""
    if not is_unread(operator, "finite") or _state(operator) is None:
        return
    if not all(bool(tensor.isfinite().all()) for tensor in _tensors(operator)):
        raise ValueError(f"{type(operator).__name__} has NaN or infinite values: they have no decomposition")
    mark_read(operator, "finite")


def _state(operator: nn.Module) -> Hashable:
    """What changes with the weights, but for writes through ``.data`` and by fused optimisers; None: unknown."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # a transform's tensors have no memory
        return None
    return tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in _tensors(operator))


def _tensors(operator: nn.Module) -> chain[Tensor]:
    return chain(operator.parameters(), operator.buffers())
