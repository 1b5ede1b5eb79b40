"""sample_stream goes on with a file of the same model only, one run at a time, and loses nothing that was there."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.sampling import npy_file
from linfast.sampling.fingerprint import fingerprint
from tests.laws.zoo import perturb
from tests.processes import CONTEXT

N = 4
HOW: dict[str, Any] = {"steps": 3, "method": "euler", "block_size": 4, "noise_shape": (N,), "progress": False}


def _stream(f: nn.Module, path: Path, count: int = 12, batch_size: int = 4, **how: Any) -> np.ndarray:
    return np.array(lf.sample_stream(f, count, batch_size, path, **{**HOW, **how}))


def _rows(f: nn.Module, count: int = 12) -> np.ndarray:
    return torch.cat(list(lf.sample_stream(f, count, 4, **HOW))).detach().numpy()


# Models that are not the same.


def _linearizer(
    activation: str = "silu", alpha: float = 0.0, times: tuple[float, float] = (1.0, 0.0), factor: float = 2.0
) -> lf.Linearizer:
    torch.manual_seed(0)
    g = perturb(lf.coupling_flow(N, 2, (8,), activation=activation, time_features=4))
    A = factor * lf.TimeLowRank(N, 1, alpha=alpha, time_features=4, hidden=8)
    return lf.Linearizer(g.at(t=times[0]), A, g.at(t=times[1]))


def _fixed(A: lf.LatentOperator) -> lf.Linearizer:
    return lf.Linearizer(lf.Flow([], features=N), A)


def _coupled(**how: str) -> lf.Linearizer:
    torch.manual_seed(0)
    return lf.Linearizer(perturb(lf.coupling_flow(N, 2, (8,), **how)), lf.Dense(N))


_SCALE = 2.0


def _scaled(x: Tensor) -> Tensor:
    return x * _SCALE


@functools.wraps(torch.tanh)
def _called_tanh(x: Tensor) -> Tensor:
    return x * 3


@torch.no_grad()
def _decorated(x: Tensor) -> Tensor:
    return x * _SCALE


class DoubleLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replaced() -> lf.Linearizer:
    f = _linearizer()
    layers = f.g_x.bijection.bijections[0].conditioner.layers
    layers[0].__class__ = DoubleLinear
    return f


class Map(nn.Module):
    """What save knows nothing of: x to f(x) + constant."""

    gain = 1.0

    def __init__(self, f: Callable[[Tensor], Tensor] = torch.tanh, constant: Any = 0.0) -> None:
        super().__init__()
        self.f, self.constant = f, constant

    def forward(self, x: Tensor) -> Tensor:
        constant = self.constant[0] if isinstance(self.constant, (list, tuple)) else self.constant
        return self.gain * self.f(x) + torch.as_tensor(constant)


def _by_factory(a: float) -> nn.Module:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return a * x

    return Local()


def _with_buffer(value: float) -> nn.Module:
    module = nn.Identity()
    module.register_buffer("scale", torch.tensor(value), persistent=False)
    module.register_forward_hook(lambda module, inputs, y: y * module.scale)
    return module


def _hooked(by: float) -> lf.Linearizer:
    f = _linearizer()
    f.g_x.bijection.register_forward_hook(lambda module, inputs, z: z * by)
    return f


def _patched(by: float) -> nn.Module:
    module = nn.Identity()
    module.forward = lambda x: x * by
    return module


def _in_order(*names: str) -> nn.Module:
    parts = {"tanh": nn.Tanh(), "exp": Map(torch.exp)}
    return nn.Sequential(OrderedDict((name, parts[name]) for name in names))


OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "activation": (_linearizer, lambda: _linearizer("relu")),
    "alpha": (_linearizer, lambda: _linearizer(alpha=1.0)),
    "t of g_x and g_y": (_linearizer, lambda: _linearizer(times=(0.0, 1.0))),
    "factor": (_linearizer, lambda: _linearizer(factor=3.0)),
    "the order of shift and scale": (_coupled, lambda: _coupled(order="scale_first")),
    "alpha of a factored A": (
        lambda: _fixed(lf.LowRank(1.0, torch.ones(N, 1), torch.ones(N, 1))),
        lambda: _fixed(lf.LowRank(2.0, torch.ones(N, 1), torch.ones(N, 1))),
    ),
    "its transpose": (
        lambda: _fixed(lf.Dense.of(torch.arange(16.0).reshape(N, N))),
        lambda: _fixed(lf.Dense.of(torch.arange(16.0).reshape(N, N)).T),
    ),
    "a hook": (_linearizer, lambda: _hooked(2.0)),
    "a hook's constant": (lambda: _hooked(2.0), lambda: _hooked(3.0)),
    "a function": (lambda: Map(torch.tanh), lambda: Map(torch.relu)),
    "a function's own constant": (lambda: Map(lambda x: x * 2), lambda: Map(lambda x: x * 3)),
    "a constant": (lambda: Map(constant=1.0), lambda: Map(constant=2.0)),
    "an integer for a float": (lambda: Map(constant=[1]), lambda: Map(constant=[1.5])),
    "a tensor in a list": (lambda: Map(constant=[torch.ones(N)]), lambda: Map(constant=[torch.zeros(N)])),
    "an array": (lambda: Map(constant=np.ones(N, np.float32)), lambda: Map(constant=np.zeros(N, np.float32))),
    "a class made by a function": (lambda: _by_factory(2.0), lambda: _by_factory(3.0)),
    "a buffer that no file holds": (lambda: _with_buffer(2.0), lambda: _with_buffer(3.0)),
    "another class inside": (_linearizer, _replaced),
    "a function of another's name": (lambda: Map(torch.tanh), lambda: Map(_called_tanh)),
    "a patched forward": (lambda: _patched(2.0), lambda: _patched(3.0)),
    "torch's own constant": (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2)),
    "the order of named parts": (lambda: _in_order("tanh", "exp"), lambda: _in_order("exp", "tanh")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_file_of_another_model_is_refused(name: str, tmp_path: Path) -> None:
    first, second = (make() for make in OTHERS[name])
    assert not np.array_equal(_rows(first), _rows(second))
    path = tmp_path / "x.npy"
    rows = _stream(first, path)
    assert np.array_equal(_stream(OTHERS[name][0](), path), rows)
    with pytest.raises(ValueError, match="is of another run"):
        _stream(second, path)
    assert np.array_equal(np.load(path), rows)


def test_what_a_function_refers_to_is_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    _stream(Map(_scaled), path)
    _stream(Map(_decorated), tmp_path / "decorated.npy")
    for target, name in ((_scaled.__globals__, "_SCALE"), (Map, "gain")):
        with monkeypatch.context() as patch:
            patch.setitem(target, name, 3.0) if isinstance(target, dict) else patch.setattr(target, name, 3.0)
            with pytest.raises(ValueError, match="is of another run"):
                _stream(Map(_scaled), path)
            with pytest.raises(ValueError, match="is of another run"):
                _stream(Map(_decorated), tmp_path / "decorated.npy")
    assert np.array_equal(_stream(Map(_scaled), path), _rows(Map(_scaled)))


def _loaded(f: lf.Linearizer, folder: Path) -> nn.Module:
    lf.save(f, folder / "f.safetensors")
    return lf.load(folder / "f.safetensors")


SAME: dict[str, Callable[[lf.Linearizer, Path], nn.Module]] = {
    "loaded": _loaded,
    "copied": lambda f, _: copy.deepcopy(f),
    "pickled": lambda f, _: pickle.loads(pickle.dumps(f)),
    "in eval mode": lambda f, _: f.eval(),
    "frozen": lambda f, _: f.requires_grad_(False),
    "made again": lambda f, _: _linearizer(),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("foreign", [False, True])
def test_the_file_of_the_same_model_is_gone_on_with(name: str, foreign: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"

    def wrapped(f: nn.Module) -> nn.Module:
        one = lf.generator(f, 3, "euler", tol=1e-6)
        return nn.Sequential(one, Map()) if foreign else one

    rows = _stream(wrapped(_linearizer()), path)
    assert np.array_equal(_stream(wrapped(SAME[name](_linearizer(), tmp_path)), path), rows)


@pytest.mark.parametrize("make", [lambda: lf.coupling_flow(N, 2, (8,)), lambda: nn.Sequential(nn.Linear(N, N))])
def test_a_compiled_model_is_the_same(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = fingerprint(model)
    compiled = torch.compile(model, backend="eager")
    assert (fingerprint(compiled), fingerprint(model)) == (before, before)


def _send_fingerprint(sender: Any) -> None:
    sender.send(fingerprint(nn.Sequential(_linearizer(), Map(constant={"a", "b", "c"}))))


def test_a_model_is_the_same_in_another_process() -> None:
    """Where strings have other hashes, and objects lie elsewhere."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send_fingerprint, args=(sender,))
    process.start()
    assert receiver.recv() == fingerprint(nn.Sequential(_linearizer(), Map(constant={"c", "b", "a"})))
    process.join()


def test_the_same_numbers_of_another_kind_are_the_same_run(tmp_path: Path) -> None:
    f, path = _linearizer(), tmp_path / "x.npy"
    rows = _stream(f, path, steps=3, stop=1, noise_shape=(N,))
    assert np.array_equal(_stream(f, path, steps=np.int64(3), stop=np.float32(1), noise_shape=[np.int64(N)]), rows)


def test_what_cannot_be_told_from_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    f = Map(constant=0.0)
    f.lock = threading.Lock()
    f.eval()
    rows = _stream(f, path)
    assert np.array_equal(rows, _rows(f))
    with pytest.raises(ValueError, match="cannot be told from another model, a lock in it"):
        _stream(f, path)
    assert np.array_equal(np.load(path), rows)


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
    f, path = _linearizer(), tmp_path / "x.npy"
    _stream(f, path)
    DAMAGE[name](tmp_path / "x.npy.json")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"not a record of a run|another run"):
        _stream(f, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "rows", [np.ones((12, N), np.float64), np.ones((11, N), np.float32), np.ones(12, np.float32)]
)
@pytest.mark.parametrize("done", [0, 8])
def test_a_file_of_another_shape_or_dtype_is_left_alone(done: int, rows: np.ndarray, tmp_path: Path) -> None:
    f, path = _linearizer(), tmp_path / "x.npy"
    _stream(f, path)
    np.save(path, rows)
    _damaged(tmp_path / "x.npy.json", done=done)
    with pytest.raises(ValueError, match="does not match its record"):
        _stream(f, path)
    assert np.array_equal(np.load(path), rows)


def test_a_record_of_no_rows_loses_no_rows(tmp_path: Path) -> None:
    f, path, record = _linearizer(), tmp_path / "x.npy", tmp_path / "x.npy.json"
    rows = _stream(f, path)
    _damaged(record, done=0)
    assert np.array_equal(_stream(f, path), rows)  # a run's own, killed before its first commit
    precious = np.arange(12.0 * N, dtype=np.float32).reshape(12, N)
    np.save(path, precious)
    _damaged(record, done=0)
    with pytest.raises(ValueError, match="holds rows of which"):
        _stream(f, path)
    assert np.array_equal(np.load(path), precious)
    np.save(path, np.where(np.arange(12)[:, None] < 6, rows, 0))  # as torn by a kill
    assert np.array_equal(_stream(f, path), rows)


@pytest.mark.parametrize("written", [0, 40, None])
def test_a_run_that_was_killed_while_it_made_its_file_is_started_again(written: int | None, tmp_path: Path) -> None:
    """Killed before it had its size, and before it had its header."""
    f, path = _linearizer(), tmp_path / "x.npy"
    rows = _stream(f, path)
    whole = path.stat().st_size
    _damaged(tmp_path / "x.npy.json", done=0)
    path.write_bytes(bytes(whole if written is None else written))
    if written == 40:  # no state of ours
        with pytest.raises(ValueError, match=r"is not the \.npy file"):
            _stream(f, path)
        return
    assert np.array_equal(_stream(f, path), rows)


# What is there and is no file of ours.


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
        _stream(_linearizer(), tmp_path / "x.npy")
    assert sorted((p.name, p.lstat().st_mode) for p in tmp_path.iterdir()) == before
    assert target.read_bytes() == b""


@pytest.mark.parametrize("name", ["x.npy.json.partial", "x.npy.partial"])
def test_another_partial_file_is_not_written_to(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / name).symlink_to(precious)
    _stream(_linearizer(), tmp_path / "x.npy")
    assert precious.read_text() == "precious"
    assert (tmp_path / name).is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"precious", name, "x.npy", "x.npy.json"}


def _read_only(patch: pytest.MonkeyPatch) -> None:
    """As on a disk that is mounted to read: root is not stopped by permissions."""
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
    patch.setattr(npy_file, "open", opened_by_name, raising=False)


def test_a_complete_file_on_a_read_only_disk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f, path = _linearizer(), tmp_path / "x.npy"
    rows = _stream(f, path)
    with monkeypatch.context() as patch:
        _read_only(patch)
        assert np.array_equal(_stream(f, path), rows)
        _damaged(tmp_path / "x.npy.json", done=8)
        with pytest.raises(OSError, match="Read-only"):
            _stream(f, path)
        with pytest.raises(OSError, match="Read-only"):
            _stream(f, tmp_path / "y.npy")
    assert np.array_equal(np.load(path), rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "x.npy.json"]


# One run at a time.


def _held(path: Path, ready: Any, done: Any) -> None:
    """A process that writes to the file, until it is told to end."""

    def wait(x: Tensor) -> Tensor:
        if os.path.exists(f"{path}.json"):  # past the probe
            ready.set()
            done.wait(60)
        return x.tanh()

    _stream(Map(wait).eval(), path)


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_is_refused(killed: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    ready, done = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=_held, args=(path, ready, done))
    process.start()
    assert ready.wait(60)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises((BlockingIOError, ValueError), match=r"is being written by another run|of another run"):
        _stream(_linearizer(), path)
    with pytest.raises(BlockingIOError, match="is being written by another run"):
        npy_file.NpyFile(str(path), json.loads(before["x.npy.json"])["run"], npy_file.Workers())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    process.kill() if killed else done.set()
    process.join()
    identity = json.loads(before["x.npy.json"])["run"]
    with npy_file.NpyFile(str(path), identity, npy_file.Workers()) as file:
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
    first = threading.Thread(target=lambda: rows.append(_stream(Slow().eval(), path)))
    first.start()
    assert started.wait(60)
    identity = json.loads((tmp_path / "x.npy.json").read_text())["run"]
    with pytest.raises(BlockingIOError, match="is being written by another run"):
        npy_file.NpyFile(str(path), identity, npy_file.Workers())
    go_on.set()
    first.join()
    assert np.array_equal(rows[0], _rows(Map()))
    with npy_file.NpyFile(str(path), identity, npy_file.Workers()) as file:  # the lock is let go of
        assert file.done == 12


def test_a_file_that_was_replaced_meanwhile_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files removed and another run started: its record is its own."""
    f, path, record = _linearizer(), tmp_path / "x.npy", tmp_path / "x.npy.json"
    commit = npy_file.NpyFile.commit

    def replaced(self: npy_file.NpyFile, done: int) -> None:
        path.unlink()
        path.write_bytes(b"another's")
        record.write_text("another's")
        commit(self, done)

    monkeypatch.setattr(npy_file.NpyFile, "commit", replaced)
    with pytest.raises(OSError, match="moved, removed or replaced meanwhile"):
        _stream(f, path)
    assert path.read_bytes() == record.read_bytes() == b"another's"


def test_rows_are_on_the_disk_before_their_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "x.npy", []
    sync = os.fsync

    def synced(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        done.append("rows" if name == str(path) else "folder" if name == str(tmp_path) else "record")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    _stream(_linearizer(), path)
    assert done == ["record", "folder", *["rows", "record", "folder"] * 3]
