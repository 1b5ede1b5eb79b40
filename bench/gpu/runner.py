"""Processes side by side until a deadline: their lines as they come, and how each of them ended."""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

__all__ = ["Job", "run_jobs"]

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_POLL = 0.1
_AT = "measuring "  # how a command says which of its items it has come to
Take = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A process.

    Args:
        environment: what differs from this process's.
        done: a pattern; a process that has printed a line like it has come to its end, whatever its status.
        limit: seconds after which it is killed.
        silence: seconds without a line after which it is taken for hung.
        items: passed as --case=ITEM each; where it fails it starts again after the item it had come to.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    done: str = "(?!)"
    limit: float = math.inf
    silence: float = math.inf
    items: Sequence[str] = ()

    def after(self, item: str) -> Job | None:
        """What is left to do once ``item`` has failed."""
        left = self.items[self.items.index(item) + 1 :] if item in self.items else ()
        return replace(self, items=left) if left else None


class _Running:
    def __init__(self, job: Job, take: Take) -> None:
        self.job, self.item, self.done = job, "", False
        self.start = self.heard = time.monotonic()
        self.process = subprocess.Popen(
            [*job.command, *(f"--case={item}" for item in job.items)],
            env={**os.environ, **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_in_a_group_that_dies_with_us,
        )
        self.reader = threading.Thread(target=self._read, args=(take,), daemon=True)
        self.reader.start()

    def _read(self, take: Take) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard = time.monotonic()
            if line.startswith(_AT):
                self.item = line.removeprefix(_AT).split()[0]
            self.done = self.done or re.match(self.job.done, line) is not None
            take(line)

    def ended(self, late: bool) -> str | None:
        """None while it runs, "" where it ended well, else why it did not."""
        status, why = self.process.poll(), self._too_long(late)
        if status is None and not why:
            return None
        if status is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reader.join(1)
        if status is None:
            return why
        return "" if status == 0 or self.done else _described(status)

    def _too_long(self, late: bool) -> str:
        now = time.monotonic()
        if late or now - self.start > self.job.limit:
            return "stopped at its limit"
        return f"stopped: silent for {self.job.silence:.0f} s" if now - self.heard > self.job.silence else ""


def run_jobs(
    jobs: Sequence[Job], at_once: int, seconds: float, take: Take, tick: Callable[[], None]
) -> dict[str, str]:
    """Run the jobs and say of each that did not end well why.

    Args:
        seconds: after which all are killed.
        take: gets every line they print, from several threads.
        tick: called ten times a second.
    """
    deadline, waiting, running = time.monotonic() + seconds, deque(jobs), list[_Running]()
    failed: dict[str, str] = {}
    while waiting or running:
        late = time.monotonic() > deadline
        while waiting and len(running) < at_once and not late:
            job = waiting.popleft()
            try:
                running.append(_Running(job, take))
            except OSError as error:
                failed[job.name] = f"{job.command[0]}: {error.strerror}"
        if late:
            failed.update((job.name, "no time left") for job in waiting)
            waiting.clear()
        for each in list(running):
            if (why := each.ended(late)) is None:
                continue
            running.remove(each)
            if why:
                at = f" at {each.item}" if each.item else ""
                failed[each.job.name] = "; ".join(filter(None, (failed.get(each.job.name), why + at)))
                if not late and (rest := each.job.after(each.item)):
                    waiting.appendleft(rest)
        tick()
        time.sleep(_POLL)
    return failed


def _in_a_group_that_dies_with_us() -> None:
    os.setpgid(0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _described(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
