"""What the demo measures on a trained f: agreement, inversion, superposition, seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..linearizer import Linearizer
from ..sampling import generator, sample

__all__ = ["Measured", "measure"]

_Result = TypeVar("_Result")

_STEPS = 100
_INTERPOLATION_STEPS = 12


@dataclass(frozen=True)
class Measured:
    """Images [n, D] for the figure, and rows (what, value, seconds) for the table."""

    real: Tensor
    many_steps: Tensor
    one_step: Tensor
    reconstructed: Tensor
    interpolation: Tensor
    rows: tuple[tuple[str, str, float | None], ...]


@torch.no_grad()
def measure(f: Linearizer, images: Tensor, count: int, seed: int) -> Measured:
    """Sample, invert and interpolate with f; images [N, side, side] in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    real = images.flatten(1)[torch.randperm(len(images), generator=rng)[:count].to(images.device)]
    noise = torch.randn(count, real.shape[1], generator=rng).to(real)
    many, many_s = _timed(lambda: sample(f, noise, steps=_STEPS, one_step=False))
    one_step, collapse_s = _timed(lambda: generator(f, steps=_STEPS))
    one, one_s = _timed(lambda: one_step(noise))
    found, inversion_s = _timed(lambda: one_step.inverse(real))
    reconstructed = one_step(found)
    error, superposition_s = _timed(lambda: superposition_error(one_step, noise[: count // 2], noise[count // 2 :]))
    path = torch.linspace(0, 1, _INTERPOLATION_STEPS).to(real)
    ends = (real[0].expand(len(path), -1), real[1].expand(len(path), -1))
    return Measured(
        real=real,
        many_steps=many,
        one_step=one,
        reconstructed=reconstructed,
        interpolation=f.space_x.interpolate(*ends, path),
        rows=(
            (f"{_STEPS}-step sampling of {count}", "", many_s),
            ("collapsing the steps, once", "", collapse_s),
            (f"one-step sampling of {count}", f"{_psnr(one, many):.1f} dB PSNR to {_STEPS}-step", one_s),
            (
                f"inversion of {count} digits",
                f"{_psnr(reconstructed, real):.1f} dB PSNR after sampling",
                inversion_s,
            ),
            ("superposition in the induced spaces", f"{error:.1e} relative error", superposition_s),
        ),
    )


def superposition_error(f: Linearizer, u: Tensor, v: Tensor, a: float = 0.7, b: float = -0.4) -> float:
    """|f(a u (+) b v) - (a f(u) (+) b f(v))| / |f(a u (+) b v)|, sums and multiples of the induced spaces."""
    x, y = f.space_x, f.space_y
    mixed = f(x.add(x.scale(a, u), x.scale(b, v)))
    apart = y.add(y.scale(a, f(u)), y.scale(b, f(v)))
    return float((mixed - apart).norm() / mixed.norm())


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images whose range is [-1, 1]."""
    return float(-10 * torch.log10(((image - reference) / 2).square().mean()))
