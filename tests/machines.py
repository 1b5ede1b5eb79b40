"""Runs the tests of ops and laws as on other machines: with other BLAS instructions, threads and seeds.

    python -m tests.machines                          every setting times seeds 0 to 9, and the ten tightest tests
    python -m tests.machines --setting default --seeds 0 1
    python -m tests.machines --random                 one setting, one seed but 0, a quarter of the files, as in CI

Seed 0, which is pytest's, runs every test; other seeds leave out those that compile, export or check how an op is
registered, which draw no random numbers. A run fails where a test fails; the matrix also fails where a test exceeds
0.7 of its limit, since another machine may be worse (see ``tests.margins`` for what is measured).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from linfast.tables import aligned

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "MKL AVX2": {"MKL_CBWR": "AVX2"},
    "SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"},
    "ATen AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "two threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},  # spinning threads block other runs
}
SEEDS = range(10)
TESTS = ("tests/ops", "tests/laws")
LARGEST_MARGIN = 0.7
_AT_A_TIME = 2
_SAME_FOR_EVERY_SEED = "compile or opcheck or export"
# Assertions are rewritten differently where margins are measured.
_BYTECODE = {"PYTHONPYCACHEPREFIX": str(ROOT / "build" / "machines"), "PYTHONDONTWRITEBYTECODE": ""}
_SHOWN = 10


@dataclass(frozen=True)
class Run:
    """One setting and seed: pytest's last line, the failed tests, and each test's error over its allowance."""

    setting: str
    seed: int
    summary: str
    failed: Sequence[str]
    seconds: float
    margins: dict[str, float] = field(repr=False)

    @property
    def tightest(self) -> float:
        return max(self.margins.values(), default=0.0)


def run(setting: str, seed: int, tests: Sequence[str] = TESTS) -> Run:
    """Run these tests in one process."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        margins = Path(folder) / "margins.json"
        changed = {"LINFAST_TEST_SEED": str(seed), **_BYTECODE, **SETTINGS[setting]}
        command = [sys.executable, "-m", "pytest", *tests, "-p", "tests.margins", "--margins", str(margins)]
        command += ["-o", "enable_assertion_pass_hook=true", "--tb=short", "-rfE"]
        command += ["-k", f"not ({_SAME_FOR_EVERY_SEED})"] if seed else []
        done = subprocess.run(command, cwd=ROOT, env=os.environ | changed, capture_output=True, text=True)
        measured = json.loads(margins.read_text()) if margins.exists() else {}
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:] or "no output"]
    failed = [line.partition(" ")[2] for line in lines if re.match("(FAILED|ERROR) ", line)]
    if done.returncode and not failed:
        failed = [f"pytest ended with status {done.returncode}"]
    return Run(setting, seed, lines[-1].strip("= "), failed, time.monotonic() - start, measured)


def quarter_of_the_files() -> list[str]:
    """Of the tests, chosen at random."""
    files = [str(path.relative_to(ROOT)) for folder in TESTS for path in sorted((ROOT / folder).glob("test_*.py"))]
    return sorted(random.SystemRandom().sample(files, (len(files) + 3) // 4))


def tightest(runs: Sequence[Run]) -> list[tuple[float, str, Run]]:
    """The tests that came nearest to their limits, each in its worst run."""
    worst: dict[str, tuple[float, str, Run]] = {}
    for each in runs:
        for test, margin in each.margins.items():
            if test not in worst or margin > worst[test][0]:
                worst[test] = (margin, test, each)
    return sorted(worst.values(), key=lambda row: -row[0])[:_SHOWN]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.machines", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="default: all of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 to 9")
    parser.add_argument("--random", action="store_true", help="one setting, one seed but 0, a quarter of the files")
    options = parser.parse_args(arguments)
    pairs = [(setting, seed) for setting in options.setting or SETTINGS for seed in options.seeds]
    tests: Sequence[str] = TESTS
    if options.random:
        tests = quarter_of_the_files()
        pairs = [random.SystemRandom().choice([pair for pair in pairs if pair[1]] or pairs)]
        print(f"setting {pairs[0][0]!r}, seed {pairs[0][1]}, {' '.join(tests)}", flush=True)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        runs = []
        for done in pool.map(functools.partial(run, tests=tests), *zip(*pairs, strict=True)):
            runs.append(done)
            print(f"{done.setting}, seed {done.seed}: {done.summary}; tightest {done.tightest:.2f}", flush=True)
            print("".join(f"    {test}\n" for test in done.failed), end="", flush=True)
    rows = [(f"{margin:.2f}", test, each.setting, str(each.seed)) for margin, test, each in tightest(runs)]
    print(aligned([("error / allowance", "test", "setting", "seed"), *rows]))
    too_near = not options.random and any(each.tightest > LARGEST_MARGIN for each in runs)
    return int(too_near or any(each.failed for each in runs))


if __name__ == "__main__":
    sys.exit(main())
