"""What a bug report needs: versions, processor, GPUs, and which code and precision linfast would use on them.

What cannot be read, such as a GPU whose driver is broken, is reported with the reason. Neither a GPU nor Triton is
needed.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from ._version import __version__
from .dispatch import chosen_backend, why_reference
from .precision import resolve_precision
from .tables import aligned

NVIDIA_SMI = ("nvidia-smi", "--format=csv,noheader")
_VARIABLES = ("LINFAST_", "TRITON_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def info() -> str:
    """The report of ``linfast info``: one fact per line, after its name."""
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that it cannot use
        warnings.simplefilter("always")
        rows = [(name, fact) for name, facts in _FACTS.items() for fact in _readable(facts)]
    rows += [("warning", str(warning.message)) for warning in caught]
    return aligned([(name, " ".join(fact.split())) for name, fact in rows])


def _readable(facts: Callable[[], Iterable[str]]) -> Iterator[str]:
    """The facts, up to the first that cannot be read."""
    try:
        yield from facts()
    except Exception as error:
        yield f"cannot be read: {type(error).__name__}: {error}"


def _torch() -> Iterator[str]:
    hip, cuda = torch.version.hip, torch.version.cuda
    yield f"{torch.__version__}, built for {f'ROCm {hip}' if hip else f'CUDA {cuda}' if cuda else 'CPUs only'}"


def _optional() -> Iterator[str]:
    """The installed packages of each extra, such as ``demo``, that linfast's metadata names."""
    extras: dict[str, list[str]] = {}
    for requirement in requires("linfast") or ():
        found = re.match(r"([\w.-]+).*extra == ['\"](.+)['\"]", requirement)
        if found and found[1] != "linfast":
            extras.setdefault(found[2], []).append(found[1])
    for extra, packages in extras.items():
        installed = [f"{name} {package_version(name)}" for name in packages if package_version(name)]
        yield f"{extra}: {', '.join(installed) or 'none installed'}"


def _processor() -> Iterator[str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{os.cpu_count()} logical cores, {usable} of them usable"
    yield f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, {cores}"


def _threads() -> Iterator[str]:
    yield f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} for several at once"


def _gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        architecture = f" ({gpu.gcnArchName})" if torch.version.hip else ""
        capability = f"compute capability {gpu.major}.{gpu.minor}{architecture}"
        yield f"{index}: {gpu.name}, {capability}, {gpu.total_memory / 2**30:.1f} GiB"
    if not torch.cuda.device_count():
        yield "torch finds none"


def _drivers() -> Iterator[str]:
    found = command_output(*NVIDIA_SMI, "--query-gpu=driver_version")
    yield from sorted(set(found.split())) if found else _drivers_of_files()


def _drivers_of_files() -> list[str]:
    """The versions of loaded kernel modules: they can be read where nvidia-smi fails or is missing."""
    amd = Path("/sys/module/amdgpu/version")
    found = lines_after("/proc/driver/nvidia/version", "NVRM version")
    return found + ([f"amdgpu {amd.read_text()}"] if amd.exists() else []) or ["none found"]


def _backends() -> Iterator[str]:
    devices = filter(None, (torch.accelerator.current_accelerator(check_available=True), torch.device("cpu")))
    yield from (f"{chosen_backend()}; on {device}: {_what_runs(device)}" for device in devices)


def _what_runs(device: torch.device) -> str:
    try:
        why = why_reference(torch.empty(0, device=device))
    except RuntimeError as error:  # the backend cannot run here, or the GPU refuses a tensor
        return f"cannot run: {error}"
    return f"plain torch ({why})" if why else "Triton kernels"


def _precision() -> Iterator[str]:
    mode, setting = resolve_precision(torch.empty(0)), torch.get_float32_matmul_precision()
    yield f"{mode} for float32 in kernels (float32_matmul_precision is {setting!r})"


def _environment() -> list[str]:
    names = sorted(name for name in os.environ if name.startswith(_VARIABLES))
    return [f"{name}={os.environ[name]}" for name in names] or ["no variable that changes linfast is set"]


def _package(name: str) -> Callable[[], list[str]]:
    return lambda: [package_version(name) or "not installed"]


_FACTS: dict[str, Callable[[], Iterable[str]]] = {
    "linfast": lambda: [__version__],
    "python": lambda: [f"{platform.python_version()} ({platform.python_implementation()})"],
    "torch": _torch,
    "triton": _package("triton"),
    "numpy": _package("numpy"),
    "safetensors": _package("safetensors"),
    "optional": _optional,
    "platform": lambda: [platform.platform()],
    "processor": _processor,
    "threads": _threads,
    "GPU": _gpus,
    "GPU driver": _drivers,
    "backend": _backends,
    "precision": _precision,
    "environment": _environment,
}


# What a benchmark records too


def package_version(name: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's model where the system tells it, otherwise its architecture."""
    models = lines_after("/proc/cpuinfo", "model name")
    return models[0] if models else platform.processor() or platform.machine()


def lines_after(path: str, key: str) -> list[str]:
    """The text after the colon in each line of the file that begins with ``key``; none where there is no file."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def command_output(*command: str) -> str | None:
    """What the command prints; None where it is missing, fails or takes more than 30 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
