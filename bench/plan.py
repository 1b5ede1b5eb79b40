"""Which sizes a run measures, and which it leaves out because they would take too long or too much memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .harness import Case, Result, Size

__all__ = ["sizes", "too_large"]

CALLS = 25  # of each provider at the least: the check, two rounds to warm up, five timed, memory, float64
MEMORY_SHARE = 0.5  # of what is free; inputs, float64 outputs and graphs come on top of a call's peak


def sizes(case: Case, scale: str, batches: Sequence[int] | None) -> list[Size]:
    """The case's sizes, with the asked batches in place of its own."""
    if batches is None:
        return list(case.sizes[scale])
    asked = [{**size, "batch": batch} for size in case.sizes[scale] for batch in batches]
    return list({tuple(size.items()): size for size in asked}.values())


def too_large(size: Size, measured: Sequence[Result], limit: float, device: torch.device) -> str | None:
    """Why a size is left out: what the nearest smaller one took, times how much larger this one is.

    A smaller size has the same words and no larger number; it predicts growth in proportion to
    every number, which is too little for widths and so errs on the side of measuring.

    Args:
        limit: seconds that the least number of calls of all providers may take.
    """
    smaller = [
        (growth, result)
        for result in measured
        if result.p50_ms is not None and (growth := _growth(result.size, size)) is not None
    ]
    nearest = min((growth for growth, _ in smaller), default=0.0)
    at = [result for growth, result in smaller if growth == nearest]
    seconds = 1e-3 * nearest * CALLS * sum(result.p50_ms or 0.0 for result in at)
    peak = nearest * max((result.peak_bytes or 0 for result in at), default=0)
    if seconds > limit:
        return f"about {seconds:.0f} s, over the limit of {limit:.0f}"
    if peak > MEMORY_SHARE * _free_bytes(device):
        return f"about {peak / 2**30:.1f} GiB a call"
    return None


def _growth(small: Size, large: Size) -> float | None:
    """How many times larger; None where it is not larger."""
    if small.keys() != large.keys():
        return None
    growth = 1.0
    for key, value in large.items():
        before = small[key]
        if isinstance(value, str) or isinstance(before, str):
            if value != before:
                return None
        elif value < before:
            return None
        elif value != before:
            growth *= value / max(before, 1)
    return growth


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return 1024.0 * kib[0] if kib else math.inf
