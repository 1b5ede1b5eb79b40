"""``python -m pytest -p tests.gpu.plugin`` writes failures when they happen, and ends a process after a CUDA error.

A kernel that faults breaks the CUDA context of its process: every later test there fails as well. The process of
xdist that has had such an error therefore ends, and xdist starts another one; without xdist the run ends.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest

BROKEN = re.compile(
    r"CUDA error|illegal memory access|misaligned address|unspecified launch failure|illegal instruction"
)
LEFT = 86  # the exit status
_EVERY = 2.0  # seconds between two lines of counts

_counts: Counter[str] = Counter()
_failed: set[str] = set()
_last = 0.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """pyproject.toml's ``timeout`` is pytest-timeout's: without it pytest would refuse the file."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "of pytest-timeout, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """In the process that ran the test: exit after a CUDA error, once the reports have been sent."""
    reports = item.config.stash.setdefault(_REPORTS, [])
    reports.clear()
    result = yield
    if any(report.failed and BROKEN.search(report.longreprtext) for report in reports):
        if hasattr(item.config, "workerinput"):
            os._exit(LEFT)
        item.session.shouldstop = "LEFT after a CUDA error: no test after it would say anything"
    return result


_REPORTS: pytest.StashKey[list[pytest.TestReport]] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep the report until the test is over."""
    report = yield
    item.config.stash.setdefault(_REPORTS, []).append(report)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the main process: print the complete failure and the number of failures so far."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.failed and report.nodeid not in _failed:  # only once: xdist reports the exit as another failure
        _failed.add(report.nodeid)
        _counts["failed"] += 1
        first = next((line[2:] for line in report.longreprtext.splitlines() if line.startswith("E ")), "")
        _say(f"FAILED {report.nodeid} - {first.strip() or report.longreprtext.strip()[:200]}")
        _say("".join(f"    {line}\n" for line in report.longreprtext.splitlines()[-80:]))
        _count()
    elif report.when == "call" and report.passed:
        _counts["passed"] += 1
    elif report.skipped:
        _counts["skipped"] += 1
    if time.monotonic() - _last > _EVERY:
        _count()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Print the final counts."""
    if not hasattr(session.config, "workerinput"):
        _count()
        if session.shouldstop:
            _say(str(session.shouldstop))


def _count() -> None:
    global _last
    _last = time.monotonic()
    _say(f"COUNTS {_counts['passed']} passed, {_counts['failed']} failed, {_counts['skipped']} skipped")


def _say(text: str) -> None:
    """Print at once, bypassing pytest's capture."""
    out = sys.__stdout__
    assert out is not None
    print(f"\n{text.rstrip()}", file=out, flush=True)
