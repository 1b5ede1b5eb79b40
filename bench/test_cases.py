"""``pytest bench``: checked, then timed by pytest-benchmark.

Select with ``-k low_rank``; the options of pytest-benchmark (--benchmark-save, ...) work.
Providers run one after another here; ``linfast bench`` interleaves them and also compiles.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from linfast.bench.check import Outputs

from .conftest import problem


def test_case(name: str, index: int, provider: str, benchmark: Any) -> None:
    """A provider that is wrong fails, and is not timed."""
    built, verdicts = problem(name, index)
    if (reason := verdicts[provider].refused) is not None:
        pytest.fail(reason)
    call = next(p.call for p in built.providers if p.name == provider)
    inputs = cycle(built.inputs)

    def run() -> Outputs:
        outputs = call(*next(inputs))
        if built.device.type == "cuda":
            torch.cuda.synchronize()
        return outputs

    benchmark.group = f"{name} {index}"
    benchmark.extra_info.update(error=verdicts[provider].error)
    benchmark(run)
