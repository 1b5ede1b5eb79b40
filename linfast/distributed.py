"""The process group of torchrun's processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

__all__ = ["process_group"]


@contextmanager
def process_group(device: torch.device, backend: str | None = None) -> Iterator[torch.device]:
    """Join torchrun's processes and yield this one's device; without torchrun, yield the device.

    ``backend`` of torch.distributed is by default gloo on a CPU and nccl on GPUs.

    Raises:
        ValueError: WORLD_SIZE and what goes with it are not what torchrun sets.
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
