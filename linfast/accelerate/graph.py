"""cuda_graph=True: a method's work captured once for each kind of input, and replayed.

A graph is captured of a call without gradients, in eval mode, on CUDA tensors, by the shapes, strides and
dtypes of the tensors given, the other arguments, autocast, backend and precision. Its inputs are copied in,
its outputs copied out. It reads the parameters where they lie: values written in place are seen, also through
weights derived from them, which are computed in the graph even inside ``linfast.freeze``; where a parameter or
buffer is replaced, a graph is captured anew. Everything else runs as it would without graphs: calls that need
gradients, train mode, other devices, under torch.compile or torch.func, inside a capture of the caller's own,
and work that cannot be captured, of which a warning is given once. A change to anything but tensors, such as
a step put into a chain, is not seen: accelerate again.

Not run on a GPU so far: on a CPU its bookkeeping is tested with a stand-in for the capture.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..cuda_graph import CudaGraph
from ..dispatch import autocast_dtype, chosen_backend
from ..precision import resolve_precision

__all__ = ["Graphs", "capturable"]

_MOST = 8  # graphs an instance holds: each keeps its activations; the oldest goes first


@dataclass(frozen=True)
class _Captured:
    """A graph, and where it found the instance's parameters and buffers."""

    graph: CudaGraph[Any]
    found: Hashable


class Graphs:
    """One instance's. A copy of the instance captures its own."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Captured] = {}
        self._failed: set[Hashable] = set()

    def run(self, method: Callable[..., Any], instance: nn.Module, arguments: Any, named: Any) -> Any:
        """method(instance, *arguments, **named), replayed where it can be."""
        leaves, spec = tree_flatten((arguments, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(_Given if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = _key(method, others, spec, tensors) if tensors and _fits(instance, tensors) else None
        if key is None or key in self._failed:
            return method(instance, *arguments, **named)
        owner = weakref.ref(instance)  # it holds the graph, which holds the work

        def work(*given: Tensor) -> Any:
            fresh = iter(given)
            arguments, named = tree_unflatten([next(fresh) if leaf is _Given else leaf for leaf in others], spec)
            return method(owner(), *arguments, **named)

        captured = self._captured.get(key)
        if captured is None or captured.found != _lies(instance):
            self._captured.pop(key, None)
            try:
                graph = CudaGraph(work, tensors, tensors[0].device, instance)
            except RuntimeError as error:
                self._failed.add(key)
                warnings.warn(
                    f"{type(instance).__name__} runs without a CUDA graph: {error}", RuntimeWarning, stacklevel=3
                )
                return method(instance, *arguments, **named)
            while len(self._captured) >= _MOST:
                del self._captured[next(iter(self._captured))]
            captured = self._captured[key] = _Captured(graph, _lies(instance))
        return captured.graph(*tensors)


def capturable(tensor: Tensor) -> bool:
    """Whether work on this tensor can go into a graph now."""
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


def _fits(instance: nn.Module, tensors: Sequence[Tensor]) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if getattr(instance, "_is_replica", False):  # nn.DataParallel's: its weights are others at every call
        return False
    here = all(capturable(t) and t.device == tensors[0].device for t in tensors)
    return here and not any(module.training for module in instance.modules())


def _key(
    method: Callable[..., Any], others: Sequence[Any], spec: Any, tensors: Sequence[Tensor]
) -> Hashable | None:
    """What calls that one graph serves have in common; None where an argument cannot be part of a key."""
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
    autocast = autocast_dtype(tensors[0].device.type)
    key = (method, spec, others, kinds, autocast, chosen_backend(), resolve_precision(tensors[0]))
    try:
        hash(key)
    except TypeError:
        return None
    return key


class _Given:
    """A tensor's place among the arguments."""


def _lies(instance: nn.Module) -> Hashable:
    """Where the instance's parameters and buffers lie."""
    own = (t for m in instance.modules() for group in (m._parameters, m._buffers) for t in group.values())
    return tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in own if t is not None)
