"""A stand-in for torch.cuda on a CPU: streams that know what they have waited for, and graphs that read by address.

A capture records every operation on tensors, and the address of each tensor. Tensors made inside the
capture are in the graph's pool and stay; all others are held only by weak references, as a GPU only knows their
address: a replay that reads memory which was freed since is an error. Kernels inside raw ops are recorded too, with
the arguments of their launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

from linfast.ops import register

_aten = torch.ops.aten
_READ_BY_THE_HOST = {_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.is_nonzero}


class Stream:
    """Knows the work that it runs after: its own and that of the streams it has waited for."""

    def __init__(self, device: object = None) -> None:
        self.known: set[object] = set()

    def wait_stream(self, other: Stream) -> None:
        self.known |= other.known

    def wait_event(self, event: Event) -> None:
        self.known |= event.known


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.known: set[object] = set()

    def record(self, stream: Stream | None = None) -> None:
        self.known = set((stream or torch.cuda.current_stream()).known)

    def synchronize(self) -> None:
        """Does nothing, since all work runs at once."""

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self._steps: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self._pool: dict[int, torch.UntypedStorage] = {}
        self.reads: dict[int, tuple[StorageWeakRef, str]] = {}  # read from outside; the operation that read it
        self.replays = 0

    def freed(self) -> list[str]:
        """The operations that read freed memory."""
        return [reader for ref, reader in self.reads.values() if ref.expired()]

    def replay(self) -> None:
        here = torch.cuda.current_stream()
        assert {(id(self), n) for n in range(self.replays)} <= here.known, "it may still run on another stream"
        here.known.add((id(self), self.replays))
        self.replays += 1
        assert not self.freed(), f"the graph reads memory that was freed: {self.freed()}"
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the recorded operations are below both
            for step in self._steps:
                _again(*step)

    def read(self, value: Any, reader: str) -> None:
        if isinstance(value, Tensor) and _storage(value) not in self._pool:
            self.reads.setdefault(_storage(value), (StorageWeakRef(value.untyped_storage()), reader))

    def made(self, value: Any) -> None:
        if isinstance(value, Tensor) and _storage(value) not in self.reads:
            self._pool[_storage(value)] = value.untyped_storage()

    def place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        strong = self._pool.get(_storage(value))
        return _Place(value, StorageWeakRef(value.untyped_storage()) if strong is None else strong)

    def step(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        where = tree_map(self.place, (args, kwargs))
        kept = [
            v.detach() if isinstance(v, Tensor) and _storage(v) in self._pool else None
            for v in tree_leaves(outputs)
        ]
        self._steps.append((func, *where, kept))


def _again(func: Any, args: Any, kwargs: Any, outputs: list[Tensor | None]) -> None:
    """Repeat the step on the current contents of its inputs, into its former outputs."""
    args, kwargs = (tree_map(lambda v: v.tensor() if isinstance(v, _Place) else v, a) for a in (args, kwargs))
    given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    for kept, made in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
        if kept is not None and _storage(made) not in given:
            kept.copy_(made)


class _Place:
    """The address of a tensor, which does not keep it alive."""

    def __init__(self, tensor: Tensor, storage: StorageWeakRef | torch.UntypedStorage) -> None:
        self._storage, self._dtype = storage, tensor.dtype
        self._layout = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        storage = self._storage
        if isinstance(storage, StorageWeakRef):
            storage = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
            assert storage is not None, "the graph reads memory that was freed"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)


class _Capture(TorchDispatchMode):
    """Records what runs; inside a raw op, what its launcher reads, which is not a separate step."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _READ_BY_THE_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs, inside = kwargs or {}, self.inside
        for value in tree_leaves((args, kwargs)):
            self.graph.read(value, str(func))
        outputs = func(*args, **kwargs)
        for value in tree_leaves(outputs):
            self.graph.made(value)
        if not inside:
            self.graph.step(func, args, kwargs, outputs)
        return outputs

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            with self:
                yield
        finally:
            self.inside = before


class Cuda:
    """The captured graphs, and the current stream."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.here = Stream()
        self.capturing: _Capture | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """(captures, replays)."""
        return len(self.graphs), sum(graph.replays for graph in self.graphs)

    def freed(self) -> list[str]:
        return [reader for graph in self.graphs for reader in graph.freed()]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    @contextlib.contextmanager
    def graph(
        self, graph: Graph, pool: object = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.capturing = _Capture(graph)
        try:
            with self.stream(stream or Stream()), self.capturing:
                yield
            self.graphs.append(graph)
        finally:
            self.capturing = None

    def launcher(self, path: str) -> Any:
        launch, capturing = _launcher(path), self.capturing

        def run(*arguments: Any) -> Any:
            if capturing is None:
                return launch(*arguments)
            with capturing.within():
                return launch(*arguments)

        return run

    def grid(self, executor: Any, *arguments: Any, **named: Any) -> Any:
        if self.capturing is not None:
            for value in (*arguments, *named.values()):
                self.capturing.graph.read(value, f"kernel {executor.fn.__name__}")
        with _disable_current_modes():
            return _interpret(executor, *arguments, **named)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


_launcher, _interpret = register._launcher, GridExecutor.__call__


def install(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """torch.cuda is the stand-in until the test ends. Tensors stay on the CPU."""
    cuda, empty = Cuda(), torch.empty
    stands_in = {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": cuda.graph, "stream": cuda.stream,
        "device": lambda device: contextlib.nullcontext(), "current_stream": lambda device=None: cuda.here,
        "is_current_stream_capturing": lambda: cuda.capturing is not None,
        "synchronize": lambda device=None: None, "is_available": lambda: True,
    }  # fmt: skip
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **named: empty(*size, **named))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(register, "_launcher", cuda.launcher)
    monkeypatch.setattr(GridExecutor, "__call__", lambda *given, **named: cuda.grid(*given, **named))
    return cuda
