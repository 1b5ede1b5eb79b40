"""Where and with what a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["Environment", "describe"]


Environment = Mapping[str, str | float | None]


def describe(device: torch.device) -> Environment:
    """Device, versions, torch's thread count, load and the git commit, as fields of a JSON line.

    ``load`` is the machine's one-minute load average before the run (None on Windows):
    near or above the number of cores, times say little, most of all with several threads.
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
        "commit": _commit(Path(__file__).resolve().parent.parent),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


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
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
