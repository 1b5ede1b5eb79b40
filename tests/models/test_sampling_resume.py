"""sample_stream resumes in one run at a time, refuses damaged records, and loses no existing file."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from linfast.sampling import outputs
from tests.models.stream_runs import Map, N, linearizer, rows_of, streamed
from tests.processes import CONTEXT

# Records that are damaged.


def _damaged(path: Path, **change: Any) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **change}))


def _run_changed(path: Path, **change: Any) -> None:
    _damaged(path, run={**json.loads(path.read_text())["run"], **change})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "between two blocks": lambda p: _damaged(p, done=6),
    "above count": lambda p: _damaged(p, done=10**9),
    "below zero": lambda p: _damaged(p, done=-4),
    "true": lambda p: _damaged(p, done=True),
    "false": lambda p: _damaged(p, done=False),
    "a float": lambda p: _damaged(p, done=8.0),
    "a string": lambda p: _damaged(p, done="8"),
    "none": lambda p: _damaged(p, done=None),
    "infinity": lambda p: _damaged(p, done=float("inf")),
    "nan": lambda p: _damaged(p, done=float("nan")),
    "a list": lambda p: _damaged(p, done=[8]),
    "many digits": lambda p: p.write_text(p.read_text().replace('"done": 12', '"done": ' + "9" * 5000)),
    "deep": lambda p: p.write_text("[" * 100_000),
    "deep inside": lambda p: p.write_text('{"done": 8, "run": ' + '{"a":' * 100_000),
    "empty": lambda p: p.write_text(""),
    "cut": lambda p: p.write_text(p.read_text()[:-9]),
    "bytes": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "no run": lambda p: p.write_text('{"done": 8}'),
    "a run of pairs": lambda p: p.write_text('{"done": 8, "run": [["count", 12]]}'),
    "no done": lambda p: p.write_text(json.dumps({"run": json.loads(p.read_text())["run"]})),
    "a list of all": lambda p: p.write_text("[]"),
    "seed is false": lambda p: _run_changed(p, seed=False),
    "steps are a float": lambda p: _run_changed(p, steps=3.0),
    "no stop": lambda p: _damaged(
        p, run={k: v for k, v in json.loads(p.read_text())["run"].items() if k != "stop"}
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_refused(name: str, tmp_path: Path) -> None:
    f, path = linearizer(), tmp_path / "x.npy"
    streamed(f, path)
    DAMAGE[name](tmp_path / "x.npy.json")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"not a record of a run|another run"):
        streamed(f, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "rows", [np.ones((12, N), np.float64), np.ones((11, N), np.float32), np.ones(12, np.float32)]
)
@pytest.mark.parametrize("done", [0, 8])
def test_a_file_of_another_shape_or_dtype_is_left_alone(done: int, rows: np.ndarray, tmp_path: Path) -> None:
    f, path = linearizer(), tmp_path / "x.npy"
    streamed(f, path)
    np.save(path, rows)
    _damaged(tmp_path / "x.npy.json", done=done)
    with pytest.raises(ValueError, match="does not match its record"):
        streamed(f, path)
    assert np.array_equal(np.load(path), rows)


def test_a_run_that_was_killed_before_its_first_commit_is_gone_on_with(tmp_path: Path) -> None:
    f, path = linearizer(), tmp_path / "x.npy"
    rows = streamed(f, path)
    _damaged(tmp_path / "x.npy.json", done=0)
    np.save(path, np.where(np.arange(12)[:, None] < 6, rows, 0))  # as torn by a kill
    assert np.array_equal(streamed(f, path), rows)


@pytest.mark.parametrize("written", [0, 40, None])
def test_a_run_that_was_killed_while_it_made_its_file_is_started_again(written: int | None, tmp_path: Path) -> None:
    """It was killed before the file had its size, and before it had its header."""
    f, path = linearizer(), tmp_path / "x.npy"
    rows = streamed(f, path)
    whole = path.stat().st_size
    _damaged(tmp_path / "x.npy.json", done=0)
    path.write_bytes(bytes(whole if written is None else written))
    if written == 40:  # no state of ours
        with pytest.raises(ValueError, match=r"is not the \.npy file"):
            streamed(f, path)
        return
    assert np.array_equal(streamed(f, path), rows)


# Existing files that are not ours.


def _link(target: Path, path: Path) -> None:
    path.symlink_to(target)


NO_FILES: dict[str, Callable[[Path, Path], object]] = {
    "a link": _link,
    "a dangling link": lambda target, path: _link(target.with_name("gone"), path),
    "a folder": lambda target, path: path.mkdir(),
    "a pipe": lambda target, path: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["x.npy", "x.npy.json"])
def test_what_is_no_file_is_neither_followed_nor_replaced(kind: str, name: str, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"")
    NO_FILES[kind](target, tmp_path / name)
    before = sorted((p.name, p.lstat().st_mode) for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"{name} is a .*and no file"):
        streamed(linearizer(), tmp_path / "x.npy")
    assert sorted((p.name, p.lstat().st_mode) for p in tmp_path.iterdir()) == before
    assert target.read_bytes() == b""


@pytest.mark.parametrize("name", ["x.npy.json.partial", "x.npy.partial"])
def test_another_partial_file_is_not_written_to(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / name).symlink_to(precious)
    streamed(linearizer(), tmp_path / "x.npy")
    assert precious.read_text() == "precious"
    assert (tmp_path / name).is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"precious", name, "x.npy", "x.npy.json"}


def _read_only(patch: pytest.MonkeyPatch) -> None:
    """As on a disk that is mounted read-only: permissions do not stop root."""
    open_, error = os.open, OSError(errno.EROFS, "Read-only file system")

    def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise error
        return open_(path, flags, *rest, **named)

    built_in = open

    def opened_by_name(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not isinstance(path, int) and set(mode) & set("wa+x"):
            raise error
        return built_in(path, mode, *rest, **named)

    patch.setattr(os, "open", opened)
    patch.setattr(outputs, "open", opened_by_name, raising=False)


def test_a_complete_file_on_a_read_only_disk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f, path = linearizer(), tmp_path / "x.npy"
    rows = streamed(f, path)
    with monkeypatch.context() as patch:
        _read_only(patch)
        assert np.array_equal(streamed(f, path), rows)
        _damaged(tmp_path / "x.npy.json", done=8)
        with pytest.raises(OSError, match="Read-only"):
            streamed(f, path)
        with pytest.raises(OSError, match="Read-only"):
            streamed(f, tmp_path / "y.npy")
    assert np.array_equal(np.load(path), rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "x.npy.json"]


# One run at a time.


def _held(path: Path, ready: Any, done: Any) -> None:
    """A process that writes to the file until it is stopped."""

    def wait(x: Tensor) -> Tensor:
        if os.path.exists(f"{path}.json"):  # past the probe
            ready.set()
            done.wait(60)
        return x.tanh()

    streamed(Map(wait).eval(), path)


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_is_refused(killed: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    ready, done = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=_held, args=(path, ready, done))
    process.start()
    assert ready.wait(60)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises((BlockingIOError, ValueError), match=r"is being written by another run|of another run"):
        streamed(linearizer(), path)
    with pytest.raises(BlockingIOError, match="is being written by another run"):
        outputs.NpyFile(str(path), json.loads(before["x.npy.json"])["run"], outputs.Workers())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    process.kill() if killed else done.set()
    process.join()
    identity = json.loads(before["x.npy.json"])["run"]
    with outputs.NpyFile(str(path), identity, outputs.Workers()) as file:
        assert file.done == (0 if killed else 12)


def test_a_second_thread_is_refused(tmp_path: Path) -> None:
    path, started, go_on = tmp_path / "x.npy", threading.Event(), threading.Event()

    def wait(x: Tensor) -> Tensor:
        if path.exists():
            started.set()
            assert go_on.wait(60)
        return x.tanh()

    class Slow(Map):
        def forward(self, x: Tensor) -> Tensor:
            return wait(x)

    rows: list[np.ndarray] = []
    first = threading.Thread(target=lambda: rows.append(streamed(Slow().eval(), path)))
    first.start()
    assert started.wait(60)
    identity = json.loads((tmp_path / "x.npy.json").read_text())["run"]
    with pytest.raises(BlockingIOError, match="is being written by another run"):
        outputs.NpyFile(str(path), identity, outputs.Workers())
    go_on.set()
    first.join()
    assert np.array_equal(rows[0], rows_of(Map()))
    with outputs.NpyFile(str(path), identity, outputs.Workers()) as file:  # the lock is let go of
        assert file.done == 12


def test_a_file_that_was_replaced_meanwhile_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files are removed and another run is started, whose record is not overwritten."""
    f, path, record = linearizer(), tmp_path / "x.npy", tmp_path / "x.npy.json"
    commit = outputs.NpyFile.commit

    def replaced(self: outputs.NpyFile, done: int) -> None:
        path.unlink()
        path.write_bytes(b"another's")
        record.write_text("another's")
        commit(self, done)

    monkeypatch.setattr(outputs.NpyFile, "commit", replaced)
    with pytest.raises(OSError, match="moved, removed or replaced meanwhile"):
        streamed(f, path)
    assert path.read_bytes() == record.read_bytes() == b"another's"


def test_rows_are_on_the_disk_before_their_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "x.npy", []
    sync = os.fsync

    def synced(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        done.append("rows" if name == str(path) else "folder" if name == str(tmp_path) else "record")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    streamed(linearizer(), path)
    assert done == ["record", "folder", *["rows", "record", "folder"] * 3]
