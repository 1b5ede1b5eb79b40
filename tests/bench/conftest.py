"""Benchmarks under test run on one thread, as two would wait for each other on a busy machine; a clock for them."""

from __future__ import annotations

import pytest
import torch
from linfast.bench import environment, standard, timing

from .toy import Clock


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the benchmarks read."""
    clock = Clock()
    for module in (environment, standard, timing):
        monkeypatch.setattr(module, "time", clock)
    return clock
