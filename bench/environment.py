"""Where and with what a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import linfast

__all__ = ["Environment", "describe"]


Environment = Mapping[str, str | float | None]


def describe(device: torch.device) -> Environment:
    """Device, versions, torch's thread count, load and the git commit, as fields of a JSON line.

    ``load`` is the machine's one-minute load average before the run (None on Windows):
    near or above the number of cores, times say little, most of all with several threads.
    ``clocks`` are as found, never set: SM and memory of a GPU, or the mean of the cores, in MHz.
    ``commit`` ends in "-dirty" where the checkout has uncommitted changes, and is None
    where linfast does not run from a checkout.
    """
    return {
        "device": _device_name(device),
        "linfast": _version("linfast"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "clocks": _clocks(device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(Path(linfast.__file__).resolve().parent.parent),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = _cpuinfo("model name")
    return models[0] if models else platform.processor() or platform.machine()


def _cpuinfo(key: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _clocks(device: torch.device) -> str | None:
    if device.type == "cuda":
        query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
        return _output("nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={query}", "--format=csv,noheader")
    mhz = [float(value) for value in _cpuinfo("cpu MHz")]
    return f"{sum(mhz) / len(mhz):.0f} MHz" if mhz else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    top = _git(checkout, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout:
        return None
    commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and _git(checkout, "status", "--porcelain") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(folder), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
