"""One process of the fuzzer: rounds of draws of each kind, reported to the parent line by line.

The seed of a round follows from the run's seed, the kind and its number: round 7 of "flows" is the same whatever
ran before it. Before every check the recipe is written to a file, where the parent finds it after a crash.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import io
import json
import math
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

from .judge import Finding, Judge

__all__ = ["KINDS", "about", "module_of", "recipes_of", "run_one", "work"]

# name -> share of the time
KINDS = {
    "flows": 3.0, "operators": 3.0, "linearizer": 2.0, "ops": 2.0, "sampling": 1.5, "files": 1.0, "libraries": 1.5,
    "arguments": 1.0, "kernels": 1.0,
}  # fmt: skip
_SHRINK_SECONDS = 20.0
_HANGS = 300.0  # seconds: a check that takes longer is a finding


class _Stop(BaseException):
    """Leaves hypothesis at once: the time is over, or the time for minimising a finding is."""


def module_of(kind: str) -> Any:
    return importlib.import_module(f"tests.fuzz.{kind}")


def run_one(kind: str, recipe: dict[str, Any], judge: Judge | None = None) -> Judge:
    """Check one recipe; raises what it finds."""
    judge = judge or Judge()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module_of(kind).check(judge, recipe)
    return judge


def recipes_of(kind: str, seed: int, count: int) -> list[dict[str, Any]]:
    """The recipes of a round with this many draws."""
    recipes: list[dict[str, Any]] = []

    def keep(recipe: dict[str, Any]) -> None:
        recipes.append(recipe)

    quick = _settings(count, (Phase.generate,))
    hypothesis.seed(seed)(quick(hypothesis.given(module_of(kind).RECIPES)(keep)))()
    return recipes


def _settings(count: int, phases: tuple[Phase, ...]) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=count, database=None, deadline=None, print_blob=False, phases=phases,
                report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip


def about(error: BaseException) -> str:
    """The identity of a finding: a call and its oracle, or an exception type and a line of linfast."""
    if isinstance(error, Finding):
        return error.about
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/linfast/" in f.filename or "/kernels/" in f.filename] or frames
    return f"{type(error).__name__} in {'/'.join(own[-1].filename.split('/')[-2:])}:{own[-1].lineno}"


def work(kinds: list[str], seed: int, first: dict[str, int], seconds: float, calls: float, draw_file: Path) -> None:
    """Rounds in turn until the time or the calls are over; JSON lines on standard output."""
    torch.set_num_threads(1)
    faulthandler.enable()
    end = time.monotonic() + seconds
    spent, done = dict.fromkeys(kinds, 0.0), dict(first)
    known: set[str] = set()
    total = 0
    while time.monotonic() < end and total < calls:
        kind = min(kinds, key=lambda k: spent[k] / KINDS[k])
        start = time.monotonic()
        judge = _round(kind, seed, done[kind], end, known, draw_file)
        done[kind] += 1
        spent[kind] += time.monotonic() - start
        total += sum(judge.calls.values())
        _tell(kind=kind, round=done[kind], calls=judge.calls, seconds=time.monotonic() - start)


def _tell(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _round(kind: str, seed: int, number: int, end: float, known: set[str], draw_file: Path) -> Judge:
    """One run of hypothesis; each finding is reported once."""
    digest = hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
    judge = Judge()
    smallest: dict[str, tuple[int, str, str]] = {}
    shrink_until = math.inf

    def check(recipe: dict[str, Any]) -> None:
        nonlocal shrink_until
        if time.monotonic() > min(max(end, 0 if shrink_until is math.inf else shrink_until), shrink_until):
            raise _Stop
        text = repr(recipe)
        draw_file.write_text(f"{kind}\n{number}\n{text}")
        faulthandler.dump_traceback_later(_HANGS, exit=True)
        try:
            run_one(kind, recipe, judge if shrink_until is math.inf else None)
        except Exception as error:
            name = f"{kind}: {about(error)}"
            if name in known:
                return
            if shrink_until is math.inf:
                shrink_until = time.monotonic() + _SHRINK_SECONDS
            best = smallest.get(name)
            if best is None or len(text) < best[0]:
                smallest[name] = (len(text), text, f"{type(error).__name__}: {str(error)[:400]}")
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()

    settings = _settings(min(10 * 2**number, 60), (Phase.generate, Phase.shrink))
    seeded = hypothesis.seed(int.from_bytes(digest[:8], "big"))
    test = seeded(settings(hypothesis.given(module_of(kind).RECIPES)(check)))
    try:
        test()
    except (Exception, _Stop) as error:
        if not smallest and not isinstance(error, _Stop):
            raise
    for name, (_, text, message) in smallest.items():
        known.add(name)
        _tell(finding=name, kind=kind, recipe=text, message=message)
    return judge


def main() -> None:
    options = json.loads(sys.argv[1])
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests import interpreter

        interpreter.install()
    work(
        options["kinds"], options["seed"], options["first"], options["seconds"], options["calls"],
        Path(options["draw_file"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
