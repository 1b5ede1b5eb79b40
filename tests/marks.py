"""Marks parameters of a test that only the long run uses: ``pytest -m long``."""

from __future__ import annotations

from typing import Any

import pytest


def long(*values: Any) -> list[Any]:
    """These parameter sets, a tuple for several arguments, marked long."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.long) for v in values]
