"""Who computes which blocks: one process, or those of torch.distributed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

__all__ = ["Workers"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Workers:
    """This process is number ``rank`` of ``count``."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Workers:
        """Those of the default process group, where there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def rounds(self, done: int, count: int, batch_size: int, block: int) -> Iterator[tuple[range, int]]:
        """(this process's blocks, row at which the round ends): what is done is always a prefix."""
        each, blocks = -(-batch_size // block), -(-count // block)
        for first in range(-(-done // block), blocks, each * self.count):
            mine = first + self.rank * each
            end = first + self.count * each
            yield range(min(mine, blocks), min(mine + each, blocks)), min(end * block, count)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def by_first(self, call: Callable[[], _Result]) -> _Result:
        """call() on process 0; its result, or its error, everywhere."""
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

    @contextmanager
    def bar(self, total: int, done: int, show: bool | None) -> Iterator[Callable[[int], None]]:
        """A function to call with the rows done so far; it shows them on process 0, where asked for."""
        from .._command import Progress

        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        wanted = on_terminal if show is None else show
        with Progress("sampling", done, total, "sample", wanted and self.rank == 0) as progress:
            yield progress.show
