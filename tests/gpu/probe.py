"""The first process of bench/gpu.sh: prints the machine as one line of JSON, then versions and peak rates."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
from typing import Any

_FRACTION = 0.75  # share of the memory for this process, to test whether torch enforces it
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{_FRACTION}"

import torch  # noqa: E402
from linfast.bench.cases import CASES  # noqa: E402
from linfast.bench.environment import ceilings, describe  # noqa: E402

from linfast import kernels  # noqa: E402
from tests.gpu import smoke  # noqa: E402


def machine() -> dict[str, Any]:
    """The fields of bench.gpu.stages.Machine."""
    found: dict[str, Any] = {"ops": list(smoke.NAMES), "cases": list(CASES), "kernels": kernel_names()}
    if not torch.cuda.is_available():
        return found | {"name": "torch finds no GPU"}
    free, total = torch.cuda.mem_get_info()
    capped = abs(torch.cuda.get_per_process_memory_fraction() - _FRACTION) < 1e-6
    found |= {"device": "cuda", "name": torch.cuda.get_device_name(), "capped": capped}
    return found | {"free_gib": free / 2**30, "total_gib": total / 2**30}


def kernel_names() -> list[str]:
    """Every @triton.jit function of linfast.kernels, by its name on the GPU."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)
    ]
    return sorted({
        name for module in modules for name, value in vars(module).items()
        if hasattr(value, "fn") and value.fn.__module__ == module.__name__
    })  # fmt: skip


def main() -> None:
    """Print all of it."""
    print(json.dumps({"probe": machine()}), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for key, value in {**describe(device), **ceilings(device)}.items():
        print(f"{key}: {value}", flush=True)
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,TEMPERATURE,PERFORMANCE"])


if __name__ == "__main__":
    main()
