"""One side of ``--compare``: a process that holds one version of linfast and times what it is asked to.

It reads one JSON request a line and answers each with one line:

    {"build": [case, size], "compile": bool, "device": str}
        {"providers": [...], "refused": {...}}, or {"missing": why}
    {"time": provider, "calls": n}
        {"ms": [n times]}
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from .cases import CASES
from .harness import Options, Problem, judged
from .timing import time_interleaved

__all__ = ["main"]


def main() -> int:
    """Answer requests until there are no more."""
    problem: Problem | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            problem, answer = _build(request)
        else:
            assert problem is not None
            answer = {"ms": _time(problem, request["time"], request["calls"])}
        print(json.dumps(answer), flush=True)
    return 0


def _build(request: dict[str, Any]) -> tuple[Problem | None, dict[str, Any]]:
    name, size = request["build"]
    try:
        problem = CASES[name].build(size, Options(torch.device(request["device"]), request["compile"]))
        verdicts = judged(problem)
    except Exception as error:  # this version of linfast has no such op, or another signature
        return None, {"missing": f"{type(error).__name__}: {error}"}
    refused = {name: verdict.refused for name, verdict in verdicts.items() if verdict.refused is not None}
    return problem, {"providers": [name for name in verdicts if name not in refused], "refused": refused}


def _time(problem: Problem, name: str, calls: int) -> list[float]:
    provider = next(provider for provider in problem.providers if provider.name == name)
    timings = time_interleaved({name: provider.call}, problem.inputs, problem.device, rounds=calls)
    return timings[name].ms


if __name__ == "__main__":
    raise SystemExit(main())
