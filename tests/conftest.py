"""Settings of all tests: the seed of the run, NaN in fresh memory, interpreted kernels, and one thread.

OMP_NUM_THREADS sets another number of threads, LINFAST_TEST_SEED another seed.
"""

from __future__ import annotations

import os
import signal
from unittest import mock

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("tests.ops.budget", "tests.ops.stacks")

from linfast.kernels import stack_configs  # noqa: E402

from tests.seeds import seeded  # noqa: E402

# A shell's background jobs ignore it, and so would all processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

_THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
ON_GPU = torch.cuda.is_available()
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else deterministic mode refuses cuBLAS
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any import of one
    from tests import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def _reproducible_and_poisoned():
    """Set the seed, and fill fresh memory with NaN so that reads of it are noticed."""
    torch.manual_seed(seeded(0))
    np.random.seed(seeded(0))  # noqa: NPY002  # from which libraries draw permutations
    torch.set_num_threads(_THREADS)
    # On a GPU a few of torch's own ops, which only references use, have no deterministic version.
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _one_multiprocessor():
    """Tiles as on a GPU with one multiprocessor, so that small batches run on all of them.

    At most 16 rows run on the tile of 16 rows, then on one of 32 or 64 rows, where the entry has one, as many as it
    holds. More run on the entry's full tile, on which a GPU runs thousands of rows.
    """
    # Not by the test's own monkeypatch: made before other fixtures, it would undo what a test sets after they end.
    with mock.patch.multiple(stack_configs, _of_gpu=lambda index: 1, _without_gpu=lambda: 1):
        yield


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for torch.cuda."""
    from tests import cuda_stand_in

    return cuda_stand_in.install(monkeypatch)


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in for a GPU on which "auto" runs kernels, which are right until the test makes them wrong."""
    from tests import kernel_stand_in

    return kernel_stand_in.install(monkeypatch)
