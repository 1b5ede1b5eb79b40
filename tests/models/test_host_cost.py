"""How much Python a call costs: the functions of linfast that f(x) calls at depth 8, counted on a CPU and on a GPU.

The GPU is the stand-in of tests/static/record.py, with the real launchers and Triton's real launch path. Triton's
interpreter has no launch path, so everything is counted in a process of its own.
"""

from __future__ import annotations

import contextlib
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
from torch import Tensor

import linfast as lf
from linfast import dispatch
from linfast.kernels import stack_configs
from tests.static import child
from tests.static.record import on

_ROOTS = tuple(f"{folder.resolve()}/" for folder in (Path(lf.__file__).parent, Path(stack_configs.__file__).parent))
# The Python calls of linfast's own functions that a call may make.
BOUNDS = {
    "cpu, frozen": 60,
    "cpu, unfrozen": 250,
    "gpu, frozen": 60,
    "gpu, unfrozen": 250,
    "gpu, unfrozen, two networks": 250,
}


def calls_of(work: Callable[[], Any]) -> Counter[str]:
    """Calls of linfast's Python functions in ``work()``, by file and name, after all caches are warm."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_ROOTS):
            calls[f"{Path(code.co_filename).name}:{code.co_name}"] += 1

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
    """A GPU that runs nothing. What stands in for a function of linfast counts as that function does."""

    def answers(module: Any, value: str) -> Any:
        return eval(compile(f"lambda *_: {value}", module.__file__, "eval"))

    with (
        on("sm_90") as launches,
        lf.backend("auto"),
        mock.patch.object(dispatch, "has_kernels", answers(dispatch, "True")),
        mock.patch.object(stack_configs, "_target", answers(stack_configs, "'sm_90'")),
    ):
        yield launches


def _two() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    g, h = (lf.coupling_flow(64, depth=8, hidden=(128, 128), activation="silu") for _ in range(2))
    yield "", lf.Linearizer(g, lf.Dense(64))
    yield ", two networks", lf.Linearizer(g, lf.Dense(64), h)


def counted() -> dict[str, Counter[str]]:
    """Each case's calls."""
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


if __name__ == "__main__":
    print(json.dumps(counted()))
