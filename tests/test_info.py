"""``linfast info``: true, complete, and printed where Triton, a GPU or a working driver is missing."""

from __future__ import annotations

import importlib
import os
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from linfast.bench import environment

import linfast
from linfast.cli import main

info = importlib.import_module("linfast.info")

_FIRST = {
    "GPU": "torch finds none",
    "GPU driver": "none found",
    "backend": "auto; on cpu: plain torch (x is on cpu)",
}


@pytest.fixture
def printed(capsys, monkeypatch):
    """A function that runs the command and returns its facts by name. The machine has no GPU and no driver."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(info, "lines_after", lambda path, key: [] if "driver" in path else ["a processor"])
    monkeypatch.setenv("PATH", "")
    for name in [name for name in os.environ if name.startswith(info._VARIABLES)]:
        monkeypatch.delenv(name)

    def run() -> dict[str, list[str]]:
        assert main(["info"]) == 0
        facts: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines():
            name, _, fact = line.partition("  ")
            facts.setdefault(name, []).append(fact.strip())
        return facts

    return run


@pytest.fixture
def gpus(printed, monkeypatch):
    """Two GPUs, as torch describes them."""
    described = [
        SimpleNamespace(name=f"GPU of kind {letter}", major=9, minor=minor, total_memory=80 * 2**30)
        for minor, letter in enumerate("AB")
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(described))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: described[index])


def _nvidia_smi(folder: Path, monkeypatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}")


def test_a_machine_without_a_gpu(printed) -> None:
    facts = printed()
    assert facts["linfast"] == [linfast.__version__]
    assert facts["torch"][0].startswith(f"{torch.__version__}, built for ")
    assert facts["numpy"] == [numpy.__version__]
    assert facts["processor"][0].startswith("a processor, ")
    assert f"{os.cpu_count()} logical cores" in facts["processor"][0]
    assert facts["threads"][0].startswith(f"{torch.get_num_threads()} ")
    assert {name: facts[name] for name in _FIRST} == {name: [fact] for name, fact in _FIRST.items()}
    assert "is set" in facts["environment"][0]
    assert facts.keys() == info._FACTS.keys()


def test_installed_optional_packages_are_listed_by_extra(printed, monkeypatch) -> None:
    needs = ["torch>=2", 'tqdm>=4; extra == "demo"', 'absent>=1; extra == "demo"', 'linfast[demo]; extra == "dev"']
    monkeypatch.setattr(info, "requires", lambda name: [*needs, "absent; extra == 'more'"])
    monkeypatch.setattr(info, "version", {"tqdm": "4.5"}.__getitem__)
    monkeypatch.setattr(info, "PackageNotFoundError", KeyError)
    facts = printed()
    assert facts["optional"] == ["demo: tqdm 4.5", "more: none installed"]
    assert facts["triton"] == ["not installed"]


def test_without_the_metadata_of_linfast_all_else_is_printed(printed, monkeypatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(info, "requires", missing)
    facts = printed()
    assert facts["optional"][0].startswith("cannot be read: PackageNotFoundError: ")
    assert facts["numpy"] == [numpy.__version__]


def test_every_gpu_and_the_driver(printed, gpus, tmp_path: Path, monkeypatch) -> None:
    _nvidia_smi(tmp_path, monkeypatch, "echo 580.65; echo 580.65")
    facts = printed()
    assert facts["GPU"] == [f"{i}: GPU of kind {'AB'[i]}, compute capability 9.{i}, 80.0 GiB" for i in (0, 1)]
    assert facts["GPU driver"] == ["580.65"]


def test_kernels_where_they_run(printed, kernels, monkeypatch) -> None:
    monkeypatch.setattr(info, "resolve_precision", lambda x: "high")
    facts = printed()
    assert facts["backend"] == ["auto; on cpu: Triton kernels"]
    assert facts["precision"][0].startswith("high ")


def test_a_broken_driver_is_reported(printed, gpus, tmp_path: Path, monkeypatch) -> None:
    """nvidia-smi fails, torch counts a GPU that it cannot use, and warns in several lines."""

    def fail(index: int) -> None:
        warnings.warn("CUDA initialization:\n  the driver is too old", stacklevel=1)
        raise RuntimeError("CUDA unknown error\n  with a second line")

    _nvidia_smi(tmp_path, monkeypatch, "echo driver/library version mismatch; exit 18")
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(
        torch, "empty", lambda *size, device=None: torch.zeros(1) if str(device) == "cpu" else fail(0)
    )
    facts = printed()
    assert facts["GPU"] == ["cannot be read: RuntimeError: CUDA unknown error with a second line"]
    assert facts["GPU driver"] == ["none found"]
    gpu, cpu = facts["backend"]
    assert gpu == "auto; on cuda: cannot run: CUDA unknown error with a second line"
    assert cpu == _FIRST["backend"]
    assert set(facts["warning"]) == {"CUDA initialization: the driver is too old"}


def test_a_loaded_driver_is_found_without_nvidia_smi(printed, monkeypatch) -> None:
    lines = {"/proc/driver/nvidia/version": ["NVIDIA Kernel Module  580.65"]}
    monkeypatch.setattr(info, "lines_after", lambda path, key: lines.get(path, []))
    assert printed()["GPU driver"] == ["NVIDIA Kernel Module 580.65"]


def test_settings_of_the_environment(printed, monkeypatch) -> None:
    monkeypatch.setenv("LINFAST_RANGES", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("MY_SECRET", "unseen")
    with linfast.backend("reference"):
        facts = printed()
    assert facts["environment"] == ["LINFAST_RANGES=1", "TRITON_INTERPRET=0"]
    assert facts["backend"] == ["reference; on cpu: plain torch (the backend is 'reference')"]


def test_a_backend_that_cannot_run_here(printed) -> None:
    with linfast.backend("triton"):
        assert printed()["backend"][0].startswith("triton; on cpu: cannot run: backend 'triton' was chosen on cpu")


def test_a_benchmark_records_the_same_processor_and_versions(printed) -> None:
    facts, record = printed(), environment.describe(torch.device("cpu"))
    assert record["device"] == "a processor"
    assert [[record["numpy"]], [record["triton"]]] == [facts["numpy"], facts["triton"]]
