"""The reference repository's MNIST model as it is and accelerated in place, on the CPU, in one process and thread.

    python -m linfast.bench.reference_accelerate PATH [--batch 64] [--rounds 7] [--limit-gib 9]

PATH is a checkout of github.com/assafshocher/Linearizer, which is imported and not changed. In turn:

    training step   of the model as built: its FlowMatcher's loss with MSE for LPIPS, whose weights are not at
                    hand, backward and Adam; median time and peak bytes of tensors: the original, memory="store"
                    and memory="invert"
    losses          of 20 such steps of the model as built, against the original's; with weights far from zero they
                    part by rounding alone: the original's own, started 6e-8 off, are 7e-4 off after 8 steps
    one step        its sample_one_step(method="rk", T=100) at batch 16, collapse included: time, and the distance
                    from its multi-step sampler in float64
    latent part     at CelebA's size, N = 12288, r = 8, batch 16: z -> A_t z, forward and backward, under a limit of
                    the address space; the original makes B N x N matrices

Dropout is on while training, and the ActNorms are initialised. The other parts have no weight near zero.
"""

from __future__ import annotations

import argparse
import copy
import functools
import resource
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor

import linfast as lf

from .reference import CONFIGS, RANK, TIME_FEATURES, interleaved, reference_model
from .timing import peak_bytes

_STEPS, _ONE_STEP_BATCH, _T = 20, 16, 100
_LATENT_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit-gib", type=float, default=9.0)
    parser.add_argument("--only", choices=("training", "losses", "one-step", "latent"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, built = (reference_model(arguments.path, *CONFIGS["mnist"], as_built=which) for which in (False, True))
    parts = {
        "training": lambda: _training(built, arguments.batch, arguments.rounds),
        "losses": lambda: _losses(built),
        "one-step": lambda: _one_step(arguments.path, model, arguments.rounds),
        "latent": lambda: _latent(arguments.limit_gib),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            part()


def _variants(model: Any) -> dict[str, Any]:
    """Name -> the model as it is, and accelerated copies."""
    variants = {"original": model}
    for memory in ("store", "invert"):
        variants[memory] = copy.deepcopy(model)
        left = lf.accelerate(variants[memory], memory=memory).left
        assert not left, left
    return variants


def _loss(f: Any, x1: Tensor, noise: float = 0.3) -> Tensor:
    """The paper's, with MSE for LPIPS."""
    x0, t = torch.randn_like(x1), torch.rand(len(x1))
    z0, z1, at = f.gy(x0), f.gx(x1), t[:, None, None, None]
    predicted = f.A((1 - at) * z0 + at * z1, t=t)
    again = f.gy_inverse(z0 + noise * torch.randn_like(z0)), f.gx_inverse(z1 + noise * torch.randn_like(z1))
    pairs = ((predicted, z1), (again[0], x0), (again[1], x1), (f.gx_inverse(predicted), x1))
    return sum((F.mse_loss(a, b) for a, b in pairs), start=torch.zeros(()))


def _trainer(f: Any) -> Callable[[Tensor], Tensor]:
    """x -> the loss of one more Adam step on x."""
    f.train()
    optimizer = torch.optim.Adam(f.parameters(), 1e-4)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = _loss(f, x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _training(model: Any, batch: int, rounds: int) -> None:
    x = torch.rand(batch, *_shape("mnist"))
    steps = {name: _trainer(copy.deepcopy(f)) for name, f in _variants(model).items()}
    times = interleaved([functools.partial(step, x) for step in steps.values()], rounds)
    peaks = [peak_bytes(step, (x,), x.device) for step in steps.values()]
    for name, (wall, cpu), peak in zip(steps, times, peaks, strict=True):
        print(
            f"training step, batch {batch}, {name}: {wall:.2f} s ({wall / times[0][0]:.2f} of the original's; "
            f"CPU time {cpu / times[0][1]:.2f}), peak {peak / 2**20:.0f} MiB ({peak / peaks[0]:.3f})",
            flush=True,
        )


def _losses(model: Any) -> None:
    images = torch.rand(_STEPS, 4, *_shape("mnist"))
    losses = {}
    for name, f in _variants(model).items():
        step = _trainer(copy.deepcopy(f))
        torch.manual_seed(1)
        losses[name] = torch.stack([step(x) for x in images]).double()
    for name, own in losses.items():
        worst = ((own - losses["original"]) / losses["original"]).abs().max()
        print(
            f"losses of {_STEPS} Adam steps, {name}: {own[0]:.6f} to {own[-1]:.6f}, {worst:.1e} from the original's"
        )


def _one_step(path: str, model: Any, rounds: int) -> None:
    FlowMatcher = _flow_matcher(path)
    original = FlowMatcher(copy.deepcopy(model).eval())
    ours = FlowMatcher(copy.deepcopy(model).eval())
    assert not lf.accelerate(ours).left
    noise = torch.randn(_ONE_STEP_BATCH, *_shape("mnist"))
    runs: list[Callable[[], Tensor]]
    runs = [functools.partial(m.sample_one_step, noise, "cpu", "rk", _T) for m in (original, ours)]
    (wall, cpu), (own_wall, own_cpu) = interleaved(runs, max(2, rounds // 3))
    print(f"one step, batch {_ONE_STEP_BATCH}: original {wall:.2f} s, accelerated {own_wall:.2f} s, "
          f"{wall / own_wall:.1f} times (CPU time {cpu / own_cpu:.1f})")  # fmt: skip
    torch.set_default_dtype(torch.float64)  # of the times that the repository makes
    exact = FlowMatcher(copy.deepcopy(model).eval().double()).sample(noise.double(), "cpu", _T, "rk")
    torch.set_default_dtype(torch.float32)
    for name, run in zip(("original", "accelerated"), runs, strict=True):
        error = float((run().double() - exact).norm() / exact.norm())
        print(f"one step, {name}: {error:.1e} from the {_T}-step sampler in float64")


def _flow_matcher(path: str) -> Any:
    """The repository's class, without what its training script imports and this one does not use."""
    sys.path.append(f"{path}/one_step")
    for name in ("piq", "matplotlib", "matplotlib.pyplot", "torchvision", "torchvision.transforms"):
        sys.modules.setdefault(name, MagicMock())
    from one_step.train_one_step import FlowMatcher  # type: ignore[import-not-found]

    return FlowMatcher


def _latent(limit_gib: float) -> None:
    from one_step.modules.linear_network import TimeDependentLoRALinearLayer  # type: ignore[import-not-found]

    shape = _shape("celeba")
    n = shape[0] * shape[1] * shape[2]
    layer = TimeDependentLoRALinearLayer(n, RANK, TIME_FEATURES)
    z, t = torch.randn(_LATENT_BATCH, *shape, requires_grad=True), torch.rand(_LATENT_BATCH)
    print(f"latent part, N = {n}: the original's A_t alone is {4 * _LATENT_BATCH * n * n / 2**30:.1f} GiB")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(limit_gib * 2**30), limits[1]))
    try:
        for name in ("original", "accelerated"):
            if name == "accelerated":
                assert not lf.accelerate(layer).left
            _try_latent(name, layer, z, t, limit_gib)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _try_latent(name: str, layer: Any, z: Tensor, t: Tensor, limit_gib: float) -> None:
    def step(z: Tensor) -> Tensor:
        layer.zero_grad()
        loss = layer(z, t=t).square().mean()
        loss.backward()
        return loss.detach()

    start = time.perf_counter()
    try:
        step(z)
    except (RuntimeError, MemoryError) as error:
        print(f"latent part, {name}, {limit_gib:.0f} GiB of address space: {str(error).splitlines()[0]}")
        return
    seconds = time.perf_counter() - start
    peak = peak_bytes(step, (z,), z.device) / 2**20
    print(f"latent part, {name}, {limit_gib:.0f} GiB of address space: {seconds:.2f} s, peak {peak:.0f} MiB")


def _shape(config: str) -> tuple[int, int, int]:
    channels, side = CONFIGS[config]
    return channels, side, side


if __name__ == "__main__":
    main()
