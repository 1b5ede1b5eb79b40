"""Benchmarks under test run on one thread: two on a busy machine wait for each other. A clock for those timed."""

from __future__ import annotations

import pytest
import torch
from linfast.bench import environment, harness, timing

from .toy import Clock


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the benchmarks take for the time."""
    clock = Clock()
    for module in (environment, harness, timing):
        monkeypatch.setattr(module, "time", clock)
    return clock
