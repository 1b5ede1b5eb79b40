"""Cycles of train, kill, resume, sample, kill, resume, in real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .jobs import TRAININGS, Job, differences, sampling, training

__all__ = ["Failed", "Soak"]

_ROOT = Path(__file__).resolve().parents[2]
_SIGNALS = {signal.SIGKILL: 6, signal.SIGINT: 1, signal.SIGTERM: 1}  # and how often each
_SECOND = 0.25  # share of the processes that meet a second one, which tries to write the same files
_EARLY = 0.25  # share of the signals that come while Python starts and imports
_LONGEST = 600  # limit of a process in seconds


class Failed(Exception):
    """Something was lost, differs, or ended in a wrong way."""


class Soak:
    """The commands of ``jobs`` under signals.

    Args:
        folder: to work in.
        seed: of the signals and their times.
        kills: the maximum number of signals between two finished commands.
        count: samples of each sampling.

    Attributes:
        done: counts of processes that each signal ended, and of refused second writers.
    """

    def __init__(self, folder: Path, seed: int, kills: int = 8, count: int = 200_000) -> None:
        self.folder, self.kills, self.count = folder, kills, count
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._whole: dict[str, tuple[Job, float, float]] = {}
        self._log = folder / "log"

    def cycle(self, number: int) -> str:
        """Train and sample with kills; returns a line that reports it.

        Raises:
            Failed: names the fault and the file.
        """
        name = self.random.choice(list(TRAININGS))
        before = self.done.copy()
        train = training(name, self.folder / f"train-{number}")
        self._disturbed(train, name)
        model = train.folder / train.files[1]
        sample = sampling(model, self.folder / f"sample-{number}", self.count)
        self._disturbed(sample, f"samples of {name}")
        for job in (train, sample):
            for path in sorted(job.folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            job.folder.rmdir()
        return f"{name}: {tally(self.done - before)}; the same files"

    def _disturbed(self, job: Job, name: str) -> None:
        """Run a command with signals until it ends by itself, and compare its files."""
        if name not in self._whole:
            self._whole[name] = self._measured(job, name)
        whole, start, end = self._whole[name]
        for _ in range(self.random.randint((self.kills + 1) // 2, self.kills)):
            early = self.random.random() < _EARLY
            number = self.random.choices(list(_SIGNALS), list(_SIGNALS.values()))[0]
            # Python itself reports Ctrl-C during its start, before it runs our code.
            after = self.random.uniform(1.0 if number == signal.SIGINT else 0.0, start) if early else None
            self._signalled(job, number, after, 2 * (end - start) / self.kills)  # mostly before the work ends
        with self._started(job) as process:
            self._expect(process.wait(_LONGEST), (0,), job)
        if found := differences(job, whole):
            raise Failed(f"{name}: {'; '.join(found)} (compare {job.folder} with {whole.folder})")

    def _measured(self, job: Job, name: str) -> tuple[Job, float, float]:
        """Run the command uninterrupted in a separate folder; the times when it began to write and ended."""
        folder = self.folder / f"whole-{len(self._whole)}"
        model = Path(job.first[job.first.index("--checkpoint") + 1]) if job.first[0] == "sample" else None
        whole = training(name, folder) if model is None else sampling(model, folder, self.count)
        begin = time.monotonic()
        with self._started(whole) as process:
            start = self._until_begun(whole, process) - begin
            self._expect(process.wait(_LONGEST), (0,), whole)
        return whole, start, time.monotonic() - begin

    def _signalled(self, job: Job, number: int, after: float | None, seconds: float) -> None:
        """Start the command and send it a signal, after this many seconds or somewhere in its work."""
        with self._started(job) as process:
            if after is None:
                self._until_begun(job, process)
                if self.random.random() < _SECOND:
                    self._second_writer(job, process)
                after = self.random.uniform(0, seconds)
            with suppress(subprocess.TimeoutExpired):
                self._expect(process.wait(after), (0,), job)
                return
            process.send_signal(number)
            status = process.wait(_LONGEST)
        stopped = {signal.SIGKILL: (-9,), signal.SIGINT: (130,), signal.SIGTERM: (143, -15)}[signal.Signals(number)]
        self._expect(status, (0, *stopped), job)
        self.done[signal.Signals(number).name] += status != 0

    def _second_writer(self, job: Job, first: subprocess.Popen[bytes]) -> None:
        """While the first process is stopped during its work, the same command is refused."""
        first.send_signal(signal.SIGSTOP)
        done = job.is_done()
        try:
            with self._started(job, log=self.folder / "second") as second:
                status = second.wait(_LONGEST)
        finally:
            first.send_signal(signal.SIGCONT)
        text = (self.folder / "second").read_text()
        if "another" in text and status == 2:
            self.done["second writer"] += 1
        elif status != 0 or not done:
            raise Failed(f"a second {' '.join(job.arguments())} ended with {status}: {text}")

    def _until_begun(self, job: Job, process: subprocess.Popen[bytes]) -> float:
        """Wait until this process has begun to write or has ended; returns the time."""
        before = _modified(job.begun)
        while process.poll() is None and _modified(job.begun) == before:
            time.sleep(0.05)
        return time.monotonic()

    @contextmanager
    def _started(self, job: Job, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """The command in a separate process, which does not outlive the block."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
        command = [sys.executable, "-m", "linfast.cli", *job.arguments()]
        with open(log or self._log, "wb") as output:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _expect(self, status: int, expected: tuple[int, ...], job: Job) -> None:
        text = self._log.read_text(errors="replace")
        if status not in expected or "Traceback" in text:
            raise Failed(f"linfast {' '.join(job.arguments())} ended with {status}: {text[-3000:]}")


def tally(done: Counter[str]) -> str:
    """The counts in words."""
    return ", ".join(f"{count} {what}" for what, count in done.items()) or "nothing"


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None
