"""Files as the operating system has them: opened without following links, locked, and put on the disk."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from typing import BinaryIO

__all__ = ["check_regular", "lock", "opened", "release", "reserve", "sync_folder"]


def check_regular(path: str) -> None:
    """ValueError where there is something that is no file: it is neither followed nor replaced."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ValueError(f"{path} is {kind} and no file: choose the name of a file")


def opened(path: str, flags: int) -> BinaryIO:
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)
    return open(handle, "r+b" if flags & os.O_RDWR else "rb", buffering=0)


def lock(file: BinaryIO, path: str) -> None:
    """Lock it until ``release`` or the process's end; BlockingIOError where it is locked."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, f"{path} is being written by another run: wait for its end, or choose another file"
        ) from error
    except OSError as error:
        warnings.warn(
            f"{path} cannot be locked ({error.strerror}): make sure that one run at a time writes to it",
            RuntimeWarning,
            stacklevel=2,
        )


def release(file: BinaryIO) -> None:
    """Close it; a forked process that has it too keeps no lock."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
    except (ImportError, OSError):
        pass
    file.close()


def sync_folder(path: str) -> None:
    """Put the names in a folder on the disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def reserve(file: BinaryIO, size: int) -> None:
    """Give the file its size, and its room where the system can promise it."""
    file.truncate(size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
