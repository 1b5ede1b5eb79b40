"""The seed of the run: LINFAST_TEST_SEED, 0 by default. ``python -m tests.machines`` uses others."""

from __future__ import annotations

import os

SEED = int(os.environ.get("LINFAST_TEST_SEED", "0"))


def seeded(number: int) -> int:
    """The seed for a test in this run; it differs between runs with different seeds."""
    return 1000 * SEED + number
