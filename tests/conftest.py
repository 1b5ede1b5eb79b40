"""Settings of every test: one seed, NaN-filled fresh memory, one thread, interpreted kernels."""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else deterministic mode refuses cuBLAS
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any import of one


@pytest.fixture(autouse=True)
def _reproducible_and_poisoned():
    """A fixed seed, and NaN in fresh memory so that a read of it shows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # On a GPU a few of torch's own ops, which only references use, have no deterministic version.
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
