"""``linfast demo``: ``linfast train one-step`` on small digits, with settings that need no choosing."""

from __future__ import annotations

from typing import Any

from linfast.linearizer import Linearizer

from .one_step import OneStepModel, run_one_step
from .runs import Run
from .trainer import TrainSettings

__all__ = ["run_demo"]

# Full: recognisable digits within 3 minutes on 2 cores. Quick: everything runs, in under 20 s.
_FULL = (OneStepModel(), 2000)
_QUICK = (OneStepModel(depth=4, hidden=64, rank=8), 150)


def run_demo(quick: bool = False, seed: int = 0, **where: Any) -> Linearizer | None:
    """Train, measure, write ``figure.png`` and ``model.safetensors``, print the table, as ``run_one_step`` does.

    ``where`` are arguments of ``Run``.
    """
    model, steps = _QUICK if quick else _FULL
    return run_one_step(Run(TrainSettings(steps=steps, seed=seed), **where), model)
