"""The part of a run that the applications share: device, split, training, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...device import usable_device
from ..distributed import process_group, rank_and_size
from ..objective import Objective
from ..trainer import Trainer, TrainSettings
from .report import Row, timed

__all__ = ["Run", "held_out", "train"]

_HELD_OUT = 1000


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes, and how it trains.

    Attributes:
        train: the loop's settings.
        data: file or folder of the application's data.
        out: folder to write to.
        device: "cpu", "cuda", ...
        resume: go on from ``out``'s checkpoint.
        progress: show a bar.
    """

    train: TrainSettings
    data: str | None = None
    out: str = "linfast-train"
    device: str = "cpu"
    resume: bool = False
    progress: bool = True

    @property
    def folder(self) -> Path:
        return Path(self.out)


def held_out(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images to train on, and every tenth, or some 1000 evenly spread, to measure on: files may be sorted."""
    every = max(10, len(images) // _HELD_OUT)
    held = torch.zeros(len(images), dtype=torch.bool)
    held[every - 1 :: every] = True
    return images[~held], images[held]


def train(run: Run, build: Callable[[torch.device], Objective]) -> tuple[Trainer, Row] | None:
    """Train what ``build`` makes, under torchrun's processes where there are several.

    Returns:
        The trainer and its row for the table; None in all processes but the first.
    """
    with process_group(usable_device(run.device)) as device:
        torch.manual_seed(run.train.seed)
        trainer = Trainer(build(device), run.train, run.folder / "checkpoint.pt")
        if run.resume:
            trainer.resume()
        run.folder.mkdir(parents=True, exist_ok=True)
        _, seconds = timed(lambda: trainer.run(run.progress))
        if rank_and_size()[0]:
            return None
    steps, batch = run.train.steps, run.train.batch
    return trainer, (f"training, {steps} steps of {batch}", _last_losses(trainer), seconds)


def _last_losses(trainer: Trainer) -> str:
    """The mean loss of the last tenth of the steps."""
    losses = torch.stack(list(trainer.history.values())[:-1]).sum(0)
    return f"loss {losses[-max(1, len(losses) // 10) :].mean():.4f}"
