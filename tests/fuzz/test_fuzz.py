"""Every oracle of the fuzzer can fail, crashes are reported, and earlier findings stay corrected."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import linfast as lf
from linfast.flows import bijection, couplings, segments
from linfast.operators import dense, low_rank
from linfast.sampling import stream
from tests.fuzz import __main__ as fuzz
from tests.fuzz.examples import EXAMPLES, FLOW, STACK
from tests.fuzz.judge import Finding, Judge
from tests.fuzz.worker import KINDS, about, recipes_of, run_one

Patch = Callable[[pytest.MonkeyPatch], None]


def after(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """``owner.name`` returns ``change(result, *arguments)`` in place of its result."""
    original = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        return change(original(*args, **kwargs), *args, **kwargs)

    return lambda monkeypatch: monkeypatch.setattr(owner, name, broken)


def wrong_log_det(result: Any, *_: Any, **__: Any) -> Any:
    return result[0], None if result[1] is None else -result[1]


def reads_its_neighbour(result: Any, *_: Any, **__: Any) -> Any:
    y, log_det = result
    return y + 1e-3 * y.detach().roll(1, 0), log_det


def drops_a_gradient(result: Any, *_: Any, **__: Any) -> Any:
    x, (grad, *rest) = result
    return x, [grad, *(None for _ in rest)]


def drops_a_weight(model: Any, *_: Any, **__: Any) -> Any:
    with torch.no_grad():
        next(iter(model.state_dict().values()), torch.ones(1)).zero_()
    return model


def changes_a_weight(report: Any, model: Any, **_: Any) -> Any:
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    return report


COUNT = itertools.count()
NARROW = {**FLOW, "features": 2, "hidden": (), "depth": 1, "mix": None}
FLOWS = {
    "flow": FLOW, "layout": "contiguous", "time": "number", "requires_grad": True, "batch": 3, "scale": 1.0,
    "autocast": False, "dtype": "float32", "seed": 0,
}  # fmt: skip
OPERATORS = {
    "tree": ("dense", 3, 3, 0, False, 0), "rtol": None, "batch": 2, "dtype": "float32", "power": 1, "scale": 1.0,
    "seed": 2, "layout": "contiguous",
}  # fmt: skip
LINEARIZER = {
    "g_x": NARROW, "A": ("dense", 2, 2, 1, False, 2), "g_y": None, "layout": "contiguous", "seed": 0, "t": "number",
    "dtype": "float32", "batch": 1,
}  # fmt: skip
SAMPLING = {
    "g": {**NARROW, "std": 0.1}, "batch_size": 1, "stopped": 5, "seed": 25, "method": "rk4", "batch": 2, "steps": 5,
    "block": 14, "core": "low rank", "stop": 0.5, "tol": None, "count": 7, "features": 5, "rank": 1, "shared": True,
    "dtype": "float32", "alpha": 1.0,
}  # fmt: skip
FILES = {
    "what": {"kind": "operator", "made": ("dense", 1, 1, 0, False, 0)}, "dtype": "float32", "frozen": False,
    "seed": 0, "damage": "cut", "place": 0.0,
}  # fmt: skip
LIBRARIES = {
    "kind": "zuko", "memory": "store", "layers": 0, "option": 6, "hidden": 2, "train": False, "seed": 2, "depth": 1,
    "batch": 5, "features": 2, "context": 3, "std": 0.1, "mask": 3, "dtype": "float64",
}  # fmt: skip
OPS = {**STACK, "op": "low_rank", "positions": (3,), "rank": 1, "dtype": "float32"}
# name -> (kind, what is broken, a recipe, a part of the finding's name). The recipes are fixed because what
# hypothesis draws from a seed depends on the modules that the process has imported.
BROKEN: dict[str, tuple[str, Patch, dict[str, Any], str]] = {
    "log_det": ("flows", after(segments, "run_couplings", wrong_log_det), FLOWS, "log_det"),
    "neighbour": ("flows", after(lf.Flow, "_transform", reads_its_neighbour), FLOWS, ""),
    "gradient": (
        "flows", after(couplings._Coupling, "_undo", drops_a_gradient),
        {**FLOWS, "flow": {**FLOW, "memory": "invert"}}, "memory=invert",
    ),
    "folded": (
        "kernels", after(lf.Mix, "after", lambda r, *_: (1.001 * r[0], r[1])),
        {**FLOWS, "flow": {**FLOW, "mix": "lu", "actnorm": True}}, "",
    ),
    "product": (
        "operators", after(low_rank.LowRank, "_product", lambda y, *_, **__: y * (1 + 1e-4)),
        {**OPERATORS, "tree": ("low_rank", 17, 17, 1, False, 0)}, "A(z)",
    ),
    "pinv": (
        "operators", after(dense.Dense, "_pinv", lambda A, *_: 1.001 * A),
        {**OPERATORS, "tree": ("dense", 1, 1, 0, False, 0)}, "pinv",
    ),
    "space": (
        "linearizer", after(lf.InducedSpace, "interpolate", lambda y, *_: y * 1.001), LINEARIZER, "V.interpolate"
    ),
    "stream": ("sampling", after(torch, "randn", lambda x, *_, **__: x + 1e-3 * next(COUNT)), SAMPLING, ""),
    "fingerprint": ("sampling", after(stream, "fingerprint", lambda *_: ""), SAMPLING, "another model"),
    "load": ("files", after(lf, "load", drops_a_weight), FILES, "load"),
    "accelerate": ("libraries", after(lf, "accelerate", changes_a_weight), LIBRARIES, "accelerated"),
    "op": ("ops", after(lf.ops, "low_rank", lambda y, *_: y * 1.001), OPS, "low_rank"),
    "argument": (
        "arguments", lambda m: m.setattr(bijection.Bijection, "_check", lambda *_: None),
        {"pair": ("flow.forward", "x"), "replacement": "None"}, "flow",
    ),
    "kernel": ("kernels", after(lf.ops, "low_rank", lambda y, *_: y * 1.001), OPS, "low_rank"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_oracle_sees_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, patch, recipe, expected = BROKEN[name]
    assert found_in(kind, recipe) is None
    patch(monkeypatch)
    about_it = found_in(kind, recipe)
    assert about_it is not None
    assert expected in about_it


def found_in(kind: str, recipe: dict[str, Any]) -> str | None:
    try:
        run_one(kind, recipe)
    except Finding as finding:
        return about(finding)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_draws_of_each_kind(kind: str) -> None:
    judge = Judge()
    for recipe in recipes_of(kind, 2, 2 if kind == "kernels" else 6):
        run_one(kind, recipe, judge)
    assert sum(judge.calls.values()) > 0


@pytest.mark.parametrize(("kind", "recipe"), EXAMPLES)
def test_what_was_found_stays_mended(kind: str, recipe: dict[str, Any]) -> None:
    run_one(kind, recipe)


def test_the_same_seed_draws_the_same() -> None:
    assert repr(recipes_of("flows", 3, 10)) == repr(recipes_of("flows", 3, 10))


CRASHES = """
import json, os, pathlib, signal, sys
options = json.loads(sys.argv[1])
pathlib.Path(options["draw_file"]).write_text("flows\\n7\\n{'x': 1}")
print(json.dumps({"kind": "flows", "round": 7, "calls": {"f": 5}, "seconds": 1}), flush=True)
os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_crash_is_a_finding_and_the_next_round_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "WORKER", [sys.executable, "-c", CRASHES])
    campaign = fuzz.Campaign(seed=0, seconds=60.0, calls=100.0)
    campaign.run(["flows"], 5.0)
    assert campaign.calls["flows"] == 5
    assert campaign.first["flows"] == 8
    [text] = campaign.findings.values()
    assert "-11" in text
    assert """--only flows --try "{'x': 1}\"""" in text


def test_the_command() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--calls", "50", "--only", "operators", "--seed", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "calls (operators" in run.stdout.splitlines()[-1]
    assert "0 findings" in run.stdout


def test_a_refusal_is_held_to_its_words() -> None:
    judge = Judge()
    with judge.refuses("f", "width"):
        raise ValueError("width must be at least 1; got 0")
    for error, told in ((ValueError("no"), "names none"), (KeyError("width"), "KeyError")):
        with pytest.raises(Finding, match=told), judge.refuses("f", "width"):
            raise error
    with pytest.raises(Finding, match="was not refused"), judge.refuses("f"), contextlib.nullcontext():
        pass
    assert judge.calls == {"f": 1}
