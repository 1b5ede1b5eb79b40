"""Capturing work into a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["capture"]

_Result = TypeVar("_Result")
_WARM_UP = 3  # calls before a capture: lazy initialisation and autotuning do not belong into it


def capture(work: Callable[[], _Result], device: torch.device) -> tuple[Callable[[], None], _Result]:
    """(replay, what ``work`` returned: written again by every replay)."""
    with torch.cuda.device(device):
        here, warm, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        warm.wait_stream(here)
        with torch.cuda.stream(warm):
            for _ in range(_WARM_UP):
                work()
        here.wait_stream(warm)
        with torch.cuda.graph(graph):
            result = work()
    return graph.replay, result
