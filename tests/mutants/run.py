"""Runs mutants: one copy of the checkout per worker, one mutation at a time, and the tests named for it.

The checkout itself is never changed. A copy contains the tracked files in their current state; linfast.kernels and
linfast.bench are links inside it, since an editable install would otherwise find those of the checkout.
No bytecode is written, so that an edit of the same size in the same second is not missed.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .mutant import Mutant

__all__ = ["ROOT", "Copy", "Outcome", "baseline", "copies", "on_copies", "try_mutant"]

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds a mutant
_BASELINE_LIMIT = 600
_LINKS = {f"linfast/{name}": f"../{name}" for name in ("kernels", "bench", "examples")}
# Errors where the mutant is not a valid program, which show nothing about the test.
_NO_PROGRAM = ("SyntaxError", "IndentationError", "NameError", "ImportError", "ModuleNotFoundError")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run of tests.

    Args:
        kind: "passed"; "failure" of a test; "error" before, after or outside of one; "timeout".
        where: the first test that did not pass; empty where it is not known.
        message: its message, in one line.
        seconds: of the whole run.
    """

    kind: str
    where: str
    message: str
    seconds: float


class Copy:
    """A copy of the checkout's tracked files, in which tests run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        for link, target in _LINKS.items():
            (folder / link).symlink_to(target)
        self._check_imports()

    def _check_imports(self) -> None:
        """Raise unless the copy's interpreter finds the copy's code."""
        names = ("linfast", "linfast.kernels", "linfast.bench", "linfast.examples")
        code = f"import {', '.join(names)}; print({', '.join(f'{name}.__file__' for name in names)})"
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=self._environment(), check=True,
            capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        if not all(path.startswith(str(self.folder)) for path in found):
            raise RuntimeError(f"the copy in {self.folder} imports the code of another place: {found}")

    def _environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own}

    @contextmanager
    def with_mutant(self, mutant: Mutant) -> Iterator[None]:
        """The copy with this mutation; it is undone afterwards."""
        path = self.folder / mutant.file
        before = path.read_text()
        path.write_text(mutant.applied(before))
        try:
            yield
        finally:
            path.write_text(before)

    def test(self, tests: Sequence[str], limit: int = LIMIT) -> Outcome:
        """Run these tests until the first that does not pass."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        options = ["-x", "-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests], cwd=self.folder, env=self._environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome("timeout", "", f"longer than {limit} s", time.perf_counter() - start)
        seconds = time.perf_counter() - start
        if process.returncode == 0:
            return Outcome("passed", "", "", seconds)
        return _first_not_passed(report, output, seconds)


def _first_not_passed(report: Path, output: str, seconds: float) -> Outcome:
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
    for case in cases:
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                where = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
                message = " ".join((found.get("message") or "").split())
                kind = "error" if message.startswith(_NO_PROGRAM) else kind
                return Outcome(kind, where, message, seconds)
    return Outcome("error", "", (output.strip().splitlines() or ["no output"])[-1], seconds)


@contextmanager
def copies(count: int) -> Iterator[queue.SimpleQueue[Copy]]:
    """This many copies, in temporary folders."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(count):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="linfast-mutants-"))
            free.put(Copy(Path(folder).resolve()))
        yield free


def on_copies(
    free: queue.SimpleQueue[Copy], work: Callable[[Copy, _Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """work(copy, item) for each item, in order, in parallel on all free copies."""

    def one(item: _Item) -> _Result:
        copy = free.get()
        try:
            return work(copy, item)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(free.qsize()) as pool:
        yield from pool.map(one, items)


def try_mutant(copy: Copy, mutant: Mutant) -> Outcome:
    """The outcome of the tests that are named for a mutant.

    Raises:
        DoesNotApply: it does not change the current code.
    """
    with copy.with_mutant(mutant):
        return copy.test(mutant.tests)


def baseline(free: queue.SimpleQueue[Copy], mutants: Iterable[Mutant]) -> list[Outcome]:
    """The tests that fail without any mutant; one run of pytest per file."""
    by_file: dict[str, dict[str, None]] = {}
    for test in (test for mutant in mutants for test in mutant.tests):
        by_file.setdefault(test.partition("::")[0], {})[test] = None
    runs = [[file] if file in tests else list(tests) for file, tests in by_file.items()]
    outcomes = on_copies(free, lambda copy, tests: copy.test(tests, _BASELINE_LIMIT), runs)
    return [outcome for outcome in outcomes if outcome.kind != "passed"]
