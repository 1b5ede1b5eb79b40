"""Every oracle of the fuzzer can fail, what crashes is told, and what was found stays mended."""

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
from linfast.flows import bijection, couplings
from linfast.operators import dense, low_rank
from linfast.sampling import stream
from tests.fuzz import __main__ as fuzz
from tests.fuzz.examples import EXAMPLES
from tests.fuzz.judge import Finding, Judge
from tests.fuzz.worker import KINDS, about, recipes_of, run_one

Patch = Callable[[pytest.MonkeyPatch], None]


def after(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """``owner.name`` returns what ``change(result, *arguments)`` makes of its result."""
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
BROKEN: dict[str, tuple[str, Patch, str]] = {
    "log_det": ("flows", after(couplings, "affine_coupling", wrong_log_det), "log_det"),
    "neighbour": ("flows", after(lf.Flow, "_transform", reads_its_neighbour), ""),
    "gradient": ("flows", after(couplings._Coupling, "_undo", drops_a_gradient), "memory=invert"),
    "folded": ("kernels", after(lf.Mix, "after", lambda r, *_: (1.001 * r[0], r[1])), "lu"),
    "product": ("operators", after(low_rank.LowRank, "_product", lambda y, *_, **__: y * (1 + 1e-4)), "A(z)"),
    "pinv": ("operators", after(dense.Dense, "_pinv", lambda A, *_: 1.001 * A), "pinv"),
    "space": ("linearizer", after(lf.InducedSpace, "interpolate", lambda y, *_: y * 1.001), "V.interpolate"),
    "stream": ("sampling", after(torch, "randn", lambda x, *_, **__: x + 1e-3 * next(COUNT)), ""),
    "fingerprint": ("sampling", after(stream, "fingerprint", lambda *_: ""), "another model"),
    "load": ("files", after(lf, "load", drops_a_weight), "load"),
    "accelerate": ("libraries", after(lf, "accelerate", changes_a_weight), "accelerated"),
    "op": ("ops", after(lf.ops, "low_rank", lambda y, *_: y * 1.001), "low_rank"),
    "argument": ("arguments", lambda m: m.setattr(bijection.Bijection, "_check", lambda *_: None), "flow"),
    "kernel": ("kernels", after(lf.ops, "low_rank", lambda y, *_: y * 1.001), "low_rank"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_oracle_sees_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, patch, expected = BROKEN[name]
    recipes = recipes_of({"folded": "flows", "kernel": "ops"}.get(name, kind), 1, 60)
    if kind in ("ops", "kernels"):
        recipes = [{**r, "dtype": "float32"} for r in recipes if expected in _names(r)]
    patch(monkeypatch)
    found = (found_in(kind, recipe) for recipe in recipes)
    assert any(about_it is not None and (expected in about_it or name == "folded") for about_it in found)


def _names(recipe: dict[str, Any]) -> tuple[Any, Any]:
    return recipe.get("op"), recipe.get("flow", {}).get("mix")


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
