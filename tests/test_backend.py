"""backend: each thread has its own choice, whatever other threads do, and nothing is left of it afterwards."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch

import linfast as lf
from linfast.dispatch import chosen_backend, plain_torch, refuse_kernel, state_key
from linfast.freeze import derived, kept_values, thawed


def _in_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_blocks_that_overlap_in_two_threads_leave_nothing_behind() -> None:
    before, seen = chosen_backend(), []
    inside, entered, left = (threading.Event() for _ in range(3))

    def first() -> None:
        with lf.backend("reference"):
            inside.set()
            assert entered.wait(60)
            seen.append(chosen_backend())
        left.set()

    def second() -> None:
        assert inside.wait(60)
        with lf.backend("triton"):
            entered.set()
            assert left.wait(60)
            seen.append(chosen_backend())

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
        assert [pool.submit(chosen_backend).result() for _ in range(4)] == [before] * 4
    assert seen == ["reference", "triton"]
    assert chosen_backend() == before


def test_another_thread_has_the_process_choice() -> None:
    before = _in_thread(chosen_backend)
    with lf.backend("reference"):
        assert chosen_backend() == "reference"
        assert _in_thread(chosen_backend) == before


def test_plain_torch_affects_only_its_thread() -> None:
    """Another thread may launch kernels meanwhile, since it does not compute the reference."""
    with plain_torch():
        _in_thread(lambda: refuse_kernel("low_rank"))
        with pytest.raises(RuntimeError, match="low_rank"):
            refuse_kernel("low_rank")


def test_compiled_code_follows_the_choice_of_its_thread() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if chosen_backend() == "reference" else 2)

    compiled, zero = torch.compile(call, fullgraph=True, backend="eager"), torch.zeros(())
    with lf.backend("reference"):
        inside = compiled(zero), _in_thread(lambda: compiled(zero))
    with lf.backend("auto"):
        outside = compiled(zero)
    assert [int(value) for value in (*inside, outside)] == [1, 2, 2]


_SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "reference": lambda: lf.backend("reference"),
    "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "medium": lambda: _matmul_precision("medium"),
}


@contextlib.contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_each_setting_has_a_separate_key_and_gradients_do_not_change_it() -> None:
    x = torch.zeros(2)
    keys = []
    for setting in _SETTINGS.values():
        with setting():
            keys.append(state_key(x))
            with torch.no_grad():
                assert state_key(x.clone()) == keys[-1]
    keys += [state_key(x.double()), state_key(x.to("meta"))]
    assert len(set(keys)) == len(keys) == 7
    assert state_key(x) == keys[0]


def test_the_key_costs_three_python_calls_of_ours() -> None:
    ours: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("linfast"):
            ours.append(frame.f_code.co_name)

    x = torch.zeros(2)
    sys.setprofile(note)
    try:
        state_key(x)
    finally:
        sys.setprofile(None)
    assert len(ours) <= 3, ours


def test_compiled_code_reads_the_key() -> None:
    x = torch.zeros(2)
    kept = {state_key(x): 1}
    compiled = torch.compile(lambda x: x + kept.get(state_key(x), 2), fullgraph=True, backend="eager")
    assert compiled(x).tolist() == [1, 1]
    with lf.backend("reference"):
        assert compiled(x).tolist() == [2, 2]


def test_threads_that_freeze_and_thaw_one_model_do_not_undo_each_other() -> None:
    g, frozen, thawing, done = lf.Mix(3), *(threading.Event() for _ in range(3))
    kept: list[bool] = []

    def thaws() -> None:
        assert frozen.wait(60)
        with thawed():
            kept.append(kept_values(g) is not None)
            thawing.set()
            assert done.wait(60)
        kept.append(kept_values(g) is not None)

    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        other = pool.submit(thaws)
        with lf.freeze(g):
            frozen.set()
            assert thawing.wait(60)
            assert kept_values(g) is not None
            assert derived(g, "a number", lambda: 3) == derived(g, "a number", lambda: 4) == 3
        done.set()
        other.result()
        assert kept_values(g) is None
    assert kept == [False, False]
