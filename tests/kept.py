"""How much autograd keeps of a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["kept_bytes"]


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(run: Callable[[], Any]) -> int:
    """Bytes kept for the backward of what ``run`` returns, while that is there, parameters left out."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        held = _Kept(
            tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
        )  # an output would hold its node
        kept.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = run()
    tensors = [held.tensor for held in kept if not isinstance(held.tensor, nn.Parameter)]
    del result
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
