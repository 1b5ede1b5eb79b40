"""``python -m pytest -p tests.machine_code.plugin tests/ops/...`` runs kernel tests on machine code.

PTX_CAPABILITY is 80 or 90, PTX_CACHE a folder for compiled code, PTX_MMA exact or hardware: how tensor cores sum.
A report of the emulator fails the test.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from tests.machine_code.target import as_on_gpu, emulator

_launch = emulator("launch")
_CAPABILITY = int(os.environ.get("PTX_CAPABILITY", "80"))
emulator("numerics").settings.mma = os.environ.get("PTX_MMA", "exact")
_STACK = pytest.StashKey[contextlib.ExitStack]()


def pytest_collection(session: pytest.Session) -> None:
    """Runs after tests/conftest.py and before any test is imported."""
    stack = session.config.stash[_STACK] = contextlib.ExitStack()
    stack.enter_context(_launch.installed(capability=_CAPABILITY))
    stack.enter_context(as_on_gpu(f"sm_{_CAPABILITY}"))
    # A test that sets no mode compares with fp32 convolutions of the CPU; torch's default on a GPU is tf32.
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash.get(_STACK, contextlib.ExitStack()).close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Lanes that store different last bits of one value are a fault: which of them remains is not defined."""
    before = _launch.STATISTICS.notes.copy()
    yield
    spoken = _launch.STATISTICS.notes - before
    assert not spoken, "\n".join(spoken)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = _launch.STATISTICS.launches.values()
    terminalreporter.write_line(f"machine code, sm_{_CAPABILITY}: {sum(counts)} launches of {len(counts)} kernels")
