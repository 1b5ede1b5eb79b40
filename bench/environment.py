"""The machine, versions and commit of a measurement, and the machine's peak rates."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import linfast

Environment = Mapping[str, str | float | None]

_COPY_BYTES = {"cpu": 2**26, "cuda": 2**31}  # on a CPU a call then ends within one time slice
_MATMUL = {"cpu": {"float32": 512}, "cuda": {"float32": 8192, "bfloat16": 8192}}
_REPEATS = 25


def describe(device: torch.device) -> Environment:
    """Device, versions, torch's thread count, load and the git commit, as fields of a JSON line.

    ``load`` is the machine's load average over one minute before the run (None on Windows): where it is near or
    above the number of cores, times are not reliable, least of all with several threads. ``clocks``, in MHz, are
    those of a GPU, or the mean over CPU cores; they are read, never set. ``commit`` ends in "-dirty" where the
    checkout has uncommitted changes, and is None where linfast does not run from a checkout.
    """
    checkout = Path(linfast.__file__).resolve().parent.parent
    models, mhz = _lines("/proc/cpuinfo", "model name"), _lines("/proc/cpuinfo", "cpu MHz")
    name = models[0] if models else platform.processor() or platform.machine()
    clocks = f"{sum(map(float, mhz)) / len(mhz):.0f} MHz" if mhz else None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
        clocks = _output("nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={query}", "--format=csv,noheader")
    return {
        "device": name,
        "linfast": _version("linfast"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
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
    available = _lines("/proc/meminfo", "MemAvailable")
    return 1024.0 * int(available[0].split()[0]) if available else float("inf")


def _lines(path: str, key: str) -> list[str]:
    """The text after the colon in each line of the file that begins with ``key``."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    git = ("git", "-C", str(checkout))
    top = _output(*git, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout:
        return None
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and _output(*git, "status", "--porcelain") else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
