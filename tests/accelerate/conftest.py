"""Short batches run the same code as long ones here, except in the tests of short batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from linfast.rows import all_lengths


@pytest.fixture(autouse=True)
def _all_lengths(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.endswith(("test_short_batches", "test_cost")):
        yield
        return
    with all_lengths():
        yield
