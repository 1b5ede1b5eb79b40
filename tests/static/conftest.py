"""The launches of today, recorded once a session."""

from __future__ import annotations

import pytest

from tests.static import table
from tests.static.record import Launch


@pytest.fixture(scope="session")
def now() -> list[Launch]:
    """What the launchers pass today."""
    return table.launches()
