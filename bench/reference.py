"""The reference repository's image Linearizer against ours, on the CPU, called in turn in one process and thread.

    python -m linfast.bench.reference PATH --what compare times memory            # lf.from_reference
    python -m linfast.bench.reference PATH --what training one-step latent        # lf.accelerate

PATH is a checkout of github.com/assafshocher/Linearizer, which is imported and not changed.

compare     errors of the outputs and of the input's gradient against the reference in float64
times       forward, inverse and a training step of g. ``compare`` raises the allocator's thresholds, so that fewer
            page faults occur afterwards: that favours the reference, whose attention weights are large
memory      bytes of tensors at the peak of a training step of g, at the first batch size
training    a training step of the model as built (its FlowMatcher's loss with MSE instead of LPIPS, the backward,
            Adam): time and peak memory of the original, memory="store" and memory="invert"
one-step    sample_one_step(method="rk", T=100) at batch 16, collapse included: its time, and its relative error
            against the multi-step sampler in float64
latent      z -> A_t z at CelebA's size, N = 12288, r = 8, batch 16, forward and backward, with limited address
            space: the original forms B matrices of N x N

Dropout is on while training, and ActNorms are initialised. Only ``training`` has weights near zero.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import linfast as lf

from .rounding import relative_error
from .timing import peak_bytes, ratio, time_interleaved

MNIST, CELEBA = (1, 32, 32), (3, 64, 64)
CONFIGS = {"mnist": MNIST, "celeba": CELEBA}
LAYERS, RANK, TIME_FEATURES = 2, 8, 128  # a layer of the repository is two blocks of two couplings each
PARTS = ("compare", "times", "memory", "training", "one-step", "latent")  # the first three measure from_reference
_T, _BATCH, _LIMIT_GIB = 100, 16, 9.0
_SCALES = {"aux_conv": 0.3, "conv1": 0.5, "proj": 0.5}  # of a block's last weights, by name endings

Runs = Mapping[str, Callable[[], Any]]


def reference_model(path: str, shape: tuple[int, int, int] = MNIST, as_built: bool = False) -> Any:
    """The repository's Linearizer, ActNorms initialised; unless ``as_built``, no last weights are near zero."""
    sys.path.insert(0, path)
    from common.song__unet import creat_song_unet  # type: ignore[import-not-found]
    from one_step.modules.invertable_network import InverseUnet  # type: ignore[import-not-found]
    from one_step.modules.linear_network import TimeDependentLoRALinearLayer  # type: ignore[import-not-found]
    from one_step.modules.one_step_linearizer import OneStepLinearizer  # type: ignore[import-not-found]

    channels, side, _ = shape
    g = InverseUnet(LAYERS, channels, side, creat_song_unet)
    f = OneStepLinearizer(g, TimeDependentLoRALinearLayer(channels * side**2, RANK, TIME_FEATURES))
    with torch.no_grad():
        for name, module in f.named_modules():
            scale = next((s for end, s in _SCALES.items() if name.endswith(end)), None)
            if scale is not None and not as_built:
                module.weight.normal_(std=scale / module.weight[0].numel() ** 0.5)
        f.gx(torch.randn(4, *shape))
    return f.eval()


def step(g: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor) -> None:
    """Compute the gradients of a loss on g's latents, without adding them to earlier ones."""
    for parameter in parameters:
        parameter.grad = None
    g(x).square().mean().backward()


def step_bytes(g: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor) -> int:
    """Bytes of tensors at the peak of a ``step``, with the gradients of the weights but without the weights."""
    for parameter in parameters:
        parameter.grad = None
    return peak_bytes(lambda x: step(g, parameters, x), (x,), x.device)


def _say(what: str, runs: Runs, repeats: int, memory: bool = False) -> None:
    """Print the time of every run, with ``memory`` also its peak, and both as shares of the first run's."""
    timings = time_interleaved(runs, rounds=repeats, warmup=1)
    peaks = {name: peak_bytes(run, (), torch.device("cpu")) for name, run in runs.items()} if memory else {}
    first = next(iter(runs))
    for name, timing in timings.items():
        wall, cpu = (ratio(getattr(timing, of), getattr(timings[first], of)) for of in ("ms", "cpu_ms"))
        share = f", {wall:.2f} of the first (CPU time {cpu:.2f})" if name != first else ""
        peak = f", peak {peaks[name] / 2**20:.0f} MiB ({peaks[name] / peaks[first]:.3f})" if peaks else ""
        print(f"{what}, {name}: {median(timing.ms):.0f} ms{share}{peak}", flush=True)


# from_reference


def _compare(f: Any, h: Any, x: Tensor, t: Tensor) -> None:
    """Print how far our outputs and the reference's own are from the reference in float64, in relative L2."""

    def results(model: Any, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        x = x.clone().requires_grad_()
        out = {name: getattr(model, name)(x) for name in ("gx", "gy", "gx_inverse", "gy_inverse")}
        out["f"] = model(x, t=t)
        sum(value.square().mean() for value in out.values()).backward()
        assert x.grad is not None
        return {**{name: value.detach() for name, value in out.items()}, "gradient of x": x.grad}

    ours, own, truth = results(h, x, t), results(f, x, t), results(f.double(), x.double(), t.double())
    f.float()
    for name, value in truth.items():
        errors = [relative_error(result[name], value) for result in (ours, own)]
        print(f"{name:14s} linfast {errors[0]:.1e}   reference in fp32 {errors[1]:.1e}")


def _steps(measure: Callable[..., Any], f: Any, ours: Mapping[str, tuple[lf.Flow, Any]], x: Tensor) -> Runs:
    """``step`` or ``step_bytes`` of the reference's g, and of our flows, storing and inverting."""

    def of_ours(flow: lf.Flow, g: Any, memory: str) -> Any:
        flow.memory = memory
        return measure(g, list(flow.parameters()), x)

    runs = {"reference": functools.partial(measure, f.gx, list(f.parameters()), x)}
    for memory in ("store", "invert"):
        runs |= {f"{name}, {memory}": functools.partial(of_ours, *g, memory) for name, g in ours.items()}
    return runs


def _times(f: Any, h: Any, repeats: int, x: Tensor) -> None:
    """Time g's forward, inverse and training step, the last with activations stored and inverted."""
    with torch.no_grad():
        z, size = f.gx(x), f"batch {len(x)}"
        models = {"reference": f, "linfast": h}
        _say(f"forward, {size}", {n: functools.partial(m.gx, x) for n, m in models.items()}, repeats)
        _say(f"inverse, {size}", {n: functools.partial(m.gx_inverse, z) for n, m in models.items()}, repeats)
    f.train(), h.train()
    _say(f"training step, {size}", _steps(step, f, {"linfast": (h.g_x.bijection, h.gx)}, x), repeats)
    f.eval(), h.eval()


def _memory(f: Any, h: Any, x: Tensor) -> None:
    """Print the peak memory of a training step of g: the reference, ours with its weights, and ``image_flow``."""
    options = {"conditioner": "unet", "time_features": 16, "actnorm": True, "mix": "free"}
    own = lf.image_flow(*x.shape[1:3], 4 * LAYERS, **options)  # type: ignore[arg-type, call-arg]
    own(x, t=1.0)
    f.train(), h.train()
    ours = {"from_reference": (h.g_x.bijection, h.gx), "image_flow": (own, own.at(t=1.0))}
    sizes = {name: run() for name, run in _steps(step_bytes, f, ours, x).items()}
    for name, size in sizes.items():
        share = f"{size / sizes['reference']:.3f} of the reference"
        print(f"peak of a training step, batch {len(x)}, {name}: {size / 1e6:.1f} MB, {share}")
    print(f"the weights' gradients among it: {sum(p.nbytes for p in own.parameters()) / 1e6:.1f} MB (image_flow)")
    f.eval(), h.eval()


# accelerate


def _loss(f: Any, x1: Tensor) -> Tensor:
    """The paper's loss, with MSE in place of LPIPS."""
    x0, t = torch.randn_like(x1), torch.rand(len(x1))
    z0, z1, at = f.gy(x0), f.gx(x1), t[:, None, None, None]
    predicted = f.A((1 - at) * z0 + at * z1, t=t)
    again = f.gy_inverse(z0 + 0.3 * torch.randn_like(z0)), f.gx_inverse(z1 + 0.3 * torch.randn_like(z1))
    pairs = ((predicted, z1), (again[0], x0), (again[1], x1), (f.gx_inverse(predicted), x1))
    return sum((F.mse_loss(a, b) for a, b in pairs), start=torch.zeros(()))


def _training(model: Any, x: Tensor, repeats: int) -> None:
    """Time an Adam step on x, for the model as it is and for accelerated copies."""

    def step(f: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        _loss(f, x).backward()
        optimizer.step()

    steps: dict[str, Callable[[], None]] = {}
    for name in ("original", "store", "invert"):
        f = copy.deepcopy(model)
        assert name == "original" or not lf.accelerate(f, memory=name).left
        steps[name] = functools.partial(step, f.train(), torch.optim.Adam(f.parameters(), 1e-4))
    _say(f"training step, batch {len(x)}", steps, repeats, memory=True)


def _one_step(path: str, model: Any, repeats: int) -> None:
    sys.path.append(f"{path}/one_step")
    for name in ("piq", "matplotlib", "matplotlib.pyplot", "torchvision", "torchvision.transforms"):
        sys.modules.setdefault(name, mock.MagicMock())  # the script imports them, FlowMatcher needs none
    from one_step.train_one_step import FlowMatcher  # type: ignore[import-not-found]

    original, ours = (FlowMatcher(copy.deepcopy(model).eval()) for _ in range(2))
    assert not lf.accelerate(ours).left
    noise = torch.randn(_BATCH, *MNIST)
    runs = {
        name: functools.partial(m.sample_one_step, noise, "cpu", "rk", _T)
        for name, m in (("original", original), ("accelerated", ours))
    }
    _say(f"one step, batch {_BATCH}", runs, max(2, repeats // 3))
    torch.set_default_dtype(torch.float64)  # for times that the repository creates
    exact = FlowMatcher(copy.deepcopy(model).eval().double()).sample(noise.double(), "cpu", _T, "rk")
    torch.set_default_dtype(torch.float32)
    for name, run in runs.items():
        print(f"one step, {name}: {relative_error(run(), exact):.1e} from the {_T}-step sampler in float64")


def _latent() -> None:
    from one_step.modules.linear_network import TimeDependentLoRALinearLayer

    z, t = torch.randn(_BATCH, *CELEBA, requires_grad=True), torch.rand(_BATCH)
    layer = TimeDependentLoRALinearLayer(z[0].numel(), RANK, TIME_FEATURES)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(_LIMIT_GIB * 2**30), limits[1]))
    for name in ("original", "accelerated"):
        assert name == "original" or not lf.accelerate(layer).left
        start = time.perf_counter()
        try:
            peak = step_bytes(functools.partial(layer, t=t), list(layer.parameters()), z)
            found = f"{time.perf_counter() - start:.2f} s, peak {peak / 2**20:.0f} MiB"
        except (RuntimeError, MemoryError) as error:
            found = str(error).splitlines()[0]
        print(f"latent part, {name}, {_LIMIT_GIB:.0f} GiB of address space: {found}")
    resource.setrlimit(resource.RLIMIT_AS, limits)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--config", choices=CONFIGS, default="mnist", help="images for from_reference")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--what", choices=PARTS, nargs="+", default=PARTS[:3])
    options = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler logs its start and stop
    torch.set_num_threads(1)
    torch.manual_seed(0)
    f = reference_model(options.path, shape := CONFIGS[options.config])
    h = lf.from_reference(f)
    built = reference_model(options.path, as_built=True)
    batches = [torch.randn(batch, *shape) for batch in options.batch]
    parts: Runs = {
        "compare": lambda: _compare(f, h, batches[0][:2], torch.rand(2)),
        "times": lambda: [*map(functools.partial(_times, f, h, options.repeats), batches)],
        "memory": lambda: _memory(f, h, batches[0]),
        "training": lambda: _training(built, torch.rand(options.batch[-1], *MNIST), options.repeats),
        "one-step": lambda: _one_step(options.path, reference_model(options.path), options.repeats),
        "latent": _latent,
    }
    for name in options.what:
        parts[name]()


if __name__ == "__main__":
    main()
