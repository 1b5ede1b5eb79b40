"""Run processes side by side until a deadline, pass on the lines that they print, and say which of them failed."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """A process to run.

    Args:
        environment: variables to set, in addition to those of this process.
        done: a pattern; a process that has printed a matching line has succeeded, whatever its exit status.
        limit: seconds after which it is killed.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    done: str = "(?!)"
    limit: float = math.inf


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    seconds: float,
    take: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Run the jobs; returns the name of each job that failed, and why.

    Args:
        seconds: after which all jobs are killed.
        take: called with every line that they print.
        tick: called every second. No two calls of ``take`` and ``tick`` overlap.
    """
    deadline, lock = time.monotonic() + seconds, threading.Lock()

    def take_alone(line: str) -> None:
        with lock:
            take(line)

    with ThreadPoolExecutor(at_once) as pool:
        ends = {job.name: pool.submit(_run, job, deadline, take_alone) for job in jobs}
        while wait(ends.values(), timeout=1.0).not_done:
            with lock:
                tick()
    return {name: why for name, end in ends.items() if (why := end.result())}


def _run(job: Job, deadline: float, take: Callable[[str], None]) -> str:
    """Run the job; returns why it failed, or an empty string."""
    seconds, done, late = min(job.limit, deadline - time.monotonic()), False, threading.Event()
    if seconds <= 0:
        return "no time left"
    try:
        process = subprocess.Popen(
            job.command,
            env={**os.environ, **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_in_a_group_that_dies_with_us,
        )
    except OSError as error:
        return f"{job.command[0]}: {error.strerror}"

    def stop() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)

    assert process.stdout is not None
    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    for line in process.stdout:
        done = done or re.match(job.done, line) is not None
        take(line)
    status = process.wait()
    timer.cancel()
    if late.is_set():
        return "stopped at its limit"
    if status == 0 or done:
        return ""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _in_a_group_that_dies_with_us() -> None:
    os.setpgid(0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
