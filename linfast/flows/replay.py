"""Running a step again: the state that it first ran in, and what autograd's graph tells of its first run."""

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
"""Buffers: the dictionary of the module that has each, its name there, the tensor, and what it held."""


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
    """A function that tells which of these modules' buffers were written to or replaced since, and what they held.

    A module that has written to one of its buffers, or has replaced one, is taken to have written to them all:
    batch norm's count of batches shows a write that its statistics do not.
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
    """Make the buffers hold these. They are no new version: whoever reads them again has them as they were."""
    for owner, name, buffer, value in values:
        buffer.data.copy_(value)
        owner[name] = buffer


class Replay:
    """The state that a chain of steps runs in, noted in its first run and restored when its steps run again.

    A step that draws random numbers or writes to buffers (batch norm's statistics, spectral norm's power iteration)
    runs again from the state of its first run, and the buffers are put back afterwards: nothing is updated twice.
    A step that writes to its parameters too initialises itself, which it does only once.

    Args:
        inputs: the chain's tensors: random numbers are kept of the CPU and of their CUDA devices.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        devices = {tensor.device for tensor in inputs}
        self._generators = Generators(devices)
        # Without its cache: a cast made without a graph must not serve where one is needed.
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
        """Around the first run of the next step: keeps the state before it of what the step changes."""
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
        """Autocast as it was."""
        with ExitStack() as stack:
            for each in self._autocasts:
                stack.enter_context(each())
            yield

    @contextmanager
    def again(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """The chain's state but for what ``rewind`` sets for each step; all is put back at the end."""
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
        """Before step i runs again: gives it the random numbers and buffers of its first run."""
        state = self._random[i]
        if state is not None:
            self._generators.set(state)
        put_back(self._held[i])


@contextmanager
def _silenced(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Turns gradient hooks off: autograd runs them on what the chain's backward returns, and must do so once."""
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)


# In the graph of y = f(x, w) every path back from y ends at x, at w, or at a tensor that f read from elsewhere: a
# closure's, a global's, an attribute that is no parameter. A tensor that needs no gradient is not in the graph. A
# thread numbers the nodes that it makes in rising order.

_REENTRANT = "CheckpointFunctionBackward"  # a reentrant checkpoint makes its graph only in the backward
_number: Callable[[Any], int] = methodcaller("_sequence_nr")


def _walk(outputs: Iterable[Tensor | None], ends: Collection[Any], since: int = 0) -> list[Any]:
    """The nodes behind the outputs, as far back as the ends, which are left out, and nodes older than ``since``."""
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
    """The tensors' nodes in the graph; a leaf's is where its gradient is accumulated."""
    return [get_gradient_edge(tensor).node for tensor in tensors if tensor is not None and tensor.requires_grad]


def read_from_outside(
    outputs: Iterable[Tensor | None], inputs: Sequence[Tensor], leaves: Iterable[Tensor]
) -> str | None:
    """A description of what else in the outputs' graph needs a gradient; None where nothing does.

    Args:
        inputs: the function's arguments, where the graph may end. The first must not be a leaf: nodes older than
            its node belong to another computation.
        leaves: its parameters, where it may end too.
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
    """An object that a node holds for as long as it lives."""


def keeps_a_piece(outputs: Iterable[Tensor | None], inputs: Iterable[Tensor]) -> Callable[[], bool]:
    """A function that tells, once the outputs are gone, whether something else holds a part of their graph.

    Only parts that do not depend on an input count: a tensor made of parameters and kept for the next call, as a
    cache does. A tensor that was left behind for a penalty holds what it was made of as well.
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
