"""The commands that the soak kills, and the files that must be equal at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["TRAININGS", "Job", "differences", "sampling", "training"]

# The arguments of train commands, with different files and checkpoint contents.
_SMALL = ["--depth", "2", "--hidden", "16", "--batch", "32", "--checkpoint-every", "5"]
_ONE_STEP = ["one-step", *_SMALL, "--rank", "2", "--time-hidden", "16", "--steps"]
TRAININGS = {
    "one-step": [*_ONE_STEP, "600"],
    "one-step, averaged": [*_ONE_STEP, "400", "--ema", "0.9", "--separate", "--seed", "1"],
    "ign, two weights": ["ign", *_SMALL, "--denoising", "0", "1", "--steps", "300"],
}


@dataclass(frozen=True)
class Job:
    """One command, the command that resumes it, and its files.

    Attributes:
        first, again: arguments of linfast; the second resumes an existing run.
        begun: the file that exists once the command has begun.
        folder: of the files.
        files: the files in the folder that must be equal at the end.
        rows: of samples in the record at the end; 0 for a training.
    """

    first: list[str]
    again: list[str]
    begun: Path
    folder: Path
    files: tuple[str, ...]
    rows: int = 0

    def is_done(self) -> bool:
        """Whether all its work is written, even if its process has not ended."""
        if self.rows:
            return self.begun.exists() and json.loads(self.begun.read_text())["done"] == self.rows
        return all((self.folder / file).exists() for file in self.files)

    def arguments(self) -> list[str]:
        return self.again if self.begun.exists() else self.first


def training(name: str, folder: Path) -> Job:
    """``linfast train`` into this folder."""
    first = ["train", *TRAININGS[name], "--out", str(folder)]
    below = ["denoising-0", "denoising-1"] if name.startswith("ign") else ["."]
    files = [f"{part}/{file}" for part in below for file in ("checkpoint.pt", "model.safetensors")]
    return Job(first, [*first, "--resume"], folder / files[0], folder, (*files, "figure.png"))


def sampling(model: Path, folder: Path, count: int) -> Job:
    """``linfast sample`` of this model into this folder."""
    folder.mkdir(exist_ok=True)
    files = ["--checkpoint", str(model), "--out", str(folder / "x.npy")]
    first = ["sample", *files, "--count", str(count), "--batch-size", "1024", "--steps", "20"]
    return Job(first, [*first, "--resume"], folder / "x.npy.json", folder, ("x.npy", "x.npy.json"), count)


def differences(job: Job, whole: Job) -> list[str]:
    """The differences from the uninterrupted run, and files that should not exist.

    Files are compared byte by byte; checkpoints, whose archive contains the name of the file that was first
    written, tensor by tensor and bit for bit.
    """
    found = [f"{name} differs" for name in job.files if not _same(job.folder / name, whole.folder / name)]
    there = {path for path in job.folder.rglob("*") if path.is_file() and path.suffix != ".partial"}
    extra = there - {job.folder / name for name in job.files}
    return found + [f"{path} is left over" for path in sorted(extra)]


def _same(path: Path, expected: Path) -> bool:
    if not path.exists():
        return False
    if path.name == "figure.png":  # its labels hold measured times
        return True
    if path.suffix == ".pt":
        return _identical(*(torch.load(file, weights_only=True) for file in (path, expected)))
    if path.suffix == ".json":
        return json.loads(path.read_text()) == json.loads(expected.read_text())
    return path.read_bytes() == expected.read_bytes()


def _identical(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and np.array_equal(*(t.contiguous().reshape(-1).view(torch.uint8).numpy() for t in (a, b)))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_identical, a, b))
    return bool(a == b)
