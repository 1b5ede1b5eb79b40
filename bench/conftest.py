"""``pytest bench``: a test for every case, quick size and provider."""

from __future__ import annotations

import functools

import pytest
import torch
from linfast.bench.cases import CASES
from linfast.bench.check import Verdict
from linfast.bench.harness import Options, Problem, judged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)
def problem(name: str, index: int) -> tuple[Problem, dict[str, Verdict]]:
    """A case at a quick size, and what the check says of its providers."""
    built = CASES[name].build(CASES[name].sizes["quick"][index], Options(DEVICE))
    return built, judged(built)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a provider; problems are built twice, here for the names and when they run."""
    wanted = [
        pytest.param(name, index, provider.name, id=f"{name}-{_id(name, index)}-{provider.name}")
        for name, case in CASES.items()
        for index in range(len(case.sizes["quick"]))
        for provider in CASES[name].build(case.sizes["quick"][index], Options(DEVICE)).providers
    ]
    metafunc.parametrize(("name", "index", "provider"), wanted)


def _id(name: str, index: int) -> str:
    return "-".join(f"{key}{value}" for key, value in CASES[name].sizes["quick"][index].items())
