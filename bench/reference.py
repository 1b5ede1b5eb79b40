"""The reference repository's image Linearizers for runs side by side: construction, counting, timing in turns."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf

from .timing import peak_bytes, time_interleaved

__all__ = [
    "CONFIGS",
    "RANK",
    "TIME_FEATURES",
    "interleaved",
    "launches",
    "operations",
    "reference_model",
    "step",
    "step_bytes",
]

CONFIGS = {"mnist": (1, 32), "celeba": (3, 64)}
LAYERS, RANK, TIME_FEATURES = 2, 8, 128  # a layer of the repository's is two blocks, of two couplings each
_LAST = {"conv1": 0.5, "proj": 0.5}
_LAST_CONV = 0.3
_NO_LAUNCH = ("empty", "new_empty", "detach", "_unsafe_view", "lift_fresh", "promote_types")


def reference_model(path: str, channels: int, side: int, as_built: bool = False) -> Any:
    """Its Linearizer with ActNorms initialised and no weight near zero: ``as_built``, the last ones are 1e-5."""
    sys.path.insert(0, path)
    from common.song__unet import creat_song_unet  # type: ignore[import-not-found]
    from one_step.modules.invertable_network import InverseUnet  # type: ignore[import-not-found]
    from one_step.modules.linear_network import TimeDependentLoRALinearLayer  # type: ignore[import-not-found]
    from one_step.modules.one_step_linearizer import OneStepLinearizer  # type: ignore[import-not-found]

    g = InverseUnet(LAYERS, channels, side, creat_song_unet)
    f = OneStepLinearizer(g, TimeDependentLoRALinearLayer(channels * side**2, RANK, TIME_FEATURES))
    with torch.no_grad():
        for name, module in f.named_modules():
            last = name.rpartition(".")[2]
            scale = _LAST_CONV if last.endswith("aux_conv") else _LAST.get(last)
            if scale is not None and not as_built:
                module.weight.normal_(std=scale / module.weight[0].numel() ** 0.5)
        f.gx(torch.randn(4, channels, side, side))
    return f.eval()


def step(g: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor) -> None:
    """The gradients of a loss on g's latents, from none."""
    for parameter in parameters:
        parameter.grad = None
    g(x).square().mean().backward()


def step_bytes(g: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor) -> int:
    """Bytes of tensors at the peak of a ``step``, the weights' gradients among them and the weights not."""
    for parameter in parameters:
        parameter.grad = None

    def call(x: Tensor) -> Tensor:
        step(g, parameters, x)
        return x

    return peak_bytes(call, (x,), x.device)


class _Operations(TorchDispatchMode):
    """Counts the operations that reach a backend, views and allocations left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(_NO_LAUNCH):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], object]) -> Counter[str]:
    """What ``run`` would launch, by name."""
    with _Operations() as mode:
        run()
    return mode.counts


def launches(run: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """(operations, Triton kernels launched) of ``run`` as on a GPU, both by name; the kernels are interpreted.

    For a process whose kernels are not loaded yet: Triton decides then whether they are interpreted.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    kernels, launch = Counter[str](), interpreter.GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        kernels[executor.fn.__name__] += 1
        return launch(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", counted), lf.backend("triton"):
        return operations(run), kernels


def interleaved(runs: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[float, float]]:
    """Median (wall, CPU) seconds of each, run in turns after one turn that is not counted."""
    timings = time_interleaved({str(i): run for i, run in enumerate(runs)}, rounds=repeats, warmup=1)
    return [(median(t.ms) / 1e3, median(t.cpu_ms) / 1e3) for t in timings.values()]
