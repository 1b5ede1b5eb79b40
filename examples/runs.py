"""What the applications share: where a run reads and writes, its files, and its training."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linfast._command import refuse_existing
from linfast.checks import check_path
from linfast.dispatch import usable_device, uses_triton
from linfast.sampling.outputs import lock
from linfast.sampling.workers import Workers, process_group
from linfast.training import Objective

from .report import Row, timed
from .trainer import Trainer, TrainSettings

__all__ = ["CHECKPOINT", "Output", "Run", "about", "train"]

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes, and how it trains.

    Attributes:
        train: the settings of the loop.
        data: file or folder of the application's data.
        out: folder to write to.
        device: "cpu", "cuda", ...
        resume: go on from the checkpoint in ``out``.
        overwrite: replace an earlier run's files in ``out``.
        progress: whether to show how far it is.

    Raises:
        ValueError: resume and overwrite together, or an ``out`` that cannot be a folder's name.
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

    def output(self, *names: str) -> closing[Output]:
        """A block with the files of these names in ``out``, at whose end the folder is given back."""
        return closing(Output(self.folder, names, self.resume, self.overwrite))


class Output:
    """The files that a training writes. Made before any work; begun when all that can be checked has been.

    Args:
        folder: to write to.
        names: of the files, relative to the folder; a checkpoint lies beside its model.
        resume: go on with the run whose checkpoints are there.
        overwrite: replace an earlier run.

    Raises:
        FileExistsError: one of the files is there, and neither ``resume`` nor ``overwrite``; or ``resume``, and it
            is a model without a checkpoint; or something that is not a file has such a name.
        FileNotFoundError: nothing to resume from.
        NotADirectoryError: the folder is something else.
    """

    def __init__(self, folder: Path, names: Sequence[str], resume: bool, overwrite: bool) -> None:
        self.folder, self.paths = folder, [folder / name for name in names]
        self.resume, self.overwrite = resume, overwrite
        self._locked: int | None = None
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is no folder")
        for path in self.paths:
            if path.exists() and not path.is_file():
                raise FileExistsError(f"{path} exists and is no file that could be replaced: move it")
        if self.resume:
            checkpoints = [path for path in self.paths if path.name == CHECKPOINT]
            missing = [path.parent for path in checkpoints if not os.path.lexists(path)]
            if len(missing) == len(checkpoints):
                raise FileNotFoundError(f"{checkpoints[0]}: no checkpoint to resume from")
            ways = "of another run than the one to resume; --overwrite replaces it"
            refuse_existing((path for path in self.paths if path.parent in missing), ways)
        elif not self.overwrite:
            refuse_existing(self.paths)

    def begin(self) -> None:
        """Take the folder, in the first process alone: from here on files may be written.

        What a killed run left half-written is removed, and with ``overwrite`` all of the earlier run's files.

        Raises:
            BlockingIOError: another run writes there.
            OSError: it cannot be written to.
        """
        if self._locked is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locked = os.open(self.folder, os.O_RDONLY)
        lock(self._locked, str(self.folder))  # type: ignore[arg-type]  # a descriptor will do
        self._refuse_existing()  # another run may have ended meanwhile
        tempfile.TemporaryFile(dir=self.folder).close()
        for path in self.paths:
            for partial in path.parent.glob(f"{path.name}*.partial"):
                partial.unlink()
            if self.overwrite:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the folder back."""
        if self._locked is not None:
            os.close(self._locked)


def about(model: Any, data: Tensor, **more: object) -> dict[str, Any]:
    """What makes a run besides its TrainSettings: the settings of model and loss, and a digest of the data.

    Numbers and strings, as checkpoints hold them.
    """
    digest = hashlib.sha256(data.contiguous().numpy().data).hexdigest()
    return {**asdict(model), "data": digest, **more}


def train(
    run: Run, output: Output, build: Callable[[torch.device], Objective], about: dict[str, Any], folder: str = ""
) -> tuple[Trainer, Row] | None:
    """Train what ``build`` makes, under torchrun's processes where there are several.

    Args:
        output: the run's files, begun here.
        about: what the checkpoint remembers, as for ``Trainer``.
        folder: of the checkpoint, relative to ``run.out``.

    Returns:
        The trainer and its row of the table; None in all processes but the first.

    Raises:
        ValueError, FileNotFoundError: unusable data, device or options, before any work.
        FileExistsError: an earlier run's files in ``run.out``, and neither ``resume`` nor ``overwrite``.
        NonFiniteLoss: as for ``Trainer.run``.
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
    losses = torch.stack(list(trainer.history.values())[:-1]).sum(0)
    last = losses[-max(1, len(losses) // 10) :].mean()
    return trainer, (f"training, {run.train.steps} steps of {run.train.batch}", f"loss {last:.4f}", seconds)
