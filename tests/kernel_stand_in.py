"""A stand-in for a GPU on which "auto" runs kernels, whose right outputs a test can replace by wrong ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from linfast.ops.register import RAW_OPS

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "nan": lambda right: torch.full_like(right, torch.nan),
    "another op's": lambda right: right.cos(),
}


class Kernels:
    """``fault`` maps the outputs of an op's plain form to those of its kernel."""

    def __init__(self) -> None:
        self.fault: Callable[[Tensor], Tensor] = lambda right: right
        self.launches = 0

    def launcher(self, path: str) -> Callable[..., Any]:
        op = next(op for op in RAW_OPS.values() if op.launch == path)

        def launch(*arguments: Any) -> Any:
            self.launches += 1
            right = op.reference(*arguments)
            if isinstance(right, Tensor):
                return self.fault(right)
            return tuple(None if each is None else self.fault(each) for each in right)

        return launch


def install(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Let "auto" run these kernels, on a CPU too, until the test ends."""
    kernels = Kernels()
    # Both are imported before either is changed: the second takes the name from the first, and would keep it.
    modules = [importlib.import_module(name) for name in ("linfast.dispatch", "linfast.bench.cases.common")]
    for module in modules:
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
    monkeypatch.setattr(importlib.import_module("linfast.ops.register"), "_launcher", kernels.launcher)
    return kernels
