"""Runs a step again in the state of its first run, and finds the tensors that it reads in autograd's graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..dispatch import backend, chosen_backend
from .remembered import writes

_RandomState = tuple[bytes, ...]
_Values = list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]
"""Buffers: for each its module's dictionary of buffers, its name there, the tensor, and its former values."""


class Generators:
    """The random number generators of the CPU and, unless a CUDA graph is captured, of these CUDA devices."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        cuda = sorted((device for device in devices if device.type == "cuda"), key=str)
        self._cuda = [] if cuda and torch.cuda.is_current_stream_capturing() else cuda

    def state(self) -> _RandomState:
        states = (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda))
        return tuple(state.numpy().tobytes() for state in states)

    def set(self, state: _RandomState) -> None:
        cpu, *others = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in state)
        torch.set_rng_state(cpu)
        for device, other in zip(self._cuda, others, strict=True):
            torch.cuda.set_rng_state(other, device)


def watched(modules: Iterable[nn.Module]) -> Callable[[], _Values]:
    """A function that returns which of these modules' buffers were written to or replaced since, with old values.

    Where one buffer of a module was written to or replaced, all its buffers count as written to: of batch norm's
    buffers, torch counts the writes to the number of batches, but not those to the statistics.
    """
    groups = [
        [(owner, name, b, writes(b), b.detach().clone()) for name, b in owner.items() if b is not None]
        for owner in [module._buffers for module in modules]
    ]
    return lambda: [
        (owner, name, b, value)
        for group in groups
        if any(owner.get(name) is not b or writes(b) != before for owner, name, b, before, _ in group)
        for owner, name, b, _, value in group
    ]


def put_back(values: _Values) -> None:
    """Restore these values without a new version of the buffers: a graph that has saved one stays valid."""
    for owner, name, buffer, value in values:
        buffer.data.copy_(value)
        owner[name] = buffer


class Replay:
    """The state in which a chain of steps runs, recorded in its first run and restored when its steps run again.

    A step that draws random numbers or writes to buffers (batch norm's statistics, spectral norm's power iteration)
    runs again from the state of its first run. Afterwards the buffers are restored: nothing is updated twice. A
    step that also writes to its parameters initialises itself: it runs again with its new buffers, to do so once.

    Args:
        inputs: the chain's tensors; generator states are recorded for the CPU and for the tensors' CUDA devices.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        devices = {tensor.device for tensor in inputs}
        self._generators = Generators(devices)
        # Without autocast's cache: a cast made without a graph must not be used where a graph is needed.
        self._autocasts = [
            partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False)
            for kind in sorted({"cpu", *(device.type for device in devices)})
        ]
        self._backend = chosen_backend()
        self._before = self._generators.state()
        self._random: list[_RandomState | None] = []
        self._held: list[_Values] = []
        self._written: _Values = []

    @contextmanager
    def noting(self, module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Wraps the first run of the next step: records the earlier states of what it changes."""
        written_since, versions = watched(module.modules()), [p._version for p in parameters]
        yield
        after = self._generators.state()
        self._random.append(None if after == self._before else self._before)
        self._before = after
        written = written_since()
        self._written.extend(written)
        self._held.append(written if versions == [p._version for p in parameters] else [])

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast as in the first run."""
        with ExitStack() as stack:
            for each in self._autocasts:
                stack.enter_context(each())
            yield

    @contextmanager
    def again(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Steps may run again inside: sets all that ``rewind`` does not set, and restores everything at the end."""
        present = ((owner, name, owner[name]) for owner, name, *_ in self._written)
        kept = [(owner, name, b, b.detach().clone()) for owner, name, b in present if b is not None]
        with ExitStack() as stack:
            stack.enter_context(self.autocast())
            stack.enter_context(backend(self._backend))
            stack.enter_context(_silenced(parameters))
            stack.callback(put_back, kept)
            if any(state is not None for state in self._random):
                stack.callback(self._generators.set, self._generators.state())
            yield

    def rewind(self, i: int) -> None:
        """Before step i runs again: restores the generators and buffers with which it first ran."""
        state = self._random[i]
        if state is not None:
            self._generators.set(state)
        put_back(self._held[i])


@contextmanager
def _silenced(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Disables gradient hooks: autograd must run them only once, on the gradients that the chain returns."""
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)


# In the graph of y = f(x, w) every path back from y ends at x, at w, or at a tensor that f read from elsewhere:
# a closure, a global, or an attribute that is not a parameter. A tensor that needs no gradient is not in the graph.
# Each thread numbers the nodes that it makes in increasing order.

_REENTRANT = "CheckpointFunctionBackward"  # a reentrant checkpoint makes its graph only in the backward
_number: Callable[[Any], int] = methodcaller("_sequence_nr")


def _walk(outputs: Iterable[Tensor | None], ends: Collection[Any], since: int = 0) -> list[Any]:
    """The graph's nodes from the outputs back to ``ends``, which are left out, or to nodes older than ``since``."""
    found: dict[Any, None] = {}
    pending = _nodes(outputs)
    while pending:
        node = pending.pop()
        if node is None or node in found or node in ends:
            continue
        found[node] = None
        if _number(node) >= since:
            pending.extend([each for each, _ in node.next_functions])
    return list(found)


def _nodes(tensors: Iterable[Tensor | None]) -> list[Any]:
    """The tensors' nodes in the graph; for a leaf, the node that accumulates its gradient."""
    return [get_gradient_edge(tensor).node for tensor in tensors if tensor is not None and tensor.requires_grad]


def read_from_outside(
    outputs: Iterable[Tensor | None], inputs: Sequence[Tensor], leaves: Iterable[Tensor]
) -> str | None:
    """Describes a tensor in the outputs' graph that is neither an input nor a leaf; None where there is none.

    Args:
        inputs: the function's arguments, where the graph may end. The first must not be a leaf: nodes older than
            its node belong to another computation.
        leaves: the function's parameters, where the graph may end too.
    """
    known, since = {id(leaf) for leaf in leaves}, _number(inputs[0].grad_fn)
    for node in _walk(outputs, set(_nodes(inputs)), since):
        if not node.next_functions and hasattr(node, "variable"):  # where a leaf's gradient is accumulated
            if id(node.variable) not in known:
                return f"a tensor {tuple(node.variable.shape)}"
        elif _number(node) < since:
            kind = node.name().removesuffix("0").removesuffix("Backward")
            return f"a tensor that was computed before ({kind})"
        elif node.name() == _REENTRANT:
            return "what a checkpoint with use_reentrant=True hides"
    return None


class _Mark:
    """An object that lives as long as the node that holds it."""


def keeps_a_piece(outputs: Iterable[Tensor | None], inputs: Iterable[Tensor]) -> Callable[[], bool]:
    """A function that tells, once the outputs are deleted, whether another object holds a part of their graph.

    Only parts that do not depend on an input count, such as a tensor that was computed from parameters and cached
    for the next call. A tensor kept for a penalty also holds the part that uses it, and does not count.
    """
    depend = set(_nodes(inputs))
    marks: dict[Any, weakref.ref[_Mark]] = {}
    users: list[tuple[weakref.ref[_Mark], weakref.ref[_Mark]]] = []
    for node in sorted((node for node in _walk(outputs, depend) if node.next_functions), key=_number):
        node.metadata[_Mark] = mark = _Mark()
        marks[node] = weakref.ref(mark)
        below = [each for each, _ in node.next_functions if each is not None]
        users.extend((marks[each], marks[node]) for each in below if each in marks and each not in depend)
        if any(each in depend for each in below):
            depend.add(node)

    def kept() -> bool:
        return any(piece() is not None and user() is None for piece, user in users)

    return lambda: kept() and gc.collect() >= 0 and kept()
