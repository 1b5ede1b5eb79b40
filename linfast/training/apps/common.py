"""The part of a run that the applications share: device, split, training, files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import check_path
from ...dispatch import usable_device, uses_triton
from ...sampling.workers import Workers
from ..distributed import process_group
from ..objective import Objective
from ..trainer import Trainer, TrainSettings
from .output import CHECKPOINT, Output
from .report import Row, timed

__all__ = ["Run", "about", "held_out", "train"]

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
        overwrite: replace an earlier run's files in ``out``.
        progress: show how far it is.

    Raises:
        ValueError: resume and overwrite, or no name of a folder.
    """

    train: TrainSettings
    data: str | None = None
    out: str = "linfast-train"
    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if not self.out:
            raise ValueError(f"out must name a folder; got {self.out!r}")
        check_path("out", self.out, utf8=True)  # as the model in it is saved

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def output(self, *names: str) -> Output:
        """The files of these names in ``out``, refused as ``Output`` says."""
        return Output(self.folder, names, self.resume, self.overwrite)


def about(model: Any, data: Tensor, **more: object) -> dict[str, Any]:
    """What makes a run besides its TrainSettings: the model's and the loss's settings, and the data's digest.

    Numbers and strings, as checkpoints hold them.
    """
    digest = hashlib.sha256(data.contiguous().numpy().data).hexdigest()
    settings = {**asdict(model), "data": digest, **more}
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}


def held_out(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images to train on, and every tenth, or some 1000 evenly spread, to measure on: files may be sorted."""
    every = max(10, len(images) // _HELD_OUT)
    held = torch.zeros(len(images), dtype=torch.bool)
    held[every - 1 :: every] = True
    return images[~held], images[held]


def train(
    run: Run, output: Output, build: Callable[[torch.device], Objective], about: dict[str, Any], folder: str = ""
) -> tuple[Trainer, Row] | None:
    """Train what ``build`` makes, under torchrun's processes where there are several.

    Args:
        output: the run's files, begun here.
        about: what the checkpoint remembers, as for ``Trainer``.
        folder: below ``run.out``, of the checkpoint.

    Returns:
        The trainer and its row for the table; None in all processes but the first.
    """
    with process_group(usable_device(run.device)) as device:
        torch.manual_seed(run.train.seed)
        checkpoint = run.folder / folder / CHECKPOINT
        trainer = Trainer(build(device), run.train, checkpoint, about)
        if run.resume and checkpoint.exists():
            trainer.resume()
        uses_triton(next(trainer.objective.model.parameters()))  # raises where a backend cannot run, as does draw
        trainer.objective.draw(torch.Generator(device), run.train.batch)  # where the data do not fill a batch
        workers = Workers.current()
        workers.by_first(output.begin)
        _, seconds = timed(lambda: trainer.run(run.progress))
        if workers.rank:
            return None
    steps, batch = run.train.steps, run.train.batch
    return trainer, (f"training, {steps} steps of {batch}", _last_losses(trainer), seconds)


def _last_losses(trainer: Trainer) -> str:
    """The mean loss of the last tenth of the steps."""
    losses = torch.stack(list(trainer.history.values())[:-1]).sum(0)
    return f"loss {losses[-max(1, len(losses) // 10) :].mean():.4f}"
