"""A .npy file that can be resumed after a run was killed: rows are committed, and a second file records how many.

The file has its full size from the start and is a valid .npy at any time; rows that are not yet written are zeros.
The record, ``path`` + ".json", is replaced as a whole, and only after the rows that it counts are on the disk. A
run that is killed loses at most the rows since its last commit; the next run computes them again.

Only one run may write to a file. The operating system locks it (flock) until the run ends or its process is gone;
under torch.distributed process 0 locks it for all. Where Python has no ``fcntl`` (Windows) nothing is locked. A
complete file is only read, and not locked.

Rows are written by seek and write, not through a memory map: on a full disk a write raises an error, whereas a
memory map kills the process by a signal.
"""

from __future__ import annotations

import errno
import io
import json
import os
import reprlib
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..io import written_whole
from .workers import Workers

_SHORT = reprlib.Repr()  # shortens the values of a record in error messages
_SHORT.maxstring = 300


class NpyFile(AbstractContextManager["NpyFile"]):
    """Rows of one run in a .npy file.

    Args:
        path: the file to create or resume.
        identity: count, shape, dtype, block_size and all else that defines the run; another run's file is refused.
        overwrite: replace another run's file instead, and its record, once the disk has space for the new file.

    Raises:
        ValueError: a file or record that is damaged or of another run; a link, a folder or a device in its place.
        FileExistsError: a file without a record.
        BlockingIOError: another run is writing to it.
        OSError: the disk has no space.
    """

    def __init__(self, path: str, identity: dict[str, Any], workers: Workers, overwrite: bool = False) -> None:
        self.path, self.record_path, self.overwrite = path, path + ".json", overwrite
        self.identity, self.workers, self.count = identity, workers, identity["count"]
        dtype, shape = np.dtype(identity["dtype"]), tuple(identity["shape"])
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(header, {**described, "shape": (self.count, *shape)})
        self.header = header.getvalue()
        self.row_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.size = len(self.header) + self.count * self.row_bytes
        if self.size > sys.maxsize:
            raise OSError(errno.EFBIG, f"cannot create {path} (no file has {self.size} bytes)")
        self.done = workers.by_first(self._open)
        if workers.rank > 0:
            self.file = _opened(path, os.O_RDONLY if self.done == self.count else os.O_RDWR)

    def __exit__(self, *error: object) -> None:
        _release(self.file)

    def write(self, start: int, rows: Tensor) -> None:
        """Write ``rows`` [n, *shape] at row ``start``; they count once they are committed."""
        left = np.ascontiguousarray(rows.numpy()).reshape(-1).view(np.uint8).data
        with self._explained("write"):
            self.file.seek(len(self.header) + start * self.row_bytes)
            while left:
                left = left[self.file.write(left) :]

    def commit(self, done: int) -> None:
        """Record that all workers have written the rows before ``done``."""
        with self._explained("write"):
            os.fsync(self.file.fileno())
            self.workers.wait()
            if self.workers.rank == 0:
                self._check_same()
                self._record(done)
        self.done = done

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """A context that raises an OSError anew, with a message that says what failed and which rows are valid."""
        try:
            yield
        except OSError as error:
            text = f"cannot {what} {self.path} ({error.strerror})"
            if what == "write":
                text += f": its first {self.done} rows of {self.count} are valid; the same call resumes from there"
            raise OSError(error.errno, text) from error

    def _open(self) -> int:
        """Open the file, for reading where it is complete, else locked for writing. Returns the rows done."""
        for path in (self.path, self.record_path):
            check_regular(path)
        try:
            done = self._recorded()
        except ValueError:
            if not self.overwrite:
                raise
            done = None
        if done is None and self.overwrite:
            done = self._replace()
        if done and not os.path.exists(self.path):
            raise ValueError(f"{self.path} is missing and {self.record_path} records {done} rows: remove it")
        complete = done == self.count
        self.file = _opened(self.path, os.O_RDONLY if complete else os.O_RDWR | os.O_CREAT)
        try:
            if not complete:
                lock(self.file, self.path)
                self._check_same()
                done = self._recorded()  # again, now that no other run can write
            return self._checked_or_created(done)
        except BaseException:
            _release(self.file)
            raise

    def _checked_or_created(self, done: int | None) -> int:
        """The rows done of the open file, checked against its record; a new or half-made file is created."""
        size, begins = os.fstat(self.file.fileno()).st_size, self.file.read(len(self.header))
        half = done == 0 and size == self.size and not any(begins)  # killed before its header was written
        if half or (size == 0 and not done):
            self._create()
            return 0
        if done is None:
            raise FileExistsError(f"{self.path} exists and has no record {self.record_path}: move it or remove it")
        if begins[:6] != self.header[:6]:
            raise ValueError(f"{self.path} is not the .npy file of its record")
        if begins != self.header or size != self.size:
            raise ValueError(
                f"{self.path} does not match its record: {size} bytes that begin with {begins!r}, expected "
                f"{self.size} that begin with {self.header!r}"
            )
        return done

    def _create(self) -> None:
        """Write a record of 0 rows, reserve the file's space, and write its header last."""
        try:
            with self._explained("create"):
                self._record(0)
                _reserve(self.file, self.size)
                self.file.seek(0)
                self.file.write(self.header)
        except OSError:
            for path in (self.path, self.record_path):
                Path(path).unlink(missing_ok=True)
            raise

    def _replace(self) -> int:
        """Replace the file and record of another run by those of this run, without rows."""
        if os.path.exists(self.path):
            with open(self.path, "rb") as other:
                lock(other, self.path)  # raises where another run is writing
        with self._explained("create"), written_whole(Path(self.path)) as partial:
            with open(partial, "r+b") as file:
                _reserve(file, self.size)
                file.write(self.header)
            Path(self.record_path).unlink(missing_ok=True)  # before the file that it describes
        self._record(0)
        return 0

    def _check_same(self) -> None:
        """OSError unless ``path`` still names the open file."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                return
        raise OSError(errno.ESTALE, "the file was moved, removed or replaced meanwhile")

    def _recorded(self) -> int | None:
        """The rows done by the record, None without a record; ValueError where it is damaged or of another run."""
        try:
            record = json.loads(Path(self.record_path).read_text(encoding="utf-8"))
            done, differ = record["done"], _differences(record["run"], self.identity)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.record_path} is not a record of a run ({error!r})") from error
        if differ:
            raise ValueError(f"{self.path} is of another run ({differ}): choose another file, or remove both")
        block = self.identity["block_size"]
        if type(done) is not int or not 0 <= done <= self.count or (done < self.count and done % block):
            there = f"done is {_SHORT.repr(done)}, of {self.count} rows in blocks of {block}"
            raise ValueError(f"{self.record_path} is not a record of a run ({there})")
        return done

    def _record(self, done: int) -> None:
        """Replace the record as a whole, and flush its folder to the disk where the system can."""
        with written_whole(Path(self.record_path)) as partial, open(partial, "w", encoding="utf-8") as file:
            json.dump({"done": done, "run": self.identity}, file, indent=1)
        with suppress(OSError):  # Windows cannot open a folder
            folder = os.open(os.path.dirname(self.record_path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The entries in which two runs differ, as text; 1 and 1.0 differ."""
    pairs = ((key, then.get(key, "nothing"), now.get(key, "nothing")) for key in {**then, **now})
    return "; ".join(
        f"{key}: {_SHORT.repr(a)}, now {_SHORT.repr(b)}"
        for key, a, b in pairs
        if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True)
    )


def check_regular(path: str) -> None:
    """ValueError where the path is a link, a folder, a device or a pipe: none is followed or replaced."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ValueError(f"{path} is {kind} and no file: choose the name of a file")


def lock(file: BinaryIO, path: str) -> None:
    """Lock the file until it is released or the process ends; BlockingIOError where it is locked already."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, f"{path} is being written by another run: wait for its end, or choose another file"
        ) from error
    except OSError as error:
        text = f"{path} cannot be locked ({error.strerror}): make sure that one run at a time writes to it"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _opened(path: str, flags: int) -> BinaryIO:
    """Open the file unbuffered; OSError for a link."""
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)
    return open(handle, "r+b" if flags & os.O_RDWR else "rb", buffering=0)


def _release(file: BinaryIO) -> None:
    """Unlock and close the file, so that a forked process that shares it keeps no lock."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _reserve(file: BinaryIO, size: int) -> None:
    """Set the file's size, and reserve its space on the disk where the system can."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def check_array(out: np.ndarray | Tensor, count: int, sample: Tensor) -> None:
    """ValueError unless ``count`` rows like this sample can be written to a dense ``out``."""
    want = sample.numpy().dtype if isinstance(out, np.ndarray) else sample.dtype
    if tuple(out.shape) != (count, *sample.shape) or out.dtype != want:
        raise ValueError(f"out must be {(count, *sample.shape)} of {want}; got {tuple(out.shape)} of {out.dtype}")
    reason = ""
    if isinstance(out, np.ndarray):
        strides, apart = out.strides, out.itemsize
        reason = "" if out.flags.writeable else "is read-only"
    else:
        strides, apart = out.stride(), 1
        if out.is_inference() and not torch.is_inference_mode_enabled():
            reason = "was made in torch.inference_mode()"
    sides = zip(strides, out.shape, strict=True)
    for stride, size in sorted((abs(stride), size) for stride, size in sides if size > 1):
        if stride < apart:
            reason = reason or "overlaps itself in memory; make a copy"
        apart += stride * (size - 1)
    if reason:
        raise ValueError(f"out cannot be written to: it {reason}")
