"""The examples of the README run, and its pictures exist."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch

_README = Path(__file__).parent.parent / "README.md"


def test_examples_run_as_printed() -> None:
    torch.use_deterministic_algorithms(False)
    flags = doctest.ELLIPSIS
    result = doctest.testfile(str(_README), module_relative=False, optionflags=flags)
    assert result.attempted > 40
    assert result.failed == 0


def test_pictures_exist() -> None:
    for line in _README.read_text().splitlines():
        if line.startswith("!["):
            assert (_README.parent / line.split("(")[1].rstrip(")")).is_file()
