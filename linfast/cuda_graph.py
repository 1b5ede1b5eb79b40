"""A function captured in a CUDA graph, together with the memory that the graph reads.

A graph reads memory by address, even after the memory was freed. ``CudaGraph`` therefore owns its inputs and
outputs, and holds the function and the model's tensors. It uses no weights that ``freeze`` or autocast have cached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .dispatch import tensors_of
from .freeze import Frozen, thawed

_WARM_UP = 3  # calls before a capture, so that it records no lazy initialisation or autotuning
_one_capture = threading.RLock()  # captures share the device's random generator


class CudaGraph:
    """``work(*given)``, captured once and replayed on the current stream; only one thread may call it at a time.

    Args:
        work: the function. It is called before and during the capture, never by a replay: later changes of host
            values that it reads have no effect.
        given: example tensors, which are copied.
        device: a CUDA device.
        model: a model that ``work`` runs, frozen while the graph is in use: its derived weights are computed once.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        given: Sequence[Tensor],
        device: torch.device,
        model: nn.Module | None = None,
    ) -> None:
        self._work, self._device = work, device
        self._frozen = None if model is None else Frozen(model)
        read = () if model is None else tensors_of(model)
        self._read = [tensor.detach() for tensor in read]
        self._replayed = torch.cuda.Event()
        with _one_capture, torch.cuda.device(device), _without_caches(self._frozen):
            self._given = [tensor.detach().clone() for tensor in given]
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    work(*self._given)
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads may go on using CUDA during the capture.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                result = work(*self._given)
        self.replay: Callable[[], None] = graph.replay
        """Replays the graph on the tensors of the last call."""
        self.result: Any = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
        """The result of the last replay, which the next replay overwrites."""

    def __call__(self, *given: Tensor) -> Any:
        """``work(*given)`` for tensors of the examples' shapes. No later replay overwrites these results."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._replayed)  # a call on another stream may still use the same memory
        with torch.no_grad():
            for static, tensor in zip(self._given, given, strict=True):
                static.copy_(tensor)
            self.replay()
            result = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.result)
        self._replayed.record(stream)
        return result


@contextmanager
def _without_caches(frozen: Frozen | None) -> Iterator[None]:
    """Inside the block, no weight is read that ``freeze`` or autocast has cached before and may free."""
    grad, casts_kept = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    # Later calls could not write to tensors that were made in inference mode.
    with torch.inference_mode(False), torch.set_grad_enabled(grad), thawed(), frozen or nullcontext():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(casts_kept)
