"""The demo from start to end: load, train, measure, save, print."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..device import usable_device
from ..io import save
from .data import load_images
from .figure import save_figure
from .measure import Measured, measure
from .train import build, train

__all__ = ["DemoSettings", "run_demo"]


@dataclass(frozen=True)
class DemoSettings:
    """What ``linfast demo`` takes."""

    data: str | None = None
    out: str = "linfast-demo"
    seed: int = 0
    device: str = "cpu"
    quick: bool = False


@dataclass(frozen=True)
class _Size:
    depth: int
    hidden: int
    rank: int
    iterations: int


# Full: recognisable digits within 3 minutes on 2 cores. Quick: everything runs, in under 20 s.
_FULL = _Size(depth=6, hidden=192, rank=16, iterations=2000)
_QUICK = _Size(depth=4, hidden=64, rank=8, iterations=150)


def run_demo(settings: DemoSettings, progress: bool = True) -> Measured:
    """Train, measure, write ``figure.png`` and ``model.safetensors`` to ``settings.out``, print the table.

    Raises:
        ValueError, FileNotFoundError: unusable data or an unusable device, before any work.
    """
    images = load_images(settings.data).to(usable_device(settings.device))
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    size = _QUICK if settings.quick else _FULL
    torch.manual_seed(settings.seed)
    f = build(images[0].numel(), size.depth, size.hidden, size.rank).to(images.device)
    start = time.perf_counter()
    train(f, images, size.iterations, settings.seed, progress)
    training_s = time.perf_counter() - start
    measured = measure(f, images, count=64, seed=settings.seed)
    save_figure(measured, images.shape[-1], out / "figure.png")
    save(f, out / "model.safetensors")
    rows = ((f"training, {size.iterations} steps of 128", "", training_s), *measured.rows)
    print(_table(rows))
    print(f"figure: {out / 'figure.png'}\nmodel:  {out / 'model.safetensors'}")
    return measured


def _table(rows: tuple[tuple[str, str, float | None], ...]) -> str:
    wide = max(len(what) for what, _, _ in rows)
    middle = max(len(value) for _, value, _ in rows)
    lines = [f"{'':{wide}}  {'':{middle}}  {'seconds':>9}"]
    for what, value, seconds in rows:
        lines.append(f"{what:{wide}}  {value:{middle}}  {'' if seconds is None else f'{seconds:9.4f}'}")
    return "\n".join(line.rstrip() for line in lines)
