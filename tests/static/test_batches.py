"""Batches and depths of all sizes share compiled kernels: no launch specialises on them."""

from __future__ import annotations

import json

import pytest
from linfast.kernels.stack_configs import CONFIGS

from tests.static import child


@pytest.fixture(scope="module")
def variants() -> dict[str, dict[str, tuple[int, int]]]:
    """(maximum number of variants for one batch, number for all batches) of each kernel, by call."""
    return json.loads(child.run("tests.static.batches"))


# The tiles that a stack chooses from by its batch.
_OF_STACKS = dict.fromkeys(
    ("_coupling_stack_kernel", "_linearizer_stack_kernel"),
    max(1 + len(entry.smaller) for entries in CONFIGS.values() for entry in entries),
)


def test_all_batches_compile_at_most_two_variants_of_a_kernel(
    variants: dict[str, dict[str, tuple[int, int]]],
) -> None:
    """Two, because the tile may depend on the batch, and a single sample may be read in longer runs."""
    found = {(call, kernel): counts for call, of in variants.items() for kernel, counts in of.items()}
    most = {(call, kernel): _OF_STACKS.get(kernel, 2) for call, kernel in found}
    assert {name: counts for name, counts in found.items() if counts[1] > most[name] * counts[0]} == {}


def test_a_stacks_tile_depends_on_the_batch(variants: dict[str, dict[str, tuple[int, int]]]) -> None:
    """BATCHES reach every tile: each kernel has as many variants as tiles, and no launch specialises on more."""
    assert variants["linearizer_stack"]["_linearizer_stack_kernel"] == [1, _OF_STACKS["_linearizer_stack_kernel"]]


def test_every_call_launches(variants: dict[str, dict[str, tuple[int, int]]]) -> None:
    assert [call for call, of in variants.items() if not of] == []
