"""Data parallelism under torchrun: the process group, and who holds which rows of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_over_processes", "process_group", "rank_and_size", "rows_of_this_process"]

_LARGEST = 2**20  # processes


@contextmanager
def process_group(device: torch.device, backend: str | None = None) -> Iterator[torch.device]:
    """torchrun's processes joined, and this one's device; alone, just the device.

    Args:
        backend: of torch.distributed; by default gloo on a CPU, nccl on GPUs.

    Raises:
        ValueError: WORLD_SIZE and what goes with it are not what torchrun sets.
        ConnectionError: the processes cannot reach one another.
    """
    size = _from_environment("WORLD_SIZE", 1, _LARGEST, default=1)
    if size == 1 or dist.is_initialized():
        yield device
        return
    _from_environment("RANK", 0, size - 1)
    _from_environment("MASTER_PORT", 0, 65535)
    host = os.environ.get("MASTER_ADDR", "")
    if not host or not host.isprintable():
        raise ValueError(f"MASTER_ADDR must be set where WORLD_SIZE is {size}, as torchrun does; got {host!r}")
    if device.type == "cuda":
        last = torch.cuda.device_count() - 1
        device = torch.device("cuda", _from_environment("LOCAL_RANK", 0, last))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend or ("nccl" if device.type == "cuda" else "gloo"))
    except dist.DistError as error:
        raise ConnectionError(f"{size} processes cannot meet at MASTER_ADDR {host}: {error}") from error
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, low: int, high: int, default: int | None = None) -> int:
    """The environment variable as a whole number from low to high."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or len(text) > len(str(high)) or not low <= int(text) <= high:
        raise ValueError(
            f"{name} must be a whole number from {low} to {high}, as torchrun sets it; got {text!r:.60}"
        )
    return int(text)


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without torch.distributed."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def rows_of_this_process(batch: int) -> slice:
    """The rows of the whole batch that this process computes.

    Raises:
        ValueError: a batch that the processes cannot share equally; their mean would not be the batch's.
    """
    rank, size = rank_and_size()
    if batch % size:
        raise ValueError(f"batch {batch} must be a multiple of the {size} processes")
    return slice(rank * batch // size, (rank + 1) * batch // size)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of each value over all processes."""
    _, size = rank_and_size()
    if size > 1:
        dist.all_reduce(values)
    return values / size
