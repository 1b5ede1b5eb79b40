"""sample_stream: the same rows for every batch size, sink, interruption and number of processes."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import linfast as lf
from linfast.cli import main
from linfast.sampling import outputs, stream
from linfast.sampling.sampler import generator
from tests.laws.zoo import perturb
from tests.processes import CONTEXT, results_of_two

N = 6


def _model() -> lf.Linearizer:
    g = perturb(lf.coupling_flow(N, 2, (8,), time_features=4))
    A = perturb(lf.TimeLowRank(N, 2, time_features=4, hidden=4))
    return lf.Linearizer(g.at(t=1.0), A, g.at(t=0.0))


def _rows(f: torch.nn.Module, count: int = 100, batch_size: int = 30, **options: object) -> np.ndarray:
    return np.concatenate(list(lf.sample_stream(f, count, batch_size, **{"steps": 5, "block_size": 16, **options})))


def _stream(f: torch.nn.Module, out: object, count: int = 100, batch_size: int = 30, **options: object) -> object:
    return lf.sample_stream(f, count, batch_size, out, **{"steps": 5, "block_size": 16, **options})


def test_a_density_streams_samples_and_not_log_probabilities() -> None:
    p = perturb(lf.Density(lf.coupling_flow(N, 2, (8,))).standardize(3 + 5 * torch.randn(64, N)))
    rows = _rows(p)
    assert np.array_equal(rows, _rows(lf.Inverse(p.flow), noise_shape=(N,)))
    torch.manual_seed(0)
    drawn, found = p.sample(20_000), torch.from_numpy(_rows(p, 20_000, block_size=1024))
    torch.testing.assert_close(found.mean(0), drawn.mean(0), rtol=0, atol=0.3)
    torch.testing.assert_close(found.std(0), drawn.std(0), rtol=0.05, atol=0)


def test_a_density_with_another_base_or_a_context_is_refused() -> None:
    base = torch.distributions.Laplace(torch.zeros(N), torch.ones(N))
    with pytest.raises(TypeError, match=r"this Density p has another base: use p\.sample"):
        _rows(lf.Density(lf.coupling_flow(N, 2, (8,)), base))
    flow, c = lf.coupling_flow(N, 2, (8,), context_features=3), torch.randn(1, 3)
    for p in (lf.Density(flow), lf.Density(flow, embedding=torch.nn.Embedding(5, 3))):
        with pytest.raises(TypeError, match=r"pass lf.Inverse\(p.flow.at\(context=c\)\) .* noise_shape=\(6,\)"):
            _rows(p, noise_shape=(N,))
    fixed = _rows(lf.Density(flow.at(context=c)))
    assert np.array_equal(fixed, _rows(lf.Inverse(flow.at(context=c)), noise_shape=(N,)))


@pytest.mark.parametrize("batch_size", [1, 16, 30, 1000])
def test_the_same_rows_for_every_batch_size_and_sink(batch_size: int, tmp_path: Path) -> None:
    f = _model()
    rows = _rows(f)
    assert rows.shape == (100, N)
    assert len(np.unique(rows, axis=0)) == 100
    batches = list(lf.sample_stream(f, 100, batch_size, steps=5, block_size=16))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert np.array_equal(np.concatenate(batches), rows)
    array, tensor = np.zeros((100, N), np.float32), torch.zeros(100, N)
    assert _stream(f, array, batch_size=batch_size) is array
    assert _stream(f, tensor, batch_size=batch_size) is tensor
    file = _stream(f, tmp_path / "x.npy", batch_size=batch_size)
    assert isinstance(file, np.memmap)
    for filled in (array, tensor.numpy(), file, np.load(tmp_path / "x.npy")):
        assert np.array_equal(filled, rows)


def test_rows_are_samples_of_a_seed() -> None:
    f = _model()
    rows = _rows(f, 5000, block_size=512)
    assert np.array_equal(_rows(f, 700, block_size=512), rows[:700])  # a shorter run is a prefix
    assert not np.array_equal(_rows(f, 700, block_size=512, seed=1), rows[:700])
    noise = np.concatenate(list(lf.sample_stream(torch.nn.Identity(), 20000, 3000, noise_shape=(2,))))
    assert np.abs(noise.mean(0)).max() < 0.03
    assert np.abs(np.cov(noise.T) - np.eye(2)).max() < 0.05
    # Each row is the one-step generator's output for that row's noise.
    given = torch.cat(list(lf.sample_stream(torch.nn.Identity(), 100, 100, noise_shape=(N,), block_size=512)))
    torch.testing.assert_close(torch.from_numpy(rows[:100]), lf.sample(f, given, 5), rtol=1e-4, atol=1e-5)


def test_what_f_may_be() -> None:
    f = _model()
    assert np.array_equal(_rows(generator(f, 5)), _rows(f))
    image = lf.Linearizer(perturb(lf.image_flow(1, 4, 2, 8)), lf.TimeLowRank(16, 2))
    assert next(lf.sample_stream(image, 3, steps=5, block_size=2)).shape == (3, 1, 4, 4)
    assert _rows(image.bfloat16(), 3).dtype == np.float32  # which numpy lacks
    with pytest.raises(ValueError, match=r"for a Flow: .*; a flow maps data to noise: .* give lf.Density\(flow\)$"):
        _stream(lf.Flow([lf.Permute(2)]), None, seed=1)
    with pytest.raises(ValueError, match=r"must be given for an Inverse: its noise has no known shape$"):
        _stream(lf.Inverse(lf.Flow([lf.Permute(2)])), None, seed=1)
    with pytest.raises(ValueError, match="noise_shape must be given for a Tanh"):
        lf.sample_stream(torch.nn.Tanh(), 3)


def test_gradients_stay_as_the_caller_has_them() -> None:
    for batch in lf.sample_stream(_model(), 40, 10, steps=5, block_size=16):
        assert torch.is_grad_enabled()
        assert not batch.requires_grad


# Files: resuming, refusing, running out of room.


class _Stopped(Exception):
    pass


def _stop_after(monkeypatch, blocks: int) -> None:
    """Let this many blocks be written, then stop like an interruption between a write and its commit."""
    write, written = outputs.NpyFile.write, []

    def counted(self, start, rows):
        if len(written) == blocks:
            raise _Stopped
        written.append(start)
        write(self, start, rows)

    monkeypatch.setattr(outputs.NpyFile, "write", counted)


@pytest.mark.parametrize("blocks", [0, 1, 3, 6])
def test_an_interrupted_file_is_gone_on_with(blocks: int, tmp_path: Path, monkeypatch) -> None:
    f, path = _model(), tmp_path / "x.npy"
    with monkeypatch.context() as patch:
        _stop_after(patch, blocks)
        with pytest.raises(_Stopped):
            _stream(f, path)
    done = json.loads((tmp_path / "x.npy.json").read_text())["done"]
    assert done == blocks // 2 * 32  # batches of 30 are two blocks of 16
    assert np.load(path).shape == (100, N)
    assert np.array_equal(np.load(path)[:done], _rows(f)[:done])
    computed = []
    noise = stream._Source.noise
    monkeypatch.setattr(stream._Source, "noise", lambda self, i: computed.append(i) or noise(self, i))
    assert np.array_equal(_stream(f, path, batch_size=50), _rows(f, 100))
    left = [
        i for i in computed[: computed.index(6) + 1] if i
    ]  # without the example, block 0, which gives the shape
    assert left == list(range(max(done // 16, 1), 7))


def test_a_finished_file_is_left_alone(tmp_path: Path) -> None:
    f, path = _model(), tmp_path / "x.npy"
    _stream(f, path)
    before = path.stat().st_mtime_ns
    assert np.array_equal(_stream(f, path), _rows(f))
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, "another run.*seed: 0, now 1"),
        ({"steps": 6}, "steps: 5, now 6"),
        ({"method": "euler"}, "method: 'rk4', now 'euler'"),
        ({"stop": 0.5}, "stop: None, now 0.5"),
        ({"count": 101}, "count: 100, now 101"),
        ({"block_size": 8}, "block_size: 16, now 8"),
    ],
)
def test_a_file_of_another_run_is_refused(change: dict[str, object], match: str, tmp_path: Path) -> None:
    f, path = _model(), tmp_path / "x.npy"
    _stream(f, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        _stream(f, path, **change)
    with torch.no_grad():
        next(f.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="weights"):
        _stream(f, path)
    assert path.read_bytes() == before


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    f, path, record = _model(), tmp_path / "x.npy", tmp_path / "x.npy.json"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="has no record"):
        _stream(f, path)
    assert path.read_bytes() == b"mine"
    path.unlink()
    _stream(f, path)
    whole, text = path.read_bytes(), record.read_text()
    for data, match in (
        (whole[:-4], "does not match its record"),
        (b"x" * 300, "is not the .npy file"),
        (None, "missing"),
    ):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(ValueError, match=match):
            _stream(f, path)
    path.write_bytes(whole)
    for broken in (text[:20], "[]", "{}"):
        record.write_text(broken)
        with pytest.raises(ValueError, match="is not a record of a run"):
            _stream(f, path)


def test_no_room_from_the_start_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"cannot create .*x.npy \(No space left"):
        _stream(_model(), tmp_path / "x.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_any_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot create .*x.npy \(no file has \d+ bytes"):
        _stream(_model(), tmp_path / "x.npy", count=2**62)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_is_written(tmp_path: Path, monkeypatch) -> None:
    f, path = _model(), tmp_path / "x.npy"

    class Full:
        """A raw file that takes 100 bytes at a time, and 1000 in all."""

        def __init__(self, file) -> None:
            self.file, self.room = file, 1000

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, data) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = self.file.write(data[: min(100, self.room)])
            self.room -= taken
            return taken

    with monkeypatch.context() as patch:
        enter = outputs.NpyFile.__enter__
        patch.setattr(
            outputs.NpyFile, "__enter__", lambda self: setattr(self, "file", Full(self.file)) or enter(self)
        )
        with pytest.raises(
            OSError, match=r"cannot write .*No space left.*first 32 rows of 100 are valid"
        ) as raised:
            _stream(f, path)
    assert raised.value.errno == errno.ENOSPC
    assert np.array_equal(np.load(path)[:32], _rows(f)[:32])
    assert np.array_equal(_stream(f, path), _rows(f))


# Processes: killed, and several.


def _command(f: Path, out: Path, count: int) -> list[str]:
    return ["sample", "--checkpoint", str(f), "--count", str(count), "--out", str(out), "--steps", "5"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    lf.save(_model(), tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


def test_a_killed_command_is_gone_on_with(checkpoint: Path, tmp_path: Path, capsys) -> None:
    count, path, record = 400_000, tmp_path / "x.npy", tmp_path / "x.npy.json"
    process = CONTEXT.Process(target=main, args=(_command(checkpoint, path, count),))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (record.exists() and json.loads(record.read_text())["done"] > 0):
        time.sleep(0.01)
    process.kill()
    process.join()
    done = json.loads(record.read_text())["done"]
    assert 0 < done < count
    assert main(_command(checkpoint, path, count)) == 0
    assert capsys.readouterr().out.endswith(f"x.npy: float32 ({count}, {N})\n")
    whole = np.zeros((count, N), np.float32)
    lf.sample_stream(lf.load(checkpoint), count, out=whole, steps=5)
    assert np.array_equal(np.load(path), whole)


def _printed(arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments) == 0
    return printed.getvalue()


def test_two_processes_write_the_file_of_one(checkpoint: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    assert main(_command(checkpoint, one, 9000)) == 0
    printed = results_of_two(_printed, [*_command(checkpoint, two, 9000), "--batch-size", "1000"])
    assert "".join(printed).count("two.npy: float32") == 1
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.long
def test_torchrun_writes_the_file_of_one_process(checkpoint: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    assert main(_command(checkpoint, one, 9000)) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "linfast.cli", *_command(checkpoint, two, 9000), "--batch-size", "1000"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.npy: float32") == 1
    assert one.read_bytes() == two.read_bytes()


def test_the_command_reports_errors_in_one_line(checkpoint: Path, tmp_path: Path, capsys) -> None:
    for arguments, match in (
        (_command(tmp_path / "none", tmp_path / "x.npy", 3), "none: no such file"),
        (_command(checkpoint, tmp_path / "x.npy", 0), "count must be at least 1; got 0"),
        ([*_command(checkpoint, tmp_path / "x.npy", 3), "--steps", "1"], "steps must be at least 2"),
        ([*_command(checkpoint, tmp_path / "x.npy", 3), "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (_command(checkpoint, checkpoint, 3), "exists and has no record"),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("linfast sample: ")
        assert match in err
        assert err.count("\n") == 1
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f: _stream(f, None, batch_size=0), ValueError, "batch_size must be.*got 0"),
        (lambda f: _stream(f, None, block_size=2.5), TypeError, "block_size must be.*got 2.5"),
        (lambda f: _stream(f, None, seed=-1), ValueError, "seed must be.*got -1"),
        (lambda f: _stream(f, torch.zeros(99, N)), ValueError, r"out must be \(100, 6\).*got \(99, 6\)"),
        (lambda f: _stream(f, np.zeros((100, N))), ValueError, "of float32; got.*float64"),
        (lambda f: _stream(f, None, method="rk5"), ValueError, "'rk5'"),
        (lambda f: _stream("f", None), TypeError, "f must be a Linearizer or a module.*str"),
    ],
)
def test_bad_calls(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(_model())


def _out_of(kind: str, tmp_path: Path) -> np.ndarray | torch.Tensor:
    """An array or tensor [20, N] in memory."""
    zeros = np.zeros((20, N), np.float32)
    if kind == "a read-only map":
        np.save(tmp_path / "m.npy", zeros)
        return np.load(tmp_path / "m.npy", mmap_mode="r")
    if kind == "a read-only array":
        zeros.flags.writeable = False
    if kind == "inference":
        with torch.inference_mode():
            return torch.zeros(20, N)
    made = {
        "a row that is repeated": np.broadcast_to(zeros[:1], (20, N)),
        "overlapping rows": np.lib.stride_tricks.as_strided(zeros, (20, N), (4, 4)),
        "an expanded row": torch.zeros(1, N).expand(20, N),
        "overlapping rows of a tensor": torch.zeros(99).as_strided((20, N), (2, 1)),
        "meta": torch.zeros(20, N, device="meta"),
        "sparse": torch.zeros(20, N).to_sparse(),
        "rows backwards": zeros[::-1],
        "columns backwards": zeros[:, ::-1],
        "columns first": np.zeros((N, 20), np.float32).T,
        "every second": np.zeros((40, 2 * N), np.float32)[::2, ::2],
        "not aligned": np.frombuffer(bytearray(80 * N + 1), np.uint8)[1:].view(np.float32).reshape(20, N),
        "a tensor's columns first": torch.zeros(N, 20).T,
    }
    return made.get(kind, zeros)


@pytest.mark.parametrize(
    ("kind", "why"),
    {
        "a read-only map": "cannot be written to: it is read-only",
        "a read-only array": "cannot be written to: it is read-only",
        "a row that is repeated": "cannot be written to: it is read-only",
        "overlapping rows": "cannot be written to: it overlaps itself",
        "an expanded row": "cannot be written to: it overlaps itself",
        "overlapping rows of a tensor": "cannot be written to: it overlaps itself",
        "inference": "cannot be written to: it was made in torch.inference_mode",
        "meta": "is on the meta device",
        "sparse": "must be a dense tensor",
    }.items(),
)
def test_what_cannot_be_written_to_is_refused(kind: str, why: str, tmp_path: Path) -> None:
    out = _out_of(kind, tmp_path)
    with pytest.raises((ValueError, TypeError), match=f"^out {why}"):
        _stream(torch.nn.Tanh(), out, 20, noise_shape=(N,))
    assert kind == "meta" or not np.asarray(out.to_dense() if kind == "sparse" else out).any()


@pytest.mark.parametrize(
    "kind",
    [
        "rows backwards",
        "columns backwards",
        "columns first",
        "every second",
        "not aligned",
        "a tensor's columns first",
    ],
)
def test_an_array_may_have_any_memory_layout(kind: str, tmp_path: Path) -> None:
    f, out = torch.nn.Tanh(), _out_of(kind, tmp_path)
    assert _stream(f, out, 20, noise_shape=(N,)) is out
    assert np.array_equal(np.asarray(out), _rows(f, 20, noise_shape=(N,)))


class _Returns(torch.nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> object:
        return self.change(x)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x: x[:7], ValueError, r"a sample for each row of noise, \[16, ...\].* returned \(7, 6\)"),
        (lambda x: torch.cat((x, x)), ValueError, r"returned \(32, 6\)"),
        (lambda x: x.mean(0), ValueError, r"returned \(6,\)"),
        (lambda x: x.sum(), ValueError, r"returned \(\)"),
        (lambda x: x.T, ValueError, r"returned \(6, 16\)"),
        (lambda x: (x, x.sum(1)), TypeError, "one dense tensor; a _Returns returned tuple"),
        (lambda x: None, TypeError, "returned NoneType"),
        (lambda x: x.numpy(), TypeError, "returned ndarray"),
        (lambda x: x.to_sparse(), TypeError, "returned torch.sparse_coo"),
        (lambda x: x.to("meta"), TypeError, "returned .* on meta"),
    ],
)
def test_outputs_other_than_a_sample_per_row_are_refused(
    change, error: type[Exception], match: str, tmp_path: Path
) -> None:
    for out in (tmp_path / "x.npy", np.zeros((20, N), np.float32), None):
        with pytest.raises(error, match=match):
            list(_stream(_Returns(change), out, 20, noise_shape=(N,)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [lambda x: x[:, :3], lambda x: x.double()])
@pytest.mark.parametrize("sink", ["file", "array", "iterator"])
def test_samples_that_change_their_shape_or_dtype_are_refused(change, sink: str, tmp_path: Path) -> None:
    out = {"file": tmp_path / "x.npy", "array": np.zeros((20, N), np.float32), "iterator": None}[sink]
    calls = itertools.count(sink == "iterator")  # which has no probe
    with pytest.raises(ValueError, match="samples of one shape and dtype"):
        list(_stream(_Returns(lambda x: change(x) if next(calls) == 2 else x), out, 20, noise_shape=(N,)))


def test_samples_may_be_parameters_views_or_of_a_dtype_that_numpy_lacks(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(16, N))
    for change in (
        lambda x: weight,
        lambda x: torch.complex(x, x).conj().imag,
        lambda x: x.bfloat16(),
        lambda x: x.to(torch.float8_e4m3fn),
    ):
        rows = _rows(_Returns(change), 20, noise_shape=(N,))
        assert rows.dtype == np.float32
        (tmp_path / "x.npy.json").unlink(missing_ok=True)
        (tmp_path / "x.npy").unlink(missing_ok=True)
        assert np.array_equal(_stream(_Returns(change), tmp_path / "x.npy", 20, noise_shape=(N,)), rows)
