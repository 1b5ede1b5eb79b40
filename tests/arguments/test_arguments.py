"""Every public callable with each argument replaced by an invalid one: a clear error, or a right result.

An error is a ValueError or a TypeError whose message names the argument. A result is finite, of the dtype that the
docstring says, and, where only the memory layout or a dtype differs, equal to the valid call's.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import linfast as lf
from tests.arguments.good import EXEMPT, GOOD, Good
from tests.arguments.public import parameters_of, public_callables
from tests.arguments.wrong import MUST_RAISE, MUST_WORK, Wrong, names, outcome, tensors_in, wrong_values

CALLABLES = public_callables()
_CLOSE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def test_every_public_callable_has_a_valid_call() -> None:
    assert not [name for name in CALLABLES if name not in GOOD and name not in EXEMPT], "no valid call for these"
    assert not [name for name in (*GOOD, *EXEMPT) if name not in CALLABLES], (
        "valid calls of callables that are not public"
    )


@pytest.mark.parametrize("name", GOOD)
def test_arguments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a string is a path
    findings = list(findings_of(name))
    assert not findings, "\n".join(findings)


def findings_of(name: str) -> list[str]:
    """The faults of a callable, one line each."""
    good = GOOD[name]
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack for a GPU that is not there
    call, arguments = good.make()
    parameters = {p.name: p for p in parameters_of(CALLABLES[name])}
    assert set(arguments) == set(parameters), f"no valid value for {set(parameters) ^ set(arguments)}"
    expected, error = outcome(call, arguments)
    assert error is None, f"the valid call of {name} raised {error!r}"
    hints = _hints(CALLABLES[name])
    found = []
    for argument, value in arguments.items():
        annotation = hints.get(argument, Any)
        allowed = good.allowed.get(argument, set())
        for wrong in wrong_values(argument, value, annotation, good.dims, allowed):
            finding = _try(good, argument, wrong, expected)
            if finding:
                found.append(f"{name}({argument}={wrong.label}): {finding}")
    return found


def _try(good: Good, argument: str, wrong: Wrong, expected: Any) -> str | None:
    """The fault of an outcome; None where there is none."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack for a GPU that is not there
    call, arguments = good.make()
    result, error = outcome(call, {**arguments, argument: wrong.value})
    if error is not None:
        if wrong.verdict == MUST_WORK:
            return f"should work; raised {error!r:.200}"
        if isinstance(error, FileNotFoundError) and argument == "path":
            return None
        if not isinstance(error, (ValueError, TypeError)):
            return f"raised {error!r:.200}"
        if not (good.symbol or names(str(error), argument)):
            return f"the error does not name it: {error!r:.200}"
        return None
    if wrong.verdict == MUST_RAISE:
        return "was taken"
    return _result(good, argument, wrong, result, expected)


def _result(good: Good, argument: str, wrong: Wrong, result: Any, expected: Any) -> str | None:
    values, wanted = tensors_in(result), tensors_in(expected)
    if good.follows and values and values[0].is_floating_point():
        follows = wrong.dtype if argument == good.follows and wrong.dtype else torch.float32
        if values[0].dtype != follows:
            return f"the result is {values[0].dtype}, not {follows}"
    if any(v.is_meta for v in values):
        return None
    finite = all(bool(v.isfinite().all()) for v in values if v.is_floating_point())
    if not finite and all(bool(w.isfinite().all()) for w in wanted) and wrong.label != "infinity":
        return "the result is not finite"
    if (wrong.verdict == MUST_WORK and wrong.label.startswith(("a strided", "it as"))) or wrong.dtype:
        close = _CLOSE[wrong.dtype or torch.float32]
        for value, truth in zip(values, wanted, strict=True):
            if value.shape != truth.shape or not torch.allclose(value.double(), truth.double(), close, close):
                return "the result is another"
    return None


def _hints(function: Any) -> dict[str, Any]:
    made = function.__init__ if isinstance(function, type) else function
    namespace = {"Linearizer": lf.Linearizer, "Dense": lf.Dense}
    return typing.get_type_hints(made, localns=namespace)
