"""linfast's image Linearizer beside the reference repository's, with the same weights, on the CPU.

    python -m linfast.bench.reference_images PATH --config mnist --batch 16 64

PATH is a checkout of github.com/assafshocher/Linearizer, which is imported and not changed. First the
outputs and the input's gradient are compared (truth: the reference in float64), then operations are counted,
then both are timed in turns in one process on one thread. The float64 runs leave the allocator with larger
thresholds, so that fewer pages fault later: that favours the reference, whose attention weights are large.

Operations: what reaches a backend below autograd, without views and allocations; on a GPU each would be
one launch or more. linfast's group_norm and silu are two here and one on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf

CONFIGS = {"mnist": (1, 32), "celeba": (3, 64)}
LAYERS, RANK, TIME_FEATURES = 2, 8, 128
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


def compare(f: Any, h: Any, x: Tensor, t: Tensor) -> None:
    """Relative L2 distance of every output from the reference's in float64, ours and its own."""

    def results(model: Any, *given: Tensor) -> dict[str, Tensor]:
        x, t = given
        model.zero_grad()
        x = x.clone().requires_grad_()
        out = {"f": model(x, t=t), "gx": model.gx(x), "gy": model.gy(x), "gx_inverse": model.gx_inverse(x)}
        out["gy_inverse"] = model.gy_inverse(x)
        sum(value.square().mean() for value in out.values()).backward()
        assert x.grad is not None
        return {**out, "gradient of x": x.grad}

    ours, own = results(h, x, t), results(f, x, t)
    truth = results(f.double(), x.double(), t.double())
    f.float()
    for name, value in truth.items():
        errors = [float((r[name].double() - value).norm() / value.norm()) for r in (ours, own)]
        print(f"{name:14s} linfast {errors[0]:.1e}   reference in fp32 {errors[1]:.1e}")


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


def interleaved(runs: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[float, float]]:
    """Median (wall, CPU) seconds of each, run in turns."""
    taken: list[list[tuple[float, float]]] = [[] for _ in runs]
    for i in range(repeats + 1):
        for run, times in zip(runs, taken, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if i:
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [(statistics.median(w for w, _ in times), statistics.median(c for _, c in times)) for times in taken]


def step(model: Any, x: Tensor) -> None:
    """One backward pass of a loss on g's latents."""
    model.zero_grad(set_to_none=True)
    model.gx(x).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--config", choices=CONFIGS, default="mnist")
    parser.add_argument("--batch", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    channels, side = CONFIGS[arguments.config]
    f = reference_model(arguments.path, channels, side)
    h = lf.from_reference(f)
    compare(f, h, torch.randn(2, channels, side, side), torch.rand(2))

    for batch in arguments.batch:
        _measure(f, h, torch.randn(batch, channels, side, side), arguments.repeats)
    with torch.no_grad():
        for label, model in (("reference", f), ("linfast", h)):
            counts = operations(functools.partial(model.gx, torch.randn(2, channels, side, side)))
            print(f"operations of g forward, {label}: {counts.total()}  {dict(counts.most_common(14))}")


def _measure(f: Any, h: Any, x: Tensor, repeats: int) -> None:
    with torch.no_grad():
        z = f.gx(x)
        _print("forward", len(x), [functools.partial(m.gx, x) for m in (f, h)], repeats)
        _print("inverse", len(x), [functools.partial(m.gx_inverse, z) for m in (f, h)], repeats)
    f.train(), h.train()
    _print("training step", len(x), [functools.partial(step, m, x) for m in (f, h)], repeats)
    f.eval(), h.eval()


def _print(name: str, batch: int, pair: Sequence[Callable[[], Any]], repeats: int) -> None:
    (wall, cpu), (own_wall, own_cpu) = interleaved(pair, repeats)
    print(
        f"{name}, batch {batch}: reference {wall * 1e3:.0f} ms, linfast {own_wall * 1e3:.0f} ms, "
        f"ratio {wall / own_wall:.2f} (CPU time {cpu / own_cpu:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
