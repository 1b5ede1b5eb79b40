"""Which process computes which blocks; torchrun's process group; the pipeline of blocks through a device."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._command import Progress
from ..cuda_graph import CudaGraph

Work = Callable[[Tensor], Tensor]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Workers:
    """This process is number ``rank`` of ``count``."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Workers:
        """The processes of torch.distributed's default group; without a group, this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def rounds(self, done: int, count: int, batch_size: int, block: int) -> Iterator[tuple[range, int]]:
        """(this process's blocks, row at which the round ends); after each round all rows before that are done."""
        each, blocks = -(-batch_size // block), -(-count // block)
        for first in range(-(-done // block), blocks, each * self.count):
            mine = first + self.rank * each
            end = first + self.count * each
            yield range(min(mine, blocks), min(mine + each, blocks)), min(end * block, count)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            dist.barrier()

    def by_first(self, call: Callable[[], _Result]) -> _Result:
        """call() on process 0; every process returns its result, or raises its OSError or ValueError."""
        if self.count == 1:
            return call()
        message: list[object] = [None, None]
        if self.rank == 0:
            try:
                message[0] = call()
            except (OSError, ValueError) as error:
                message[1] = error
        dist.broadcast_object_list(message, src=0)
        if isinstance(message[1], Exception):
            raise message[1]
        return message[0]  # type: ignore[return-value]

    def bar(self, total: int, done: int, show: bool | None) -> Progress:
        """The progress of ``total`` rows. Process 0 shows it where ``show``, by default on a terminal only."""
        show = sys.stderr is not None and sys.stderr.isatty() if show is None else show
        return Progress("sampling", done, total, "sample", show and self.rank == 0)


@contextmanager
def process_group(device: torch.device, backend: str | None = None) -> Iterator[torch.device]:
    """Join torchrun's processes and yield this one's device; without torchrun, yield the device.

    ``backend`` of torch.distributed is by default gloo on a CPU and nccl on GPUs.

    Raises:
        ValueError: WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR or MASTER_PORT is not as torchrun sets it.
        ConnectionError: the processes cannot reach one another.
    """
    size = _from_environment("WORLD_SIZE", 1, 2**20, default="1")
    if size == 1 or dist.is_initialized():
        yield device
        return
    _from_environment("RANK", 0, size - 1)
    _from_environment("MASTER_PORT", 0, 65535)
    host = os.environ.get("MASTER_ADDR", "")
    if not host or not host.isprintable():
        raise ValueError(f"MASTER_ADDR must be set where WORLD_SIZE is {size}, as torchrun does; got {host!r}")
    if device.type == "cuda":
        device = torch.device("cuda", _from_environment("LOCAL_RANK", 0, torch.cuda.device_count() - 1))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend or ("nccl" if device.type == "cuda" else "gloo"))
    except dist.DistError as error:
        raise ConnectionError(f"{size} processes cannot meet at MASTER_ADDR {host}: {error}") from error
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, low: int, high: int, default: str = "") -> int:
    """The environment variable as a whole number from low to high."""
    text = os.environ.get(name, default)
    if not text.isdecimal() or len(text) > len(str(high)) or not low <= int(text) <= high:
        wanted = f"a whole number from {low} to {high}, as torchrun sets it"
        raise ValueError(f"{name} must be {wanted}; got {text!r:.60}")
    return int(text)


class CudaPipeline:
    """Samples of blocks of noise, two blocks at a time: while one is computed, the other is copied to the host.

    The model ``graph_of``, where given, is captured once as a CUDA graph and replayed; its weights are then frozen
    for as long as the pipeline runs. A second stream copies the samples to one of two pinned buffers.
    """

    depth = 2

    def __init__(self, work: Work, example: Tensor, graph_of: nn.Module | None) -> None:
        captured = None if graph_of is None else CudaGraph(work, [example], example.device, graph_of)
        self.work: Work = captured or (lambda noise: work(noise).clone())
        self.copy = torch.cuda.Stream(example.device)
        self.host: list[Tensor] = []
        self.turn = 0

    def __call__(self, noises: Iterator[Tensor]) -> Iterator[Tensor]:
        in_flight: deque[tuple[int, torch.cuda.Event]] = deque()
        for noise in noises:
            in_flight.append(self.start(noise))
            if len(in_flight) == self.depth:
                yield self.finish(in_flight.popleft())
        while in_flight:
            yield self.finish(in_flight.popleft())

    def start(self, noise: Tensor) -> tuple[int, torch.cuda.Event]:
        samples = self.work(noise)  # a tensor of its own, which no later block overwrites
        if not self.host:
            shape, dtype = samples.shape, samples.dtype
            self.host = [torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(self.depth)]
        slot, self.turn = self.turn, (self.turn + 1) % self.depth
        self.copy.wait_stream(torch.cuda.current_stream(noise.device))
        samples.record_stream(self.copy)
        copied = torch.cuda.Event()
        with torch.cuda.stream(self.copy):
            self.host[slot].copy_(samples, non_blocking=True)
            copied.record()
        return slot, copied

    def finish(self, started: tuple[int, torch.cuda.Event]) -> Tensor:
        slot, copied = started
        copied.synchronize()
        return self.host[slot]


def make_pipeline(
    work: Work, example: Tensor, graph_of: nn.Module | None
) -> Callable[[Iterator[Tensor]], Iterator[Tensor]]:
    """A function from blocks of noise like the example to their samples, each valid until the next is requested."""
    return CudaPipeline(work, example, graph_of) if example.device.type == "cuda" else partial(map, work)
