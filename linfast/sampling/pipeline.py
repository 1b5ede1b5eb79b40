"""From blocks of noise on a device to blocks of samples on the CPU.

On a CPU the model is called and that is all. On a GPU the model is captured once as a CUDA graph and
replayed; on a second stream its samples go to one of two pinned buffers, so that the next block is computed
while this one is copied and used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..cuda_graph import CudaGraph

__all__ = ["Pipeline", "make_pipeline"]

Work = Callable[[Tensor], Tensor]


class Pipeline:
    """Does the work when a block is started: one block in flight."""

    depth = 1

    def __init__(self, work: Work) -> None:
        self.work = work

    def start(self, noise: Tensor) -> Any:
        return self.work(noise)

    def finish(self, started: Any) -> Tensor:
        return started

    def run(self, noises: Iterator[Tensor]) -> Iterator[Tensor]:
        """Each block's samples, valid until the next are asked for."""
        in_flight: deque[Any] = deque()
        for noise in noises:
            in_flight.append(self.start(noise))
            if len(in_flight) == self.depth:
                yield self.finish(in_flight.popleft())
        while in_flight:
            yield self.finish(in_flight.popleft())


class CudaPipeline(Pipeline):
    """Two blocks in flight: one computed, one on its way to the host."""

    depth = 2

    def __init__(self, work: Work, example: Tensor, graph_of: nn.Module | None) -> None:
        if graph_of is None:
            super().__init__(lambda noise: work(noise).clone())
        else:
            super().__init__(CudaGraph(work, [example], example.device, graph_of, frozen=True))
        self.copy = torch.cuda.Stream(example.device)
        self.host: list[Tensor] = []
        self.turn = 0

    def start(self, noise: Tensor) -> tuple[int, torch.cuda.Event]:
        samples = self.work(noise)  # nobody else's: nothing writes over it while it is copied
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


def make_pipeline(work: Work, example: Tensor, graph_of: nn.Module | None) -> Pipeline:
    """The pipeline of the example's device.

    Args:
        work: from a block of noise to its samples. No gradients are kept.
        example: a block of noise.
        graph_of: the model that the work runs, where it is to be captured in a CUDA graph on a GPU; its
            weights are then promised still for as long as the pipeline runs.
    """
    return CudaPipeline(work, example, graph_of) if example.device.type == "cuda" else Pipeline(work)
