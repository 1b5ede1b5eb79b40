"""The machine, versions and commit of a measurement, and the machine's peak rates."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch

import linfast
from linfast.info import NVIDIA_SMI, command_output, lines_after, package_version, processor_name

Environment = Mapping[str, str | float | None]

_COPY_BYTES = {"cpu": 2**26, "cuda": 2**31}  # on a CPU a call then ends within one time slice
_MATMUL = {"cpu": {"float32": 512}, "cuda": {"float32": 8192, "bfloat16": 8192}}
_REPEATS = 25


def describe(device: torch.device) -> Environment:
    """Device, versions, torch's thread count, load and the git commit, as fields of a JSON line.

    ``load`` is the machine's load average over one minute before the run (None on Windows): where it is near or
    above the number of cores, times are not reliable, least of all with several threads. ``clocks``, in MHz, are
    those of a GPU, or the mean over CPU cores; they are read, never set. ``commit`` ends in "-dirty" where the
    checkout has uncommitted changes. Where linfast does not run from a checkout, or the checkout was copied without
    its history, it is what the variable LINFAST_COMMIT says, or None.
    """
    checkout = Path(linfast.__file__).resolve().parent.parent
    name, mhz = processor_name(), lines_after("/proc/cpuinfo", "cpu MHz")
    clocks = f"{sum(map(float, mhz)) / len(mhz):.0f} MHz" if mhz else None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
        clocks = command_output(*NVIDIA_SMI, f"--id={device.index or 0}", f"--query-gpu={query}")
    return {
        "device": name,
        "linfast": package_version("linfast"),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "numpy": package_version("numpy"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "clocks": clocks,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(checkout),
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """The rates of a large copy and a large matrix product, timed now.

    ``copy_bytes_per_s``: bytes read plus bytes written by a copy of a tensor much larger than the cache; inputs
    that fit in the cache can exceed it. ``matmul_<dtype>_per_s``: operations of an n x n x n product, 2 n^3, with
    torch's settings. Each is the best of many calls, so that other load on the machine does not lower it.
    """
    source = torch.randn(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    rates = {"copy_bytes_per_s": 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)}
    for name, n in _MATMUL[device.type].items():
        a, b = torch.randn(2, n, n, device=device).to(getattr(torch, name))
        rates[f"matmul_{name}_per_s"] = 2 * n**3 / _seconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    return rates


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def free_bytes(device: torch.device) -> float:
    """Bytes of free memory on the device; infinite where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = lines_after("/proc/meminfo", "MemAvailable")
    return 1024.0 * int(available[0].split()[0]) if available else float("inf")


def _commit(checkout: Path) -> str | None:
    git = ("git", "-C", str(checkout))
    top = command_output(*git, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout:
        return os.environ.get("LINFAST_COMMIT")
    commit = command_output(*git, "rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and command_output(*git, "status", "--porcelain") else commit
