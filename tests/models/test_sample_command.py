"""``linfast sample``: what it refuses to replace, and how it goes on."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch

import linfast as lf
from linfast.cli import main
from linfast.sampling import stream


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    lf.save(lf.Linearizer(lf.coupling_flow(4, 1, (4,)), lf.TimeLowRank(4, 1, hidden=4)), tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


def _sample(model: Path, out: Path | str, *more: str, count: int = 3000) -> int:
    fixed = ["--checkpoint", str(model), "--out", str(out), "--batch-size", "1024", "--steps", "3"]
    return main(["sample", *fixed, "--count", str(count), *more])


def test_files_are_replaced_by_leave_alone(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
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
        patch.setattr("linfast.sampling.command.load", None)  # before any work
        assert _sample(model, out) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in (f"{out} exists", "--resume", "--overwrite"))
        assert _sample(model, tmp_path / "none.npy", "--resume") == 2
        assert "none.npy.json: no record of a run to resume" in capsys.readouterr().err
        for no_file in (tmp_path, "/dev/null"):
            assert _sample(model, no_file, "--overwrite") == 2
            assert f"{no_file} exists and is no file" in capsys.readouterr().err
        assert _sample(model, out, "--steps", str(10**7)) == 2
        assert "steps must be at most 1000000; got 10000000" in capsys.readouterr().err
        assert _sample(model, model, "--overwrite") == 2
        assert "it is the checkpoint" in capsys.readouterr().err


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
    noise = stream._Source.noise

    def interrupted(self: stream._Source, index: int) -> torch.Tensor:
        if index == 2:
            signal.raise_signal(signal.SIGINT)
        return noise(self, index)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(stream._Source, "noise", interrupted)
        assert _sample(model, out) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "linfast sample: interrupted; " in error
    assert "the same command goes on from there" in error
    assert _sample(model, out) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert re.fullmatch(r"sampling: 3000/3000 samples, \d+ s\n", capsys.readouterr().err)
