"""What this machine can do: a large copy and a large matrix product, timed here and now.

    copy_bytes_per_s      bytes read plus bytes written by one copy of a tensor far past the cache
    matmul_<dtype>_per_s  operations of an n x n x n product, 2 n^3, with torch's settings as found

A kernel's bytes (or operations) a second over these is its share of the ceiling. Inputs
that fit in the cache can pass 100% of a copy that does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["ceilings"]

_COPY_BYTES = {"cpu": 2**26, "cuda": 2**31}  # a CPU's calls end within a time slice
_MATMUL = {"cpu": {"float32": 512}, "cuda": {"float32": 8192, "bfloat16": 8192}}
_REPEATS = 25


def ceilings(device: torch.device) -> dict[str, float]:
    """The rates above, the best of many calls: what else runs on the machine lowers no ceiling."""
    rates = {"copy_bytes_per_s": _copy_rate(device)}
    return rates | {
        f"matmul_{name}_per_s": _matmul_rate(device, name, n) for name, n in _MATMUL[device.type].items()
    }


def _copy_rate(device: torch.device) -> float:
    source = torch.randn(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, dtype: str, n: int) -> float:
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, dtype))
    return 2 * n**3 / _seconds(lambda: a @ b, device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
