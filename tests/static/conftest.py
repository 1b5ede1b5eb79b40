"""The current launches, recorded once per session."""

from __future__ import annotations

import pytest

from tests.static import table
from tests.static.record import Launch


@pytest.fixture(scope="session")
def now() -> list[Launch]:
    """The current arguments of the launchers."""
    return table.launches()
