"""From blocks of noise on a device to blocks of samples on the CPU.

On a CPU the model is called and that is all. On a GPU the model is captured once as a CUDA graph
and replayed; its output goes to one of two staging tensors and from there, on a second stream,
to one of two pinned buffers, so that the next block is computed while this one is copied and used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..cuda_graph import capture

__all__ = ["Pipeline", "make_pipeline"]

Model = Callable[[Tensor], Tensor]


class Pipeline:
    """Calls the model when a block is started: one block in flight."""

    depth = 1

    def __init__(self, model: Model) -> None:
        self.model = model

    def start(self, noise: Tensor) -> Any:
        return self.model(noise)

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

    def __init__(self, model: Model, example: Tensor, graph: bool) -> None:
        super().__init__(model)
        self.compute, self.copy = torch.cuda.current_stream(example.device), torch.cuda.Stream(example.device)
        if graph:
            self._capture(example)
        self.turn = 0
        like = self.model(example)
        self.staged = [torch.empty_like(like) for _ in range(self.depth)]
        self.host = [torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for _ in range(self.depth)]

    def _capture(self, example: Tensor) -> None:
        model, given = self.model, example.clone()
        run, result = capture(lambda: model(given), example.device)

        def replay(noise: Tensor) -> Tensor:
            given.copy_(noise)
            run()
            return result

        self.model = replay

    def start(self, noise: Tensor) -> tuple[int, torch.cuda.Event]:
        slot, self.turn = self.turn, (self.turn + 1) % self.depth
        self.staged[slot].copy_(self.model(noise))
        self.copy.wait_stream(self.compute)
        copied = torch.cuda.Event()
        with torch.cuda.stream(self.copy):
            self.host[slot].copy_(self.staged[slot], non_blocking=True)
            copied.record()
        return slot, copied

    def finish(self, started: tuple[int, torch.cuda.Event]) -> Tensor:
        slot, copied = started
        copied.synchronize()
        return self.host[slot]


def make_pipeline(model: Model, example: Tensor, cuda_graph: bool) -> Pipeline:
    """The pipeline of the example's device; ``example`` is a block of noise. No gradients are kept."""
    return CudaPipeline(model, example, cuda_graph) if example.device.type == "cuda" else Pipeline(model)
