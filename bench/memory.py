"""Peak memory of one call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from .check import Outputs

__all__ = ["peak_bytes"]


def peak_bytes(call: Callable[..., Outputs], arguments: tuple[Tensor, ...], device: torch.device) -> int:
    """Bytes of tensors at the peak of one call, above what was allocated when it began.

    Outputs and temporaries count; weights and inputs, which were there before, do not.
    """
    if device.type == "cuda":
        return _cuda_peak(call, arguments, device)
    return _host_peak(call, arguments)


def _host_peak(call: Callable[..., Outputs], arguments: tuple[Tensor, ...]) -> int:
    """The largest running sum of what torch's allocator reports to its profiler."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        outputs = call(*arguments)
    del outputs
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def _cuda_peak(call: Callable[..., Outputs], arguments: tuple[Tensor, ...], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call(*arguments)
    torch.cuda.synchronize(device)
    del outputs
    return torch.cuda.max_memory_allocated(device) - before
