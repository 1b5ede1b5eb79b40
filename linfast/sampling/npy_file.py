"""A .npy file that is filled by commits, and its record.

The file has its full size from the start and is a valid .npy at any time; rows not yet written
are zeros. The record, ``path`` + ".json", says which run the file is of and how many rows are
done. It is replaced, whole, only after the rows it counts are on the disk: a run that is killed
loses at most the rows since its last commit, and computes them again.

Rows are written by seek and write, not through a memory map: on a full disk a write fails with
an error, a memory map with a signal.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor, nn, uint8

from .workers import Workers

__all__ = ["NpyFile", "fingerprint"]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's structure and weights."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(uint8).numpy() if data.numel() else b"")
    return digest.hexdigest()


class NpyFile:
    """Rows of one run in a .npy file.

    Args:
        path: of the file; created, or gone on with.
        identity: count, shape, dtype and what else makes the run: a file of another is refused.

    Raises:
        ValueError: a file or record of another run, or damaged.
        FileExistsError: a file without a record.
        OSError: no room.
    """

    def __init__(self, path: str, identity: dict[str, Any], workers: Workers) -> None:
        self.path, self.record_path = path, path + ".json"
        self.identity, self.workers = identity, workers
        self.shape = (identity["count"], *identity["shape"])
        self.dtype = np.dtype(identity["dtype"])
        self.row_bytes = int(np.prod(identity["shape"], dtype=np.int64)) * self.dtype.itemsize
        self.done = workers.by_first(self._open)
        self.file: BinaryIO = open(path, "r+b", buffering=0)  # noqa: SIM115
        self.data_start = _data_start(self.file)

    def __enter__(self) -> NpyFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def write(self, start: int, rows: Tensor) -> None:
        """Rows from row ``start``; they count when committed."""
        data = np.ascontiguousarray(rows.numpy()).reshape(-1).view(np.uint8).data
        try:
            self.file.seek(self.data_start + start * self.row_bytes)
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            raise self._explained(error) from error

    def commit(self, done: int) -> None:
        """Record that rows before ``done`` are written, by all workers."""
        try:
            os.fsync(self.file.fileno())
            self.workers.wait()
            if self.workers.rank == 0:
                self._record(done)
        except OSError as error:
            raise self._explained(error) from error
        self.done = done

    def _explained(self, error: OSError) -> OSError:
        kept = f"its first {self.done} rows of {self.shape[0]} are valid; the same call goes on from there"
        return OSError(error.errno, f"cannot write {self.path} ({error.strerror}): {kept}")

    def _open(self) -> int:
        """Rows already done; a new file where there is none."""
        exists, known = os.path.exists(self.path), os.path.exists(self.record_path)
        if exists and not known:
            raise FileExistsError(f"{self.path} exists and has no record {self.record_path}: move it or remove it")
        done = self._recorded() if known else 0
        if done == 0:
            self._create()
        elif not exists:
            raise ValueError(f"{self.path} is missing and {self.record_path} records {done} rows: remove it")
        else:
            self._check_file()
        return done

    def _recorded(self) -> int:
        """Rows done according to the record; raises unless it is of this run."""
        try:
            with open(self.record_path, encoding="utf-8") as file:
                record = json.load(file)
            done, identity = int(record["done"]), dict(record["run"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.record_path} is not a record of a run ({error!r})") from error
        pairs = {key: (identity.get(key), self.identity.get(key)) for key in (*identity, *self.identity)}
        differ = "; ".join(f"{key}: {then!r}, now {now!r}" for key, (then, now) in pairs.items() if then != now)
        if differ:
            raise ValueError(f"{self.path} is of another run ({differ}): choose another file, or remove both")
        return done

    def _check_file(self) -> None:
        with open(self.path, "rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            except ValueError as error:
                raise ValueError(f"{self.path} is not the .npy file of its record ({error})") from error
            size = file.seek(0, os.SEEK_END)
            whole = _data_start(file) + self.shape[0] * self.row_bytes
        if (shape, fortran, dtype) != (self.shape, False, self.dtype) or size != whole:
            raise ValueError(
                f"{self.path} does not match its record: {dtype} {shape} in {size} bytes, "
                f"expected {self.dtype} {self.shape} in {whole}"
            )

    def _create(self) -> None:
        """The record of nothing, then the file, its room reserved."""
        try:
            self._record(0)
            with open(self.path, "wb") as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(self.dtype),
                    "fortran_order": False,
                    "shape": self.shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                _reserve(file, file.tell() + self.shape[0] * self.row_bytes)
        except OSError as error:
            for path in (self.path, self.record_path):
                if os.path.exists(path):
                    os.unlink(path)
            raise OSError(error.errno, f"cannot create {self.path} ({error.strerror})") from error

    def _record(self, done: int) -> None:
        """Replace the record as a whole."""
        partial = self.record_path + ".partial"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"done": done, "run": self.identity}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.record_path)


def _data_start(file: BinaryIO) -> int:
    file.seek(0)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()


def _reserve(file: BinaryIO, size: int) -> None:
    """Give the file its size, and its room where the system can promise it."""
    file.truncate(size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
