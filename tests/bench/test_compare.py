"""--compare: no change between a commit and itself, a change that is there, and the statistics."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from linfast.bench import compare
from linfast.bench.compare import interval, verdict

import linfast

SOURCE = Path(linfast.__file__).resolve().parent
ROOT = SOURCE.parent
SLOW = """

_fast = affine_coupling


def affine_coupling(*arguments, **options):
    import time

    time.sleep(0.002)
    return _fast(*arguments, **options)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """linfast in a repository of its own, with one commit."""
    for name, folder in (("linfast", SOURCE), ("kernels", ROOT / "kernels"), ("bench", ROOT / "bench")):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "bench", "kernels"))
    if not (tmp_path / "linfast/bench").exists():
        (tmp_path / "linfast/bench").symlink_to("../bench")
        (tmp_path / "linfast/kernels").symlink_to("../kernels")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def _compare(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Two replicates of the smallest case."""
    code = "import sys; from linfast.bench import compare; compare.REPLICATES = 2\n"
    code += "from linfast.bench.run import main; sys.exit(main(sys.argv[1:]))"
    options = [
        "--compare",
        "HEAD",
        "--case",
        "affine_coupling",
        "--sizes",
        "tiny",
        "--no-compile",
        "--device",
        "cpu",
    ]
    return subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_a_commit_and_itself_are_the_same_and_a_slower_one_is_seen(checkout: Path) -> None:
    same = _compare(checkout)
    assert same.returncode == 0, same.stderr
    assert same.stdout.splitlines()[-1] == "no change beyond the noise"
    with (checkout / "linfast/ops/affine_coupling.py").open("a") as file:
        file.write(SLOW)
    slower = _compare(checkout)
    assert slower.returncode == 1, slower.stderr
    [row] = [line for line in slower.stdout.splitlines() if line.startswith("affine_coupling")]
    assert row.endswith("slower")
    assert slower.stdout.splitlines()[-1] == "1 of 1 moved beyond the noise"
    worktrees = subprocess.run(["git", "-C", str(checkout), "worktree", "list"], capture_output=True, text=True)
    assert len(worktrees.stdout.splitlines()) == 1, "the worktree of BASE is still there"


def test_an_op_that_one_side_lacks_and_a_wrong_provider_are_notes(checkout: Path, capsys) -> None:
    from linfast.bench.arguments import parser

    base = checkout / "base"
    shutil.copytree(checkout / "linfast", base / "linfast", symlinks=True)
    shutil.copytree(checkout / "kernels", base / "kernels")
    with (base / "linfast/ops/depthwise_conv.py").open("a") as file:
        file.write("\n\ndef depthwise_conv(x):\n    return x\n")
    low_rank = checkout / "linfast/ops/low_rank.py"
    low_rank.write_text(
        low_rank.read_text().replace("return y if alpha == 0 else alpha * x + y\n", "return 1.001 * y\n")
    )
    argv = ["--case", "depthwise_conv", "--case", "low_rank", "--sizes", "tiny", "--no-compile", "--device", "cpu"]
    moved, notes = compare.compare_trees(checkout, base, parser().parse_args(argv))
    assert [m.provider for m in moved] == ["materialised"]
    missing, refused = notes
    assert missing.startswith("depthwise_conv: not on both sides, at base: TypeError: depthwise_conv() takes 1")
    assert refused.startswith("low_rank eager: refused here: error 0.001")


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
