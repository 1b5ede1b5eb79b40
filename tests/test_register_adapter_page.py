"""The examples of docs/register_adapter.md run as printed."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from linfast.accelerate import adapter

PAGE = Path(__file__).parent.parent / "docs" / "register_adapter.md"


def test_examples_run_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "ADAPTERS", dict(adapter.ADAPTERS))
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 20
    assert result.failed == 0
