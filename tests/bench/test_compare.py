"""--compare: finds no change between a commit and itself, and finds a real change; its statistics."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from linfast.bench import compare
from linfast.bench.compare import interval, verdict
from linfast.bench.run import parser

import linfast

SOURCE = Path(linfast.__file__).resolve().parent
ROOT = SOURCE.parent
TINY = ("--sizes", "tiny", "--no-compile", "--device", "cpu")
SLOW = """

_fast = affine_coupling


def affine_coupling(*arguments, **options):
    import time

    time.sleep(0.002)
    return _fast(*arguments, **options)
"""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """linfast in a separate folder."""
    for name, folder in (("linfast", SOURCE), ("kernels", ROOT / "kernels"), ("bench", ROOT / "bench")):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "bench", "kernels"))
    if not (tmp_path / "linfast/bench").exists():
        (tmp_path / "linfast/bench").symlink_to("../bench")
        (tmp_path / "linfast/kernels").symlink_to("../kernels")
    return tmp_path


def _make_slow(tree: Path) -> None:
    with (tree / "linfast/ops/affine_coupling.py").open("a") as file:
        file.write(SLOW)


def test_a_slower_case_is_found_and_a_missing_or_wrong_one_is_noted(tree: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "REPLICATES", 1)
    monkeypatch.setattr(compare, "PAIRS", 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = tree / "base"
    shutil.copytree(tree / "linfast", base / "linfast", symlinks=True)
    shutil.copytree(tree / "kernels", base / "kernels")
    with (base / "linfast/ops/depthwise_conv.py").open("a") as file:
        file.write("\n\ndef depthwise_conv(x):\n    return x\n")
    low_rank = tree / "linfast/ops/low_rank.py"
    low_rank.write_text(
        low_rank.read_text().replace("return y if alpha == 0 else alpha * x + y\n", "return 1.001 * y\n")
    )
    _make_slow(tree)
    cases = [f"--case={name}" for name in ("depthwise_conv", "low_rank", "affine_coupling")]
    moved, notes = compare.compare_trees(tree, base, parser().parse_args([*cases, *TINY]))
    assert [(m.case, m.provider) for m in moved] == [("low_rank", "materialised"), ("affine_coupling", "eager")]
    assert moved[1].verdict == "slower"
    missing, refused = notes
    assert missing.startswith("depthwise_conv: not on both sides, at base: TypeError: depthwise_conv() takes 1")
    assert refused.startswith("low_rank eager: refused here: error 0.001")


class _Side:
    """A side whose calls take this many milliseconds; ``turns`` lists the sides called, without warm-up calls."""

    turns: ClassVar[list[str]] = []

    def __init__(self, tree: Path) -> None:
        self.tree, self.ms = tree, {"here": 20.0, "there": 10.0}[tree.name]

    def ask(self, request: dict) -> dict:
        return {"providers": ["eager"], "refused": {}}

    def time(self, provider: str, calls: int) -> list[float]:
        if calls == 1:
            self.turns.append(self.tree.name)
        return [self.ms] * calls


def test_sides_take_turns_in_every_replicate(monkeypatch) -> None:
    monkeypatch.setattr(compare, "_side", lambda tree: contextlib.nullcontext(_Side(tree)))
    monkeypatch.setattr(compare, "PAIRS", 2)
    _Side.turns.clear()
    args = parser().parse_args(["--case", "affine_coupling", *TINY])
    [moved], notes = compare.compare_trees(Path("here"), Path("there"), args)
    assert notes == []
    assert (moved.ratio, moved.intervals, moved.verdict) == (2.0, ((2.0, 2.0),) * 3, "slower")
    pairs = [" ".join(_Side.turns[i : i + 2]) for i in range(0, len(_Side.turns), 2)]
    one_way, other_way = "here there", "there here"
    assert pairs == [one_way, other_way, other_way, one_way, one_way, other_way]


@pytest.mark.parametrize(
    ("spans", "status", "last"),
    [
        ([(0.9, 1.1)] * 3, 0, "no change beyond the noise"),
        ([(0.5, 0.6)] * 3, 0, "1 of 1 moved beyond the noise"),
        ([(1.5, 1.6)] * 3, 1, "1 of 1 moved beyond the noise"),
    ],
    ids=["same", "faster", "slower"],
)
def test_a_commit_is_checked_out_compared_with_and_removed(
    spans: list, status: int, last: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    _git(tmp_path, "init", "-q")
    for text in ("then", "since"):
        (tmp_path / "file").write_text(text)
        _git(tmp_path, "add", "-A")
        _git(tmp_path, "commit", "-qm", text)
    (tmp_path / "file").write_text("now")

    def compare_trees(head: Path, base: Path, args: argparse.Namespace) -> tuple[list, list]:
        assert ((head / "file").read_text(), (base / "file").read_text()) == ("now", "then")
        return [compare.Moved("affine_coupling", {"batch": 8}, "eager", 1.0, tuple(spans))], []

    monkeypatch.setattr(compare, "compare_trees", compare_trees)
    monkeypatch.setattr(compare.linfast, "__file__", str(tmp_path / "linfast" / "__init__.py"))
    assert compare.run_compare(parser().parse_args(["--compare", "HEAD~1", *TINY])) == status
    _, row, printed = capsys.readouterr().out.splitlines()
    assert row.startswith("affine_coupling  ")
    assert row.endswith(verdict(spans))
    assert printed == last
    assert len(_git(tmp_path, "worktree", "list").splitlines()) == 1, "the worktree of BASE is still there"


def _command(checkout: Path, replicates: int) -> subprocess.CompletedProcess[str]:
    """Replicates of the smallest case."""
    code = f"import sys; from linfast.bench import compare; compare.REPLICATES = {replicates}\n"
    code += "from linfast.bench.run import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "--compare", "HEAD", "--case", "affine_coupling", *TINY],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.long
def test_a_commit_equals_itself_and_a_slower_one_is_found(tree: Path) -> None:
    _git(tree, "init", "-q")
    _git(tree, "add", "-A")
    _git(tree, "commit", "-qm", "one")
    same = _command(tree, 2)
    assert same.returncode == 0, same.stderr
    assert same.stdout.splitlines()[-1] == "no change beyond the noise"
    _make_slow(tree)
    slower = _command(tree, 1)
    assert slower.returncode == 1, slower.stderr
    [row] = [line for line in slower.stdout.splitlines() if line.startswith("affine_coupling")]
    assert row.endswith("slower")
    assert slower.stdout.splitlines()[-1] == "1 of 1 moved beyond the noise"
    assert len(_git(tree, "worktree", "list").splitlines()) == 1, "the worktree of BASE is still there"


# Statistics.


def test_the_interval_is_the_medians() -> None:
    assert interval(list(range(1, 22))) == (5, 17)  # n = 21: P(fewer than 5 below the median) = 0.0036
    assert interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
    rng = random.Random(0)
    held = 0
    for _ in range(500):
        low, high = interval([rng.lognormvariate(0.0, 0.5) for _ in range(21)])
        held += low <= 1.0 <= high
    assert held >= 485  # 99.28% of 500 is 496


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(1.1, 1.3), (1.2, 1.5), (1.06, 1.07)], "slower"),
        ([(1.1, 1.3), (1.2, 1.5), (1.02, 1.5)], "no change"),
        ([(0.5, 0.9), (0.8, 0.95), (0.9, 0.94)], "faster"),
        ([(0.5, 0.9), (0.8, 0.95), (0.9, 0.97)], "no change"),
        ([(1.01, 1.02)] * 3, "no change"),
        ([(0.2, 0.3), (2.0, 3.0), (0.2, 0.3)], "no change"),
    ],
)
def test_only_what_every_replicate_says_has_moved(intervals: list[tuple[float, float]], expected: str) -> None:
    assert verdict(intervals) == expected
