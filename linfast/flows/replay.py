"""Running a chain's steps again as they ran first: random numbers, autocast, backend, buffers and hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..backend import backend, chosen_backend

__all__ = ["Generators", "Replay"]

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


class Replay:
    """The state that a chain of steps runs in, noted once and for each step.

    Args:
        inputs: the chain's tensors; random numbers are kept of the CPU and of their CUDA devices.
        buffers: of the steps, by module. A module that writes to one in the first run has
            them all put back after a replay: no running statistic is updated twice.
    """

    def __init__(self, inputs: Iterable[Tensor], buffers: Sequence[Sequence[Tensor]]) -> None:
        devices = {tensor.device for tensor in inputs}
        self._generators = Generators(devices)
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", *(device.type for device in devices)})
        ]
        self._backend = chosen_backend()
        self._before = self._generators.state()
        self._random: list[RandomState | None] = []
        self._buffers = [(group, [buffer._version for buffer in group]) for group in buffers]
        self._written: list[Tensor] = []

    def note_step(self) -> None:
        """A step has run: keep the state before it if it drew random numbers."""
        after = self._generators.state()
        self._random.append(None if after == self._before else self._before)
        self._before = after

    def note_end(self) -> None:
        """All steps have run."""
        for group, versions in self._buffers:
            if versions != [buffer._version for buffer in group]:
                self._written.extend(group)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast as it was. Its cache is off: casts made without a graph must not serve one that needs it."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def again(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """All of the state but the random numbers, which ``set_random`` sets; put back afterwards."""
        with ExitStack() as stack:
            stack.enter_context(self.autocast())
            stack.enter_context(backend(self._backend))
            stack.enter_context(_silenced(parameters))
            stack.enter_context(_unwritten(self._written))
            if any(state is not None for state in self._random):
                stack.callback(self._generators.set, self._generators.state())
            yield

    def set_random(self, i: int) -> None:
        """Before step i runs again: its random numbers will be those of its first run."""
        state = self._random[i]
        if state is not None:
            self._generators.set(state)


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
def _unwritten(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Put back what these buffers hold now."""
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
