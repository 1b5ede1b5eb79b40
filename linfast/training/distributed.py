"""Data parallelism under torchrun: the process group, and who holds which rows of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_over_processes", "process_group", "rank_and_size", "rows_of_this_process"]


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """torchrun's processes joined (gloo on a CPU, nccl on GPUs), and this one's device; alone, just the device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


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
