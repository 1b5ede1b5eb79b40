"""The files that a training writes: an earlier run's only by leave, and one run's at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ...arguments import refuse_existing, taken

__all__ = ["CHECKPOINT", "Output"]

CHECKPOINT = "checkpoint.pt"


class Output:
    """A run's files in its folder. Made before any work, begun when all that can be checked is.

    Args:
        folder: to write to.
        names: the files, below the folder; the checkpoint beside the model it is of.
        resume: go on with the run of the checkpoints that are there.
        overwrite: replace an earlier run.

    Raises:
        FileExistsError: a file is there, and neither ``resume`` nor ``overwrite``; or, where a run is to be
            resumed, it is of a model without a checkpoint; something else than a file has such a name.
        FileNotFoundError: nothing to resume from.
        NotADirectoryError: the folder is something else.
    """

    def __init__(self, folder: Path, names: Sequence[str], resume: bool, overwrite: bool) -> None:
        self.folder, self.paths = folder, [folder / name for name in names]
        self.resume, self.overwrite = resume, overwrite
        self._lock: int | None = None
        self.refuse_existing()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def refuse_existing(self) -> None:
        """Raise what the class says."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is no folder")
        for path in self.paths:
            if path.exists() and not path.is_file():
                raise FileExistsError(f"{path} exists and is no file that could be replaced: move it")
        checkpoints = [path for path in self.paths if path.name == CHECKPOINT]
        begun = [path.parent for path in checkpoints if os.path.lexists(path)]
        if self.resume:
            if not begun:
                raise FileNotFoundError(f"{checkpoints[0]}: no checkpoint to resume from")
            refuse_existing(
                (
                    path
                    for path in self.paths
                    if path.parent / CHECKPOINT in checkpoints and path.parent not in begun
                ),
                "of another run than the one to resume; --overwrite replaces it",
            )
        elif not self.overwrite:
            refuse_existing(self.paths)

    def begin(self) -> None:
        """Take the folder, in the first process alone: from here on files may be written.

        What a killed run left half-written goes, and with ``overwrite`` all of the earlier run's files.

        Raises:
            BlockingIOError: another run writes there.
            OSError: it cannot be written to.
        """
        if self._lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = taken(self.folder)
        self.refuse_existing()
        tempfile.TemporaryFile(dir=self.folder).close()
        for path in self.paths:
            for partial in path.parent.glob(f"{path.name}*.partial"):
                partial.unlink()
            if self.overwrite:
                with suppress(FileNotFoundError):
                    path.unlink()
