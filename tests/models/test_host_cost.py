"""The Python cost of a call: linfast's functions that f(x) calls at depth 8, counted on a CPU and on a GPU.

The GPU is the stand-in of tests/static/record.py, with the real launchers and Triton's real launch path. Triton's
interpreter has no launch path, so everything is counted in a separate process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from linfast.kernels import stack_configs
from torch import Tensor

import linfast as lf
from linfast import dispatch
from tests.static import child
from tests.static.record import on

_ROOTS = tuple(f"{folder.resolve()}/" for folder in (Path(lf.__file__).parent, Path(stack_configs.__file__).parent))
# The number of calls of linfast's Python functions that a call may make.
BOUNDS = {
    "cpu, frozen": 60,
    "cpu, unfrozen": 250,
    "gpu, frozen": 60,
    "gpu, unfrozen": 250,
    "gpu, unfrozen, two networks": 250,
}
FILES = {"cpu, frozen": 8, "cpu, unfrozen": 14}
"""The files that one call may pass through: who reads how f runs on a CPU opens no more."""


def _within(file: str) -> str:
    """The file's path from linfast's folder."""
    return next(file.removeprefix(root) for root in _ROOTS if file.startswith(root))


def calls_of(work: Callable[[], Any]) -> Counter[str]:
    """Calls of linfast's Python functions in ``work()``, by file and name, after all caches are warm."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_ROOTS):
            calls[f"{_within(code.co_filename)}:{code.co_name}"] += 1

    for _ in range(3):
        work()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@contextlib.contextmanager
def _on_gpu() -> Iterator[list[Any]]:
    """A GPU that runs nothing. A stand-in for a function of linfast counts like that function: a cached one does not."""

    def answers(module: Any, value: str) -> Any:
        return eval(compile(f"lambda *_: {value}", module.__file__, "eval"))

    with (
        on("sm_90") as launches,
        lf.backend("auto"),
        mock.patch.object(dispatch, "has_kernels", answers(dispatch, "True")),
        mock.patch.object(stack_configs, "_target", answers(stack_configs, "'sm_90'")),
        mock.patch.object(stack_configs, "_without_gpu", functools.cache(lambda: 132)),
    ):
        yield launches


def _two() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    g, h = (lf.coupling_flow(64, depth=8, hidden=(128, 128), activation="silu") for _ in range(2))
    yield "", lf.Linearizer(g, lf.Dense(64))
    yield ", two networks", lf.Linearizer(g, lf.Dense(64), h)


def counted() -> dict[str, Counter[str]]:
    """The number of calls in each case."""
    found = {}
    x = torch.randn(64, 64)
    for name, f in _two():
        for device, where in (("cpu", contextlib.nullcontext()), ("gpu", _on_gpu())):
            with torch.no_grad(), where as launches:
                found[f"{device}, unfrozen{name}"] = calls_of(lambda f=f: f(x))
                with lf.freeze(f):
                    found[f"{device}, frozen{name}"] = calls_of(lambda f=f: f(x))
            if device == "gpu":
                kernels = {launch.kernel for launch in launches}
                assert {"_linearizer_stack_kernel", "_stack_pack_kernel"} <= kernels, kernels
    return found


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    return json.loads(child.run("tests.models.test_host_cost"))


@pytest.mark.parametrize("case", BOUNDS)
def test_f_of_x_makes_few_python_calls(case: str, counts: dict[str, dict[str, int]]) -> None:
    calls = counts[case]
    total = sum(calls.values())
    assert 5 < total < BOUNDS[case], f"{total} calls: {sorted(calls.items(), key=lambda entry: -entry[1])}"


@pytest.mark.parametrize("case", FILES)
def test_f_of_x_passes_through_few_files(case: str, counts: dict[str, dict[str, int]]) -> None:
    files = {call.split(":")[0] for call in counts[case]}
    assert 5 < len(files) <= FILES[case], sorted(files)


if __name__ == "__main__":
    print(json.dumps(counted()))
