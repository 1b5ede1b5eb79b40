"""A pytest plugin that records how near every comparison came to its limit: error / allowance.

Loaded by tests.machines with ``-p tests.margins --margins FILE -o enable_assertion_pass_hook=true``. It records

    assert error <= allowance         two plain numbers, the second at most 0.1: a bound on rounding
                                      (a limit that may be reached is written assert limit >= value)
    torch.testing.assert_close(a, b)  the largest |a - b| / (atol + rtol |b|)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

_NUMBER = r"(-?\d+\.?\d*(?:e[+-]?\d+)?)"
_COMPARISON = re.compile(rf"{_NUMBER} <=? {_NUMBER}")
_LARGEST_LIMIT = 0.1
_TOLERANCES = {  # torch.testing.assert_close's (rtol, atol), from its documentation
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}

_worst: dict[str, float] = {}
_current = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--margins", type=Path, help="write {test: largest error / allowance} to this file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    global _current
    _current = item.nodeid
    unread = mock.patch.object(Tensor, "__repr__", _unread)  # the hook prints the values that it compares
    with mock.patch("torch.testing.assert_close", _assert_close), unread:
        return (yield)


def pytest_assertion_pass(item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
    found = _COMPARISON.match(expl)
    if found and 0 < float(found[2]) <= _LARGEST_LIMIT:
        _record(float(found[1]) / float(found[2]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.getoption("margins").write_text(json.dumps(_worst))


_compare = torch.testing.assert_close


def _assert_close(actual: Any, expected: Any, **options: Any) -> None:
    _compare(actual, expected, **options)
    pairs = zip(actual, expected, strict=True) if isinstance(actual, (tuple, list)) else [(actual, expected)]
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            _record(_margin(a.detach(), b.detach(), options))


def _margin(a: Tensor, b: Tensor, options: dict[str, Any]) -> float:
    defaults = max(_TOLERANCES[a.dtype], _TOLERANCES[b.dtype])
    rtol, atol = options.get("rtol", defaults[0]), options.get("atol", defaults[1])
    gap, limit = (a.double() - b.double()).abs(), atol + rtol * b.double().abs()
    return float((gap / limit.clamp(min=1e-300)).nan_to_num(0.0, 0.0).max())


def _unread(tensor: Tensor) -> str:
    return "tensor"


def _record(margin: float) -> None:
    _worst[_current] = max(margin, _worst.get(_current, 0.0))
