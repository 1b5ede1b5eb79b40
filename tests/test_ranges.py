"""Ranges: nearly free when off, named when on, invisible to torch.compile and to tracebacks."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast import ranges as module
from linfast.ops.low_rank import low_rank
from linfast.ranges import range_, ranges

try:
    import nvtx
except ImportError:
    nvtx = None


def _model() -> lf.Linearizer:
    return lf.Linearizer(lf.coupling_flow(4, 2, (8,)), lf.Dense(4))


def _ranges(call) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


def test_a_disabled_range_is_an_empty_context() -> None:
    names: list[str] = []

    def note(frame, event, argument) -> None:
        """Count the functions that are entered, in Python and in C."""
        if event in ("call", "c_call"):
            names.append(frame.f_code.co_name if event == "call" else argument.__name__)

    owner = object()
    sys.setprofile(note)
    try:
        with range_("stage", owner):
            pass
    finally:
        sys.setprofile(None)
    assert names == ["range_", "__enter__", "__exit__", "setprofile"]


@pytest.mark.parametrize("on", [False, True])
def test_tracebacks_show_no_lines_of_the_ranges(on: bool) -> None:
    f = _model()
    with ranges(on), pytest.raises(ValueError, match="x") as error:
        f(torch.randn(3, 5))
    frames = {Path(entry.path).name for entry in error.traceback}
    assert {"linearizer.py", "bijection.py"} <= frames
    assert not {"ranges.py", "contextlib.py"} & frames


def test_stages_are_named_while_on_and_only_then() -> None:
    f, x = _model(), torch.randn(3, 4)
    names = {
        "Linearizer.forward",
        "Linearizer.gx",
        "Linearizer.gy_inverse",
        "Flow.forward",
        "Flow.inverse",
        "Dense.forward",
    }
    with ranges():
        assert names <= _ranges(lambda: f(x))
        with ranges(False):
            assert not names & _ranges(lambda: f(x))
    assert not names & _ranges(lambda: f(x))


def test_sampling_and_training_are_named() -> None:
    from linfast.training import one_step_loss

    f = lf.Linearizer(lf.coupling_flow(4, 1, (8,)), lf.TimeLowRank(4, rank=2))
    noise = torch.randn(3, 4)

    def call() -> None:
        lf.sample(f, noise, steps=3)
        lf.invert(f, noise, steps=3)
        one_step_loss(f, noise).total.backward()

    with ranges():
        assert {"sample", "generator", "collapse", "invert", "one_step_loss"} <= _ranges(call)


def test_launches_are_named_forward_and_backward() -> None:
    x, U, V = (torch.randn(s, requires_grad=True) for s in ((2, 4), (2, 4, 2), (2, 4, 2)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, U, V = (t.detach().to(device).requires_grad_() for t in (x, U, V))

    def call() -> None:
        with lf.backend("triton"):
            low_rank(x, U, V).sum().backward()

    names = {"low_rank", "low_rank_backward"}
    with ranges():
        assert names <= _ranges(call)
    assert not names & _ranges(call)


@pytest.mark.parametrize("on", [False, True])
def test_torch_compile_sees_through(on: bool) -> None:
    f, x = _model(), torch.randn(3, 4)
    torch.compiler.reset()
    with ranges(on):
        compiled = torch.compile(f.forward, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), f(x))


def test_stages_share_no_recompile_limit() -> None:
    """torch.compile counts by code object: a common wrapper would have one limit for all stages."""
    codes = [getattr(lf.Linearizer, name).__code__ for name in ("forward", "inverse", "gx", "gy", "gx_inverse")]
    assert len(set(codes)) == 5
    assert {code.co_filename.rpartition("/")[2] for code in codes} == {"linearizer.py"}


def test_ranges_reach_other_threads() -> None:
    seen: list[bool] = []
    with ranges():
        thread = threading.Thread(target=lambda: seen.append(module._on))
        thread.start()
        thread.join()
    assert seen == [True]


def test_nvtx_gets_the_names_in_its_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    marks: list[tuple[str, str]] = []

    def annotate(name: str, domain: str) -> contextlib.AbstractContextManager[None]:
        marks.append((name, domain))
        return contextlib.nullcontext()

    monkeypatch.setattr(module, "_nvtx", lambda: annotate)
    with ranges():
        _model()(torch.randn(3, 4))
    assert ("Linearizer.forward", "linfast") in marks
    assert {domain for _, domain in marks} == {"linfast"}


@pytest.mark.skipif(nvtx is None, reason="without nvtx only torch.profiler's ranges are there")
def test_the_nvtx_package_takes_them() -> None:
    module._nvtx.cache_clear()
    assert module._nvtx() is nvtx.annotate
    with ranges():
        _model()(torch.randn(3, 4))


def test_without_nvtx_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvtx", None)
    module._nvtx.cache_clear()
    try:
        assert module._nvtx() is None
        with ranges():
            _model()(torch.randn(3, 4))
    finally:
        module._nvtx.cache_clear()


def test_signatures_and_docstrings_stay() -> None:
    import inspect

    assert "one product with the collapsed operator" in (lf.sample.__doc__ or "")
    assert list(inspect.signature(lf.Linearizer.forward).parameters)[:3] == ["self", "x", "t"]
    with pytest.raises(TypeError):
        lf.sample()
    assert isinstance(_model()(torch.randn(2, 4)), Tensor)
