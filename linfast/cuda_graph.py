"""Work captured in a CUDA graph, which keeps all that the graph reads.

A graph reads memory by its address: whatever is freed after the capture is read all the same. ``CudaGraph``
therefore owns its inputs and outputs, captures into a pool of its own, and holds the work (so all that the work
refers to) and the model's parameters and buffers as they lay. What is kept for a while only stays out:
weights derived from weights inside ``linfast.freeze``, and autocast's casts of weights, are computed in the
graph; a promise that the model's weights stay still for as long as the graph is used (``frozen``) is the
graph's own, and so are the derived weights that it computes once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .freeze import Frozen, thawed

__all__ = ["CudaGraph"]

_Result = TypeVar("_Result")
_WARM_UP = 3  # calls before a capture: lazy initialisation and autotuning do not belong into it
_one_capture = threading.RLock()  # at a time: they share the device's random generator


class CudaGraph(Generic[_Result]):
    """``work(*given)`` captured once; called with other tensors of the same kinds, it is replayed on those.

    Values written into the model's parameters are seen at the next call, unless ``frozen``. Where a parameter
    or buffer is replaced, the graph goes on reading the one that it was captured with.

    Args:
        work: what is captured. It is called a few times before; its reads of the host are of the capture.
        given: example tensors, all on ``device``; copied.
        device: a CUDA device.
        model: whose parameters and buffers the work reads.
        frozen: the weights of ``model`` are promised still for as long as the graph is called: derived ones
            are computed before the capture, once.
    """

    def __init__(
        self,
        work: Callable[..., _Result],
        given: Sequence[Tensor],
        device: torch.device,
        model: nn.Module | None = None,
        frozen: bool = False,
    ) -> None:
        if frozen and model is None:
            raise ValueError("frozen=True needs the model whose weights are promised still")
        self._work, self._device = work, device
        self._frozen = Frozen(model) if model is not None and frozen else None
        read = () if model is None else itertools.chain(model.parameters(), model.buffers())
        self._read = [tensor.detach() for tensor in read]
        self._replayed = torch.cuda.Event()
        self._one_call = threading.Lock()  # at a time: all use the same memory
        with _one_capture, torch.cuda.device(device), _nothing_borrowed(self._frozen):
            self._given = [tensor.detach().clone() for tensor in given]
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    work(*self._given)
            here.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile is theirs, and allowed.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                result = work(*self._given)
        self.result: _Result = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
        """What the last replay wrote; the next one writes over it."""

    def __call__(self, *given: Tensor) -> _Result:
        """The work's result on these tensors, on the current stream; the caller's to keep.

        Raises:
            ValueError: tensors of another number, shape, dtype or device than those of the capture.
        """
        kinds, captured = [_kind(tensor) for tensor in given], [_kind(tensor) for tensor in self._given]
        if kinds != captured:
            raise ValueError(f"a CUDA graph takes tensors as at its capture, {captured}; got {kinds}")
        with self._one_call, torch.cuda.device(self._device), torch.no_grad():
            stream = torch.cuda.current_stream()
            stream.wait_event(self._replayed)  # a call on another stream uses the same memory
            for static, tensor in zip(self._given, given, strict=True):
                static.copy_(tensor)
            self.replay()
            result = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.result)
            self._replayed.record(stream)
        return result

    def replay(self) -> None:
        """The work on the tensors of the last call, into ``result``; whoever changes streams orders them."""
        self._graph.replay()


@contextmanager
def _nothing_borrowed(frozen: Frozen | None) -> Iterator[None]:
    """Inside the block nothing is read that someone else keeps and lets go of."""
    grad, casts_kept = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # whose tensors a later call could not write to
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(thawed())
        if frozen is not None:
            stack.enter_context(frozen)
        stack.callback(torch.set_autocast_cache_enabled, casts_kept)
        torch.set_autocast_cache_enabled(False)
        yield


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(tensor.shape), tensor.dtype, tensor.device
