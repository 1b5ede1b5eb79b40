"""The run's seed: LINFAST_TEST_SEED, 0 by default. ``python -m tests.machines`` runs others."""

from __future__ import annotations

import os

SEED = int(os.environ.get("LINFAST_TEST_SEED", "0"))


def seeded(number: int) -> int:
    """This seed of a test, in this run: another one in a run with another seed."""
    return 1000 * SEED + number
