"""``linfast bench --compare BASE``: times two commits in turn and reports the changes beyond the noise.

Both sides run this checkout's cases: one on linfast as it is here, uncommitted changes included, one on linfast as
it was at BASE, in a git worktree. Each side is a process. They take turns, one burst of calls each, so that other
load on the machine slows both. Pairs of neighbouring bursts give ratios here / BASE. Processes of one program
differ too (memory layout, hash seeds), so this is done with three fresh pairs of processes. A provider is slower
only if for each pair the 99% interval of its median ratio lies above 1 + FLOOR, faster if below 1 / (1 + FLOOR).

A side is this module run as a program. It answers each line of JSON with one line:

    {"build": [case, size], "compile": bool, "device": str}    {"providers": [...], "refused": {what: why}}
    {"time": provider, "calls": n}                             {"ms": [n times]}
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

import torch

import linfast

from .cases import CASES, sizes
from .harness import Options, Problem, UsageError, judged
from .timing import time_interleaved

REPLICATES = 3
PAIRS = 21  # of bursts, in each replicate; the 99% interval of the median is then the 5th to the 17th
FLOOR = 0.05  # two builds of one program on a busy machine have differed by this much in every replicate
CONFIDENCE = 0.99
BURST_MS = 20.0  # that the calls of a burst take; it has at least one call


@dataclass(frozen=True)
class Moved:
    """The time of a provider at one size here, divided by that at BASE: the median, and intervals per replicate."""

    case: str
    size: dict[str, int | str]
    provider: str
    ratio: float
    intervals: tuple[tuple[float, float], ...]

    @property
    def verdict(self) -> str:
        """``verdict`` of the intervals."""
        return verdict(self.intervals)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The median's ``CONFIDENCE`` interval by order statistics: it assumes no distribution."""
    ordered, n = sorted(ratios), len(ratios)
    below, rank = 0.0, 0
    while (below := below + comb(n, rank) / 2**n) <= (1 - CONFIDENCE) / 2:
        rank += 1
    return ordered[max(rank - 1, 0)], ordered[n - 1 - max(rank - 1, 0)]


def verdict(intervals: Sequence[tuple[float, float]]) -> str:
    """ "slower", "faster" or "no change"."""
    if all(low > 1 + FLOOR for low, _ in intervals):
        return "slower"
    if all(high < 1 / (1 + FLOOR) for _, high in intervals):
        return "faster"
    return "no change"


def run_compare(args: argparse.Namespace) -> int:
    """Compare this checkout with the commit ``args.compare``; 1 where something got slower."""
    head = Path(linfast.__file__).resolve().parent.parent
    with _worktree(head, args.compare) as base:
        moved, notes = compare_trees(head, base, args)
    from linfast.tables import aligned

    header = ["case", "size", "provider", "here / base", "99% intervals", "verdict"]
    print(aligned([header, *map(_row, moved)], 3))
    print("\n".join(notes), end="\n" if notes else "")
    changed = [m for m in moved if m.verdict != "no change"]
    print(f"{len(changed)} of {len(moved)} moved beyond the noise" if changed else "no change beyond the noise")
    return int(any(m.verdict == "slower" for m in moved))


def compare_trees(head: Path, base: Path, args: argparse.Namespace) -> tuple[list[Moved], list[str]]:
    """How each provider's time changed from the checkout ``base`` to ``head``, and notes on omitted providers."""
    ratios: dict[tuple[str, str, str], list[list[float]]] = {}
    notes: list[str] = []
    for replicate in range(REPLICATES):
        print(f"replicate {replicate + 1} of {REPLICATES}", file=sys.stderr, flush=True)
        with _side(head) as here, _side(base) as there:
            for name in args.case:
                for size in sizes(CASES[name], args):
                    common, new = _build((here, there), name, size, args)
                    notes += [note for note in new if note not in notes]
                    for provider in common:
                        key = (name, json.dumps(dict(size)), provider)
                        ratios.setdefault(key, []).append(_ratios(here, there, provider, replicate % 2 == 1))
    return [
        Moved(name, json.loads(size), provider, median(map(median, runs)), tuple(map(interval, runs)))
        for (name, size, provider), runs in ratios.items()
    ], notes


def _build(sides: Sequence[_Side], name: str, size: Any, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The providers that both sides have and accept, and notes on why others are left out."""
    request = {"build": [name, dict(size)], "compile": args.compile, "device": str(args.device)}
    here, base = (side.ask(request) for side in sides)
    notes = [
        f"{what} {where}: {why}"
        for where, answer in (("here", here), ("at base", base))
        for what, why in answer["refused"].items()
    ]
    return [provider for provider in here["providers"] if provider in base["providers"]], notes


def _ratios(here: _Side, there: _Side, provider: str, reverse: bool) -> list[float]:
    """The time here over the time there for every pair of bursts; the two alternate in going first."""
    warm = max(median(side.time(provider, 5)) for side in (here, there))
    calls = max(1, min(500, round(BURST_MS / warm)))
    ratios = []
    for pair in range(PAIRS):
        order = (here, there) if (pair % 2 == 0) != reverse else (there, here)
        times = {id(side): median(side.time(provider, calls)) for side in order}
        ratios.append(times[id(here)] / times[id(there)])
    return ratios


class _Side:
    """A process that times calls of one checkout."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UsageError(f"a side of --compare ended with status {self.process.wait()}; its error is above")
        return json.loads(line)

    def time(self, provider: str, calls: int) -> list[float]:
        times: list[float] = self.ask({"time": provider, "calls": calls})["ms"]
        return times


@contextlib.contextmanager
def _side(tree: Path) -> Iterator[_Side]:
    with tempfile.TemporaryDirectory() as folder:
        _lay_out(tree, Path(folder))
        environment = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, "-m", "linfast.bench.compare"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
            try:
                yield _Side(process)
            finally:
                process.kill()


def _lay_out(tree: Path, folder: Path) -> None:
    """Link an importable linfast into ``folder``: linfast and kernels of the tree, benchmarks of this checkout."""
    package = folder / "linfast"
    package.mkdir()
    for path in (tree / "linfast").iterdir():
        if path.name not in ("kernels", "bench", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(tree / "kernels")
    (package / "bench").symlink_to(Path(__file__).resolve().parent)


@contextlib.contextmanager
def _worktree(checkout: Path, revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        _git(checkout, "worktree", "add", "--quiet", "--detach", str(base), revision)
        try:
            yield base
        finally:
            _git(checkout, "worktree", "remove", "--force", str(base))


def _git(checkout: Path, *arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"--compare: git {arguments[0]} {arguments[1]}: {done.stderr.strip()}")


def _row(moved: Moved) -> list[str]:
    size = " ".join(f"{key}={value}" for key, value in moved.size.items())
    spans = " ".join(f"{low:.2f}-{high:.2f}" for low, high in moved.intervals)
    return [moved.case, size, moved.provider, f"{moved.ratio:.3f}", spans, moved.verdict]


def _serve() -> None:
    problem: Problem | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            name, size = request["build"]
            problem, answer = _built(name, size, Options(torch.device(request["device"]), request["compile"]))
        else:
            assert problem is not None
            call = next(p.call for p in problem.providers if p.name == request["time"])
            timings = time_interleaved({"it": call}, problem.inputs, problem.device, rounds=request["calls"])
            answer = {"ms": timings["it"].ms}
        print(json.dumps(answer), flush=True)


def _built(name: str, size: Any, options: Options) -> tuple[Problem | None, dict[str, Any]]:
    try:
        problem = CASES[name].build(size, options)
        verdicts = judged(problem)
    except Exception as error:  # this version of linfast has no such op, or another signature
        missing = {f"{name}: not on both sides,": f"{type(error).__name__}: {error}"}
        return None, {"providers": [], "refused": missing}
    refused = {f"{name} {who}: refused": verdict.refused for who, verdict in verdicts.items() if verdict.refused}
    return problem, {"providers": [who for who in verdicts if not verdicts[who].refused], "refused": refused}


if __name__ == "__main__":
    _serve()
