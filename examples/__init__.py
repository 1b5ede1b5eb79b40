"""Training of the paper's three applications: the trainer, the commands of ``linfast train``, and the demo.

Each application is one file that builds, trains, measures, plots and saves: ``one_step``, ``ign``, ``style``.
"""

from .commands import run_demo
from .ign import IdempotentModel, run_ign
from .one_step import OneStepModel, run_one_step
from .runs import Run
from .style import StyleModel, run_style
from .trainer import NonFiniteLoss, Trainer, TrainSettings

__all__ = [
    "IdempotentModel",
    "NonFiniteLoss",
    "OneStepModel",
    "Run",
    "StyleModel",
    "TrainSettings",
    "Trainer",
    "run_demo",
    "run_ign",
    "run_one_step",
    "run_style",
]
