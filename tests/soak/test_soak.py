"""The soak detects the faults that it looks for; and a short soak with one or two signals passes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from .jobs import TRAININGS, Job, differences, training
from .soak import Soak


def _job(folder: Path) -> Job:
    job = training("one-step", folder)
    folder.mkdir()
    for name in job.files:
        (folder / name).write_bytes(b"same")
    torch.save({"step": 1, "losses": [torch.zeros(2), torch.ones(2)]}, folder / "checkpoint.pt")
    return job


def test_what_differs_is_found(tmp_path: Path) -> None:
    whole = _job(tmp_path / "whole")
    job = Job(whole.first, whole.again, whole.begun, tmp_path / "job", whole.files)

    def found(change) -> str:
        shutil.rmtree(job.folder, ignore_errors=True)
        shutil.copytree(whole.folder, job.folder)
        change()
        return "; ".join(differences(job, whole))

    def saved(value: object):
        return lambda: torch.save(value, job.folder / "checkpoint.pt")

    one_bit = torch.tensor([0.0, -0.0])
    assert found(lambda: None) == ""
    assert found(lambda: (job.folder / "figure.png").unlink()) == "figure.png differs"
    assert found(lambda: (job.folder / "model.safetensors").write_bytes(b"sane")) == "./model.safetensors differs"
    assert found(saved({"step": 2, "losses": [torch.zeros(2), torch.ones(2)]})) == "./checkpoint.pt differs"
    assert found(saved({"step": 1, "losses": [one_bit, torch.ones(2)]})) == "./checkpoint.pt differs"
    assert found(saved({"step": 1, "losses": [torch.zeros(2)]})) == "./checkpoint.pt differs"
    assert found(lambda: (job.folder / "more").write_bytes(b"")) == f"{job.folder / 'more'} is left over"


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "one-step"])
def test_a_short_soak(name: str, tmp_path: Path, monkeypatch) -> None:
    """ "one-step, averaged" keeps all that "one-step" does, and more."""
    monkeypatch.setattr("tests.soak.soak.TRAININGS", {name: TRAININGS[name]})
    soak = Soak(tmp_path, seed=len(name), kills=2, count=50_000)
    assert soak.cycle(1).startswith(name)
    assert soak.done.total() >= 1
