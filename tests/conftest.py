"""Settings of every test: one seed, NaN-filled fresh memory, one thread, interpreted kernels."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any import of one


@pytest.fixture(autouse=True)
def _reproducible_and_poisoned():
    """A fixed seed, and NaN in fresh memory so that a read of it shows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
