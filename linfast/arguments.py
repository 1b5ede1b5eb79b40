"""What all commands share: a parser whose errors are one line, and the rules for files of other runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from ._command import say

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["Parser", "add_earlier_files", "refuse_existing", "taken"]


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message} (see {self.prog} --help)")
        raise SystemExit(2)


def add_earlier_files(parser: argparse.ArgumentParser, resume: str, overwrite: str) -> None:
    """Add ``--resume`` and ``--overwrite``, with these help texts; one of them at most can be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help=resume)
    group.add_argument("--overwrite", action="store_true", help=overwrite)


def refuse_existing(
    paths: Iterable[str | Path], ways: str = "--resume goes on with that run, --overwrite replaces its files"
) -> None:
    """No command replaces an earlier run's files by itself.

    Raises:
        FileExistsError: one of the paths exists; the message names it and the ways to go on.
    """
    for path in paths:
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists: {ways}")


def taken(path: str | Path) -> int:
    """A descriptor of an existing file or folder, locked by the operating system until it is closed.

    Raises:
        BlockingIOError: another run has locked it, to write there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise BlockingIOError(f"{path}: another run writes there") from error
    return descriptor
