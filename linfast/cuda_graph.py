"""Work captured in a CUDA graph, with all that the graph reads.

A graph reads memory by its address, also after it was freed. ``CudaGraph`` therefore owns its inputs and outputs,
and keeps the work and the model's tensors. Weights that ``freeze`` or autocast keep are computed anew for it.
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

_WARM_UP = 3  # calls before a capture: lazy initialisation and autotuning do not belong in it
_one_capture = threading.RLock()  # captures share the device's random generator


class CudaGraph:
    """``work(*given)``, captured once and replayed on the current stream; one thread may call it at a time.

    Args:
        work: what is captured. It is called a few times before; what it reads of the host is read then.
        given: example tensors, which are copied.
        device: a CUDA device.
        model: a model that the work runs and that stays frozen for as long as the graph is used:
            weights derived from them are computed once, before the capture.
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
        with _one_capture, torch.cuda.device(device), _nothing_borrowed(self._frozen):
            self._given = [tensor.detach().clone() for tensor in given]
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    work(*self._given)
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile is theirs, and allowed.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                result = work(*self._given)
        self.replay: Callable[[], None] = graph.replay
        """The work on the tensors of the last call."""
        self.result: Any = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
        """What the last replay wrote; the next one writes over it."""

    def __call__(self, *given: Tensor) -> Any:
        """The work's result on these tensors, of the examples' shapes; tensors in it are the caller's to keep."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._replayed)  # a call on another stream used the same memory
        with torch.no_grad():
            for static, tensor in zip(self._given, given, strict=True):
                static.copy_(tensor)
            self.replay()
            result = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.result)
        self._replayed.record(stream)
        return result


@contextmanager
def _nothing_borrowed(frozen: Frozen | None) -> Iterator[None]:
    """Inside the block nothing is read that someone else keeps and lets go of."""
    grad, casts_kept = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    # A later call could not write to tensors of inference mode.
    with torch.inference_mode(False), torch.set_grad_enabled(grad), thawed(), frozen or nullcontext():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(casts_kept)
