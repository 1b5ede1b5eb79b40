"""Batches and depths of all sizes share compiled kernels: no launch specialises on them."""

from __future__ import annotations

import json

import pytest

from tests.static import child


@pytest.fixture(scope="module")
def variants() -> dict[str, dict[str, tuple[int, int]]]:
    """(maximum number of variants for one batch, number for all batches) of each kernel, by call."""
    return json.loads(child.run("tests.static.batches"))


def test_all_batches_compile_at_most_two_variants_of_a_kernel(
    variants: dict[str, dict[str, tuple[int, int]]],
) -> None:
    """Two, because the tile may depend on the batch, and a single sample may be read in longer runs."""
    found = {f"{call}: {kernel}": counts for call, of in variants.items() for kernel, counts in of.items()}
    assert {name: counts for name, counts in found.items() if counts[1] > 2 * counts[0]} == {}


def test_every_call_launches(variants: dict[str, dict[str, tuple[int, int]]]) -> None:
    assert [call for call, of in variants.items() if not of] == []
