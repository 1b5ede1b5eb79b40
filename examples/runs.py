"""Common to the applications: a run's files and device, its training, and the table and figures at its end."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfast._command import refuse_existing
from linfast.checks import check_path
from linfast.dispatch import usable_device, uses_triton
from linfast.io import save, written_whole
from linfast.sampling.outputs import lock
from linfast.sampling.workers import Workers, process_group
from linfast.tables import aligned
from linfast.training import Objective

from .trainer import Trainer, TrainSettings

__all__ = ["CHECKPOINT", "Job", "Output", "Row", "Run", "Strip", "about", "psnr", "show", "timed", "trained"]

CHECKPOINT, MODEL = "checkpoint.pt", "model.safetensors"
Row = tuple[str, str, float | None]  # what was done, the value found, the seconds it took
Strip = tuple[str, Tensor]  # a label, and images [n, C, H, W] in [-1, 1]
_Result = TypeVar("_Result")
_WIDTH, _IMAGES, _GAP = 10.0, 8.2, 0.12  # inches: a figure, the images of a row, between two rows


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes, and how it trains.

    Raises:
        ValueError: resume and overwrite together, or an ``out`` that cannot be a folder's name.
    """

    train: TrainSettings
    data: str | None = None  # file or folder of the application's data
    out: str = "linfast-train"  # folder to write to
    device: str = "cpu"
    resume: bool = False  # go on from the checkpoint in ``out``
    overwrite: bool = False  # replace an earlier run's files in ``out``
    progress: bool = True  # show the progress of training

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if not self.out:
            raise ValueError(f"out must name a folder; got {self.out!r}")
        check_path("out", self.out, utf8=True)  # ``save`` needs a path in UTF-8

    @property
    def folder(self) -> Path:
        return Path(self.out)


class Output:
    """The files that a run writes, by names relative to its folder; a checkpoint is in the folder of its model.

    The constructor refuses existing files before any work; ``begin``, after all other checks, locks the folder.

    Raises:
        FileExistsError: one of the files exists without ``resume`` or ``overwrite``; with ``resume``, there is a
            model without a checkpoint; or one of the names is taken by something that is not a file.
        FileNotFoundError: with ``resume``, there is no checkpoint.
        NotADirectoryError: the folder is not a folder.
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
        """Lock the folder, in the first process alone; afterwards files may be written.

        Half-written files of a killed run are removed, and with ``overwrite`` all files of the earlier run.
        BlockingIOError where another run has locked the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locked = os.open(self.folder, os.O_RDONLY)
        lock(self._locked, str(self.folder))  # type: ignore[arg-type]  # a descriptor will do
        self._refuse_existing()  # again: another run may have written files meanwhile
        tempfile.TemporaryFile(dir=self.folder).close()
        for path in self.paths:
            for partial in path.parent.glob(f"{path.name}*.partial"):
                partial.unlink()
            if self.overwrite:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock the folder."""
        if self._locked is not None:
            os.close(self._locked)


def about(model: Any, data: Tensor, **more: object) -> dict[str, Any]:
    """What defines a run besides its TrainSettings, for its checkpoint: model, loss, and a digest of the data."""
    digest = hashlib.sha256(data.contiguous().numpy().data).hexdigest()
    return {**asdict(model), "data": digest, **more}


class Job(NamedTuple):
    """One training of a run: a function that makes its objective on a device, and ``about`` for its checkpoint."""

    build: Callable[[torch.device], Objective]
    about: dict[str, Any]


@contextmanager
def trained(run: Run, figures: Sequence[str], jobs: Mapping[str, Job]) -> Iterator[list[tuple[nn.Module, Row]]]:
    """Train and save each job's model; a context with [(model, its row of the table)] and the folder locked.

    Under torchrun the processes train together, and all but the first get an empty list.

    Args:
        figures: files that will be written to ``run.out`` inside the context.
        jobs: by the folder of their model and checkpoint, relative to ``run.out``.

    Raises:
        ValueError, FileNotFoundError: unusable data, device or options, before any work.
        FileExistsError: ``run.out`` has files of an earlier run, without ``resume`` or ``overwrite``.
        NonFiniteLoss: as for ``Trainer.run``.
    """
    names = [*figures, *(os.path.join(folder, name) for folder in jobs for name in (MODEL, CHECKPOINT))]
    with closing(Output(run.folder, names, run.resume, run.overwrite)) as output:
        with process_group(usable_device(run.device)) as device:
            trainers = {run.folder / folder: _trainer(run, job, device, folder) for folder, job in jobs.items()}
            workers = Workers.current()
            workers.by_first(output.begin)
            found = [_train(run, trainer, folder) for folder, trainer in trainers.items()]
        yield [] if workers.rank else found


def _trainer(run: Run, job: Job, device: torch.device, folder: str) -> Trainer:
    """The job's Trainer, resumed if ``run.resume``, after all checks that can be made before any work."""
    torch.manual_seed(run.train.seed)
    checkpoint = run.folder / folder / CHECKPOINT
    trainer = Trainer(job.build(device), run.train, checkpoint, job.about)
    if run.resume and checkpoint.exists():
        trainer.resume()
    uses_triton(next(trainer.objective.model.parameters()))  # raises where the backend cannot run
    trainer.objective.draw(torch.Generator(device), run.train.batch)  # raises for too few data
    return trainer


def _train(run: Run, trainer: Trainer, folder: Path) -> tuple[nn.Module, Row]:
    """The trained model, saved to this folder, and its row of the table."""
    model, seconds = timed(lambda: trainer.run(run.progress))
    if not trainer.workers.rank:
        save(model, folder / MODEL)
    losses = torch.stack(list(trainer.history.values())[:-1]).sum(0)
    last = losses[-max(1, len(losses) // 10) :].mean()
    return model, (f"training, {run.train.steps} steps of {run.train.batch}", f"loss {last:.4f}", seconds)


def timed(call: Callable[[], _Result], tries: int = 1) -> tuple[_Result, float]:
    """The result and the seconds it took, in the fastest of the tries."""
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return float(-10 * torch.log10(((image - reference) / 2).square().mean()))


def show(run: Run, rows: Sequence[Row], figures: Mapping[str, Sequence[Strip]], models: str = MODEL) -> None:
    """Write the figures by their names, print the rows as a table, and say where figures and models are."""
    for name, strips in figures.items():
        save_strips(strips, run.folder / name)
    lines = [(what, value, "" if seconds is None else f"{seconds:.4f}") for what, value, seconds in rows]
    print(aligned([("", "", "seconds"), *lines], numeric=2))
    print(f"figures: {', '.join(str(run.folder / name) for name in figures)}\nmodels:  {run.folder / models}")


def save_strips(strips: Sequence[Strip], path: Path, dpi: int = 120) -> None:
    """Write one PNG with one row per strip: its label, then its images side by side."""
    from matplotlib.figure import Figure

    columns = max(len(images) for _, images in strips)
    height, width = strips[0][1].shape[-2:]
    row = _IMAGES * height / (columns * width) + _GAP
    figure = Figure(figsize=(_WIDTH, len(strips) * row), layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, strips, strict=True):
        separated = F.pad(images.detach().float().cpu().clamp(-1, 1), (0, 1), value=1.0)
        filled = F.pad(separated, (0, 0, 0, 0, 0, 0, 0, columns - len(images)), value=1.0)
        picture = (filled.permute(2, 0, 3, 1).flatten(1, 2)[:, :-1] + 1) / 2  # [H, columns (W + 1) - 1, C]
        axis.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        shown = label.encode(errors="backslashreplace").decode()  # names of files may not be text, or hold a $
        axis.set_ylabel(shown, rotation=0, ha="right", va="center", fontsize=11, parse_math=False)
        axis.set(xticks=[], yticks=[], frame_on=False)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi, bbox_inches="tight")
