"""Measures how much memory autograd keeps for a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["kept_and_most", "kept_bytes"]


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(run: Callable[[], Any]) -> int:
    """Bytes kept for the backward of the result of ``run`` while the result is alive, without parameters."""
    return kept_and_most(run)[0]


def kept_and_most(run: Callable[[], Any]) -> tuple[int, int]:
    """The same, and the maximum during the call."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
    most = 0

    def size() -> int:
        tensors = [held.tensor for held in kept if not isinstance(held.tensor, nn.Parameter)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def pack(tensor: Tensor) -> _Kept:
        nonlocal most
        held = _Kept(
            tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
        )  # an output would hold its node
        kept.add(held)
        most = max(most, size())
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = run()
    left = size()
    del result
    return left, most
