"""cuda_graph=True: a method's work captured once for each kind of input, and replayed.

A graph is captured of a call without gradients, in eval mode, on CUDA tensors, by the shapes, strides and
dtypes of the tensors given, the other arguments, and autocast. Its inputs are copied in, its outputs copied
out. It reads the parameters where they lie: values written in place are seen; where a parameter or buffer is
replaced, a graph is captured anew. Everything else runs as it would without graphs: calls that need
gradients, train mode, other devices, torch.compile, a capture of the caller's own.

Derived weights of an enclosing ``linfast.freeze`` are computed in the graph all the same.

Not run on a GPU so far: on a CPU its bookkeeping is tested with a stand-in for the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..backend import chosen_backend
from ..freeze import thawed
from ..precision import resolve_precision

__all__ = ["Graphs", "capture"]

_WARM_UP = 3  # calls before a capture: lazy initialisation and autotuning do not belong into it


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors it reads and writes, and which parameters it found."""

    replay: Callable[[], None]
    given: Sequence[Tensor]
    result: Any
    found: Hashable


class Graphs:
    """One instance's. A copy of the instance captures its own."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Captured] = {}

    def run(self, method: Callable[..., Any], instance: nn.Module, arguments: Any, named: Any) -> Any:
        """method(instance, *arguments, **named), replayed where it can be."""
        leaves, spec = tree_flatten((arguments, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not _fits(instance, tensors):
            return method(instance, *arguments, **named)
        others = tuple(_Given if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        key = (method, spec, others, kinds, chosen_backend(), *_modes(tensors[0]))
        try:
            hash(key)
        except TypeError:  # an argument that no key can hold
            return method(instance, *arguments, **named)
        found = _lies(instance)
        captured = self._captured.get(key)
        if captured is None or captured.found != found:
            given = [t.clone(memory_format=torch.preserve_format) for t in tensors]

            def work() -> Any:
                fresh = iter(given)
                again = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                arguments, named = tree_unflatten(again, spec)
                return method(instance, *arguments, **named)

            self._captured.pop(key, None)
            with thawed():
                replay, result = capture(work, given[0].device)
            captured = self._captured[key] = _Captured(replay, given, result, _lies(instance))
        for static, tensor in zip(captured.given, tensors, strict=True):
            static.copy_(tensor)
        captured.replay()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, captured.result)


class _Given:
    """A tensor's place among the arguments."""


def capture(work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """(replay, what ``work`` returned: written again by every replay)."""
    with torch.cuda.device(device):
        here, warm, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        warm.wait_stream(here)
        with torch.cuda.stream(warm):
            for _ in range(_WARM_UP):
                work()
        here.wait_stream(warm)
        with torch.cuda.graph(graph):
            result = work()
    return graph.replay, result


def capturable(tensor: Tensor) -> bool:
    """Whether work on this tensor can be captured."""
    return tensor.is_cuda


def _fits(instance: nn.Module, tensors: Sequence[Tensor]) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not all(capturable(t) and t.device == tensors[0].device for t in tensors):
        return False
    capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return not capturing and not any(module.training for module in instance.modules())


def _modes(x: Tensor) -> tuple[Hashable, ...]:
    """Settings that decide how products on x are computed."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, resolve_precision(x)


def _lies(instance: nn.Module) -> Hashable:
    """Where the instance's parameters and buffers lie."""
    own = (t for m in instance.modules() for group in (m._parameters, m._buffers) for t in group.values())
    return tuple((t.data_ptr(), t.shape, t.stride()) for t in own if t is not None)
