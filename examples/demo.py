"""``linfast demo``: ``linfast train one-step`` on small digits, with settings that need no choosing."""

from __future__ import annotations

from dataclasses import dataclass

from linfast.linearizer import Linearizer

from .one_step import OneStepModel, run_one_step
from .runs import Run
from .trainer import TrainSettings

__all__ = ["DemoSettings", "run_demo"]


@dataclass(frozen=True)
class DemoSettings:
    """What ``linfast demo`` takes: as ``Run``, and ``quick``, a smaller model for fewer steps."""

    data: str | None = None
    out: str = "linfast-demo"
    seed: int = 0
    device: str = "cpu"
    quick: bool = False
    resume: bool = False
    overwrite: bool = False


# Full: recognisable digits within 3 minutes on 2 cores. Quick: everything runs, in under 20 s.
_FULL = (OneStepModel(), 2000)
_QUICK = (OneStepModel(depth=4, hidden=64, rank=8), 150)


def run_demo(settings: DemoSettings, progress: bool = True) -> Linearizer | None:
    """Train, measure, write ``figure.png`` and ``model.safetensors`` to ``settings.out``, print the table.

    Returns and raises what ``run_one_step`` does.
    """
    model, steps = _QUICK if settings.quick else _FULL
    train = TrainSettings(steps=steps, seed=settings.seed)
    where = (settings.data, settings.out, settings.device, settings.resume, settings.overwrite)
    return run_one_step(Run(train, *where, progress=progress), model)
