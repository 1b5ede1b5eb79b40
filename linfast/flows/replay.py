"""Running a chain's steps again as they ran first: random numbers, autocast, backend, buffers and hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..dispatch import backend, chosen_backend

__all__ = ["Buffers", "Generators", "Replay", "put_back"]

RandomState = tuple[bytes, ...]


class Generators:
    """The random number generators of the CPU and of the CUDA devices among these; CUDA's not under capture."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        cuda = sorted((device for device in devices if device.type == "cuda"), key=str)
        self._cuda = [] if cuda and torch.cuda.is_current_stream_capturing() else cuda

    def state(self) -> RandomState:
        states = (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda))
        return tuple(state.numpy().tobytes() for state in states)

    def set(self, state: RandomState) -> None:
        cpu, *others = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in state)
        torch.set_rng_state(cpu)
        for device, other in zip(self._cuda, others, strict=True):
            torch.cuda.set_rng_state(other, device)


Values = list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]
"""Buffers: the dictionary of the module that has each, its name there, the tensor, and what it held."""


class Buffers:
    """What a module's buffers hold.

    A submodule that has written to one of its buffers, or has put another tensor in its place, is taken to have
    written to them all: batch norm's count shows it, and its statistics do not.
    """

    def __init__(self, module: nn.Module | None) -> None:
        parts = () if module is None else module.modules()
        owners = [part._buffers for part in parts if part._buffers]
        self._groups = [
            [(owner, name, b, _writes(b), b.detach().clone()) for name, b in owner.items() if b is not None]
            for owner in owners
        ]

    def written(self) -> Values:
        """Those written to or replaced since, and what they held."""
        changed = (
            group
            for group in self._groups
            if any(owner.get(name) is not b or _writes(b) != writes for owner, name, b, writes, _ in group)
        )
        return [(owner, name, b, value) for group in changed for owner, name, b, _, value in group]


def _writes(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def put_back(values: Values) -> None:
    """Make the buffers hold these. Whoever reads them again has them as they were: it is no new version."""
    for owner, name, buffer, value in values:
        buffer.data.copy_(value)
        owner[name] = buffer


class Replay:
    """The state that a chain of steps runs in, noted once and for each step.

    A step that draws random numbers or writes to buffers (batch norm's statistics, the vectors of spectral norm's
    power iteration) is run again from the state that it ran in first, and the buffers are put back afterwards:
    nothing is updated twice. One that writes to parameters too initialises itself, and does that once.

    Args:
        inputs: the chain's tensors; random numbers are kept of the CPU and of their CUDA devices.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        devices = {tensor.device for tensor in inputs}
        self._generators = Generators(devices)
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", *(device.type for device in devices)})
        ]
        self._backend = chosen_backend()
        self._before = self._generators.state()
        self._random: list[RandomState | None] = []
        self._held: list[Values] = []
        self._written: Values = []

    @contextmanager
    def noting(self, module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Around the first run of the next step: keeps the state before it, of what it changes."""
        buffers, versions = Buffers(module), [p._version for p in parameters]
        yield
        after = self._generators.state()
        self._random.append(None if after == self._before else self._before)
        self._before = after
        written = buffers.written()
        self._written.extend(written)
        self._held.append(written if versions == [p._version for p in parameters] else [])

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast as it was. Its cache is off: casts made without a graph must not serve one that needs it."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def again(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """All of the state but each step's own, which ``rewind`` sets; put back afterwards."""
        with ExitStack() as stack:
            stack.enter_context(self.autocast())
            stack.enter_context(backend(self._backend))
            stack.enter_context(_silenced(parameters))
            stack.enter_context(_unwritten(self._written))
            if any(state is not None for state in self._random):
                stack.callback(self._generators.set, self._generators.state())
            yield

    def rewind(self, i: int) -> None:
        """Before step i runs again: its random numbers and buffers will be those of its first run."""
        state = self._random[i]
        if state is not None:
            self._generators.set(state)
        put_back(self._held[i])


@contextmanager
def _silenced(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Gradient hooks off: autograd runs them on what the chain's backward returns, and must do so once."""
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)


@contextmanager
def _unwritten(values: Values) -> Iterator[None]:
    """Put back the tensors that these buffers are now, and what they hold."""
    present = ((owner, name, owner[name]) for owner, name, *_ in values)
    kept = [(owner, name, b, b.detach().clone()) for owner, name, b in present if b is not None]
    try:
        yield
    finally:
        put_back(kept)
