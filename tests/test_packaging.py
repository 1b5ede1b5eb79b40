"""The sdist builds a wheel, and the wheel contains only the package."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # Without --wheel or --sdist the wheel is built from the sdist, so that an sdist that lacks a file fails here.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(_ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel_has_the_package_and_no_stray_top_level(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        names = archive.namelist()
    for name in ("py.typed", "kernels/__init__.py", "bench/run.py", "bench/cases/__init__.py", "examples/runs.py"):
        assert f"linfast/{name}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"linfast"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_can_be_built_from(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "kernels/__init__.py",
        "examples/trainer.py",
    } <= names


def test_installed_wheel_imports_and_has_the_command(dist: Path, tmp_path: Path) -> None:
    wheel = str(next(dist.glob("*.whl")))
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    modules = "linfast.bench.run, linfast.compat.linearizer, linfast.examples, linfast.kernels"
    code = f"import {modules}, linfast.cli; linfast.cli._parser(); print(linfast.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.stdout.strip() == str(site / "linfast" / "__init__.py"), done.stderr
    assert (site / "bin" / "linfast").exists()
