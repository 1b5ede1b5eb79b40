"""tests.gpu.plugin in a separate pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import os
def test_passes(): pass
def test_fails(): assert 1 == 2, "a wrong number"
def test_breaks_the_card(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after_it(): assert os.getpid() != FIRST
def test_last(): pass
""".replace("FIRST", "int(open(os.environ['PLACE']).read())")
CONFTEST = """
import os
def pytest_runtest_call(item):
    if item.name == "test_breaks_the_card": open(os.environ["PLACE"], "w").write(str(os.getpid()))
"""
# As on a machine without pytest-timeout, where pytest does not know its settings.
WITHOUT_TIMEOUT = """
import importlib.util, sys, pytest
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pytest_timeout" else found(name, *rest)
sys.exit(pytest.main(sys.argv[1:] + ["-p", "no:timeout"]))
"""


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], *options: str) -> tuple[int, str]:
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = -q --strict-config -p no:cacheprovider\ntimeout = 60\n"
    )
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name, value in {"PLACE": str(tmp_path / "pid"), "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    options = (*options, "--tb=short", "--no-summary", "-p", "tests.gpu.plugin", "-p", "no:benchmark")
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_failure_is_written_whole_and_a_broken_card_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    status, text = _run(tmp_path, monkeypatch, [sys.executable, "-c", WITHOUT_TIMEOUT])
    assert "unrecognized" not in text.lower()
    assert status != 0
    lines = text.splitlines()
    assert "FAILED test_it.py::test_fails - AssertionError: a wrong number" in lines
    assert any("def test_fails()" in line for line in lines)
    assert lines.index("COUNTS 1 passed, 1 failed, 0 skipped") < len(lines) - 1
    assert "COUNTS 1 passed, 2 failed, 0 skipped" in lines
    assert "LEFT after a CUDA error: no test after it would say anything" in lines


def test_a_process_exits_after_a_cuda_error_and_another_continues(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("xdist")
    command = [sys.executable, "-m", "pytest", "-n", "1", "--dist", "worksteal", "--max-worker-restart", "9"]
    status, text = _run(tmp_path, monkeypatch, command)
    assert status == 1
    assert "COUNTS 3 passed, 2 failed, 0 skipped" in text.splitlines()
    assert "test_after_it - " not in text
