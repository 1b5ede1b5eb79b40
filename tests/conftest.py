"""Settings of every test: one seed, NaN-filled fresh memory, few threads."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible_and_poisoned():
    """A fixed seed, and NaN in fresh memory so that a read of it shows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
