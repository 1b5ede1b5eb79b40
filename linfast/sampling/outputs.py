"""Where samples go: a .npy file that is filled by commits, beside its record; or an array in memory.

The file has its full size from the start and is a valid .npy at any time; rows not yet written are zeros. The
record, ``path`` + ".json", says which run the file belongs to and how many rows are done. It is replaced, whole,
only after the rows that it counts are on the disk: a run that is killed loses at most the rows since its last
commit, and computes them again.

One run at a time writes. The operating system locks the file (flock) until the run ends or its process is gone;
under torch.distributed process 0 locks it for all. Where Python has no ``fcntl`` (Windows) nothing is locked, and
the caller has to prevent two runs at a time. A file whose rows are all done is only read, and not locked.

Rows are written by seek and write, not through a memory map: on a full disk a write fails with an error, a memory
map with a signal.
"""

from __future__ import annotations

import errno
import io
import json
import os
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..io import written_whole
from .locked import check_regular, lock, opened, release, reserve, sync_folder
from .workers import Workers

__all__ = ["ArrayOut", "NpyFile"]

_SHORT = reprlib.Repr()  # of what a damaged record holds
_SHORT.maxstring = 300


class NpyFile:
    """Rows of one run in a .npy file.

    Args:
        path: of the file; created, or resumed.
        identity: count, shape, dtype, block_size and what else makes the run: a file of another is refused.
        overwrite: replace such a file instead, and its record, once there is room for this run's.

    Raises:
        ValueError: a file or record of another run, or damaged; a link, a folder or another thing that is no file.
        FileExistsError: a file without a record.
        BlockingIOError: another run is writing to it.
        OSError: no room.
    """

    def __init__(self, path: str, identity: dict[str, Any], workers: Workers, overwrite: bool = False) -> None:
        self.path, self.record_path, self.overwrite = path, path + ".json", overwrite
        self.identity, self.workers = identity, workers
        self.count = identity["count"]
        self.row_bytes = int(np.prod(identity["shape"], dtype=np.int64)) * np.dtype(identity["dtype"]).itemsize
        self.header = _header((self.count, *identity["shape"]), np.dtype(identity["dtype"]))
        self.size = len(self.header) + self.count * self.row_bytes
        if self.size > sys.maxsize:
            raise OSError(errno.EFBIG, f"cannot create {path} (no file has {self.size} bytes)")
        self.done = workers.by_first(self._open)
        if workers.rank > 0:
            self.file = opened(path, os.O_RDONLY if self.done == self.count else os.O_RDWR)

    def __enter__(self) -> NpyFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        release(self.file)

    def write(self, start: int, rows: Tensor) -> None:
        """Rows from row ``start``; they count when committed."""
        left = _bytes(rows).data
        try:
            self.file.seek(len(self.header) + start * self.row_bytes)
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise self._explained(error) from error

    def commit(self, done: int) -> None:
        """Record that rows before ``done`` are written, by all workers."""
        try:
            os.fsync(self.file.fileno())
            self.workers.wait()
            if self.workers.rank == 0:
                self._check_same()
                self._record(done)
        except OSError as error:
            raise self._explained(error) from error
        self.done = done

    def _explained(self, error: OSError) -> OSError:
        kept = f"its first {self.done} rows of {self.count} are valid; the same call resumes from there"
        return OSError(error.errno, f"cannot write {self.path} ({error.strerror}): {kept}")

    def _open(self) -> int:
        """Rows already done. Opens the file, to read where it is complete, else to write and locked."""
        for path in (self.path, self.record_path):
            check_regular(path)
        if self.overwrite and not self._is_ours():
            self._replace()
        done = self._recorded()
        exists = os.path.exists(self.path)
        if done is None and exists and os.path.getsize(self.path) > 0:
            raise FileExistsError(f"{self.path} exists and has no record {self.record_path}: move it or remove it")
        if done and not exists:
            raise ValueError(f"{self.path} is missing and {self.record_path} records {done} rows: remove it")
        complete = done == self.count
        self.file = opened(self.path, os.O_RDONLY if complete else os.O_RDWR | os.O_CREAT)
        try:
            return self._checked() if complete else self._locked()
        except BaseException:
            release(self.file)
            raise

    def _is_ours(self) -> bool:
        try:
            return self._recorded() is not None
        except ValueError:
            return False

    def _replace(self) -> None:
        """Put a file of this run without rows, and its record, in the place of another run's."""
        if os.path.exists(self.path):
            with open(self.path, "rb") as other:
                lock(other, self.path)  # which raises where another run is writing
        try:
            with written_whole(Path(self.path)) as partial:
                with open(partial, "r+b") as file:
                    reserve(file, self.size)
                    file.write(self.header)
                Path(self.record_path).unlink(missing_ok=True)  # before the file that it describes
        except OSError as error:
            raise OSError(error.errno, f"cannot create {self.path} ({error.strerror})") from error
        self._record(0)

    def _locked(self) -> int:
        """Rows done now that no other run writes; the file is made where there is none."""
        lock(self.file, self.path)
        self._check_same()
        size = os.fstat(self.file.fileno()).st_size
        unmade = size == 0 or (size == self.size and not any(self.file.read(len(self.header))))
        return self._create() if not self._recorded() and unmade else self._checked()

    def _checked(self) -> int:
        """Rows done, of a file that is what its record says."""
        done, size = self._recorded(), os.fstat(self.file.fileno()).st_size
        if done is None:
            raise FileExistsError(f"{self.path} has no record {self.record_path}: move it or remove it")
        self.file.seek(0)
        begins = self.file.read(len(self.header))
        if begins[:6] != self.header[:6]:
            raise ValueError(f"{self.path} is not the .npy file of its record")
        if begins != self.header or size != self.size:
            raise ValueError(
                f"{self.path} does not match its record: {size} bytes that begin with {begins!r}, expected "
                f"{self.size} that begin with {self.header!r}"
            )
        return done

    def _check_same(self) -> None:
        """OSError unless the open file is still the one of this name."""
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(errno.ESTALE, "the file was moved, removed or replaced meanwhile")

    def _recorded(self) -> int | None:
        """Rows done according to the record, None without one; raises unless it is of this run."""
        try:
            with open(self.record_path, encoding="utf-8") as file:
                record = json.load(file)
            if not isinstance(record, dict) or not isinstance(record.get("run"), dict) or "done" not in record:
                raise ValueError("'done' or 'run' is missing")
            differ = _differences(record["run"], self.identity)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.record_path} is not a record of a run ({error!r})") from error
        if differ:
            raise ValueError(f"{self.path} is of another run ({differ}): choose another file, or remove both")
        done, block = record["done"], self.identity["block_size"]
        if type(done) is not int or not 0 <= done <= self.count or (done < self.count and done % block):
            there = f"done is {_SHORT.repr(done)}, of {self.count} rows in blocks of {block}"
            raise ValueError(f"{self.record_path} is not a record of a run ({there})")
        return done

    def _create(self) -> int:
        """The record of nothing, then the file, its room reserved and its header last."""
        try:
            self._record(0)
            reserve(self.file, self.size)
            self.file.seek(0)
            self.file.write(self.header)
        except OSError as error:
            for path in (self.path, self.record_path):
                if os.path.exists(path):
                    os.unlink(path)
            raise OSError(error.errno, f"cannot create {self.path} ({error.strerror})") from error
        return 0

    def _record(self, done: int) -> None:
        """Replace the record as a whole."""
        with written_whole(Path(self.record_path)) as partial, open(partial, "w", encoding="utf-8") as file:
            json.dump({"done": done, "run": self.identity}, file, indent=1)
        sync_folder(os.path.dirname(self.record_path) or ".")


@dataclass(frozen=True)
class ArrayOut:
    """An array or a tensor in memory."""

    out: np.ndarray | Tensor
    done: int = 0

    @classmethod
    def of(cls, out: np.ndarray | Tensor, count: int, sample: Tensor, workers: Workers) -> ArrayOut:
        """A dense ``out`` of ``count`` rows like this sample.

        Raises:
            ValueError: it does not fit, or cannot be written to.
        """
        if workers.count > 1:
            raise ValueError("out must be a path or None under torch.distributed: processes share no array")
        want = sample.numpy().dtype if isinstance(out, np.ndarray) else sample.dtype
        if tuple(out.shape) != (count, *sample.shape) or out.dtype != want:
            raise ValueError(
                f"out must be {(count, *sample.shape)} of {want}; got {tuple(out.shape)} of {out.dtype}"
            )
        if reason := _unusable(out):
            raise ValueError(f"out cannot be written to: it {reason}")
        return cls(out)

    def write(self, start: int, rows: Tensor) -> None:
        if isinstance(self.out, np.ndarray):
            self.out[start : start + len(rows)] = rows.numpy()
        else:
            self.out[start : start + len(rows)] = rows

    def commit(self, done: int) -> None:
        """Nothing outlives the process."""


def _bytes(rows: Tensor) -> np.ndarray:
    return np.ascontiguousarray(rows.numpy()).reshape(-1).view(np.uint8)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What two runs differ in; numbers of another type are others."""
    missing = "nothing"
    pairs = {key: (then.get(key, missing), now.get(key, missing)) for key in (*then, *now)}
    return "; ".join(
        f"{key}: {_SHORT.repr(a)}, now {_SHORT.repr(b)}"
        for key, (a, b) in pairs.items()
        if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True)
    )


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _unusable(out: np.ndarray | Tensor) -> str:
    """Why rows cannot be put in; nothing where they can."""
    if isinstance(out, np.ndarray):
        strides, apart = out.strides, out.itemsize
        if not out.flags.writeable:
            return "is read-only"
    else:
        if out.is_inference() and not torch.is_inference_mode_enabled():
            return "was made in torch.inference_mode()"
        strides, apart = out.stride(), 1
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(strides, out.shape, strict=True) if size > 1
    ):
        if stride < apart:
            return "overlaps itself in memory; make a copy"
        apart += stride * (size - 1)
    return ""
