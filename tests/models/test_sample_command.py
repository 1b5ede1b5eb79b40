"""``linfast sample``: which files it refuses to replace, and how it resumes."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch

import linfast as lf
from linfast.cli import main
from linfast.sampling import outputs, stream
from linfast.sampling.outputs import lock


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    lf.save(lf.Linearizer(lf.coupling_flow(4, 1, (4,)), lf.TimeLowRank(4, 1, hidden=4)), tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


def _sample(model: Path, out: Path | str, *more: str, count: int = 3000) -> int:
    fixed = ["--checkpoint", str(model), "--out", str(out), "--batch-size", "1024", "--steps", "3"]
    return main(["sample", *fixed, "--count", str(count), *more])


_NOISE = stream._Source.noise


def _interrupted_at_block_2(self: stream._Source, index: int) -> torch.Tensor:
    if index == 2:
        signal.raise_signal(signal.SIGINT)
    return _NOISE(self, index)


def test_files_are_replaced_only_on_request(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out, record = tmp_path / "x.npy", tmp_path / "x.npy.json"
    assert _sample(model, out) == 0
    first = out.read_bytes()
    assert _sample(model, out) == _sample(model, out, "--resume") == 0  # the same run, which is complete
    capsys.readouterr()
    for wrong in ((), ("--resume",)):
        assert _sample(model, out, "--seed", "1", *wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(word in error for word in (str(out), "seed", "--resume", "--overwrite"))
    for wrong in (("--count", "0"), ("--steps", "1"), ("--device", "nowhere"), ("--seed", "-1")):
        assert _sample(model, out, "--overwrite", *wrong) == 2  # found before anything is removed
    with pytest.raises(SystemExit):
        _sample(model, out, "--resume", "--overwrite")
    assert out.read_bytes() == first
    assert _sample(model, out, "--seed", "1", "--overwrite") == 0
    assert out.read_bytes() != first
    record.unlink()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("linfast.cli.load", None)  # before any work
        assert _sample(model, out) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in (f"{out} exists", "--resume", "--overwrite"))
        assert _sample(model, tmp_path / "none.npy", "--resume") == 2
        assert "none.npy.json: no record of a run to resume" in capsys.readouterr().err
        for no_file in (tmp_path, "/dev/null"):
            assert _sample(model, no_file, "--overwrite") == 2
            assert re.search(f"{no_file} is a .* and no file", capsys.readouterr().err)
        assert _sample(model, out, "--steps", str(10**7)) == 2
        assert "steps must be at most 1000000; got 10000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "count", "says"),
    [
        ("other", b"", 2**53, "cannot create"),
        ("x.npy.json", None, 3000, "x.npy.json is a folder and no file"),
        ("x.npy.json", b'{"my": "settings"}', 3000, "x.npy.json is not a record of a run"),
        ("x.npy.json", b'{"run": {}, "done', 3000, "x.npy.json is not a record of a run"),
    ],
)
def test_overwriting_that_cannot_be_done_loses_nothing(
    name: str, content: bytes | None, count: int, says: str, model: Path, tmp_path: Path, capsys
) -> None:
    out, other = tmp_path / "x.npy", tmp_path / name
    assert _sample(model, out) == 0
    other.unlink(missing_ok=True)
    other.mkdir() if content is None else other.write_bytes(content)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert _sample(model, out, "--overwrite", count=count) == 2
    assert says in capsys.readouterr().err
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["x.npy", "x.npy.json"])
@pytest.mark.parametrize("linked", [False, True])
def test_the_checkpoint_is_never_replaced(name: str, linked: bool, model: Path, tmp_path: Path, capsys) -> None:
    checkpoint = tmp_path / name
    checkpoint.hardlink_to(model)
    before = model.read_bytes()
    assert _sample(model if linked else checkpoint, tmp_path / "x.npy", "--overwrite") == 2
    error = capsys.readouterr().err
    assert f"{name} exists" in error
    assert "it is the checkpoint" in error
    assert checkpoint.read_bytes() == before


def test_a_link_is_not_replaced(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "x.npy").symlink_to(tmp_path / "elsewhere.npy")
    assert _sample(model, tmp_path / "x.npy", "--overwrite") == 2
    assert "x.npy is a link and no file" in capsys.readouterr().err
    assert (tmp_path / "x.npy").is_symlink()


def test_an_interrupted_overwrite_resumes(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out, other = tmp_path / "x.npy", tmp_path / "other.npy"
    assert _sample(model, out) == _sample(model, other, "--seed", "1") == 0
    with monkeypatch.context() as patch:
        patch.setattr(stream._Source, "noise", _interrupted_at_block_2)
        assert _sample(model, out, "--overwrite", "--seed", "1") == 130
    assert "x.npy keeps 2048 samples: the same command resumes" in capsys.readouterr().err
    blocks: list[int] = []
    monkeypatch.setattr(stream._Source, "noise", lambda self, b: (blocks.append(b), _NOISE(self, b))[1])
    assert _sample(model, out, "--overwrite", "--seed", "1") == 0
    assert 1 not in blocks
    assert out.read_bytes() == other.read_bytes()
    assert _sample(model, out, "--seed", "1") == 0  # complete


def test_a_run_killed_before_its_first_record_starts_again(model: Path, tmp_path: Path, monkeypatch) -> None:
    whole, out = tmp_path / "whole.npy", tmp_path / "out.npy"
    assert _sample(model, whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(outputs.NpyFile, "_record", lambda *_: signal.raise_signal(signal.SIGINT))
        assert _sample(model, out) == 130
    assert out.read_bytes() == b""
    assert not (tmp_path / "out.npy.json").exists()
    assert _sample(model, out) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_an_interrupted_overwrite_is_replaced_by_another(model: Path, tmp_path: Path, monkeypatch) -> None:
    out, other = tmp_path / "x.npy", tmp_path / "other.npy"
    with monkeypatch.context() as patch:
        patch.setattr(stream._Source, "noise", _interrupted_at_block_2)
        assert _sample(model, out, "--overwrite") == 130
    assert _sample(model, out, "--overwrite", "--seed", "1") == _sample(model, other, "--seed", "1") == 0
    assert out.read_bytes() == other.read_bytes()


def test_a_file_that_is_being_written_is_not_replaced(model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.npy"
    assert _sample(model, out) == 0
    first = out.read_bytes()
    with open(out, "rb") as file:
        lock(file, str(out))
        assert _sample(model, out, "--overwrite", "--seed", "1") == 2
    assert f"{out} is being written by another run" in capsys.readouterr().err
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    "other",
    [
        lambda: lf.coupling_flow(4, 1, (4,)),
        lambda: lf.Dense(4),
        lambda: lf.Projection(4, 2),
    ],
)
def test_another_kind_of_model_is_refused_by_its_name(other, tmp_path: Path, capsys) -> None:
    lf.save(other(), tmp_path / "other")
    assert _sample(tmp_path / "other", tmp_path / "x.npy") == 2
    assert f"other holds a {type(other()).__name__}: sample takes a Linearizer" in capsys.readouterr().err
    assert not (tmp_path / "x.npy").exists()


def test_an_interruption_says_what_is_kept(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    whole, out = tmp_path / "whole.npy", tmp_path / "out.npy"
    assert _sample(model, whole) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(stream._Source, "noise", _interrupted_at_block_2)
        assert _sample(model, out) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "linfast sample: interrupted; " in error
    assert "the same command resumes from there" in error
    assert _sample(model, out) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert re.fullmatch(r"sampling: 3000/3000 samples, \d+ s\n", capsys.readouterr().err)
