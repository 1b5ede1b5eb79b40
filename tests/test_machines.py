"""The matrix of machines: what a run measures, what it lists, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import machines
from tests.machines import Run, main, tightest

_TESTS = """
import torch
from tests.seeds import SEED

def test_near():
    error = 0.06 if SEED else 0.02
    assert error <= 0.1, "small"
    assert 3 <= 5  # no bound on rounding
    torch.testing.assert_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 0.5e-3]), rtol=0, atol=1e-3)

def test_red():
    assert 0.3 < 0.1 - SEED

def test_compiles_whole():
    assert SEED == 0
"""


def test_a_run_measures_every_comparison_and_names_what_fails(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "test_two.py").write_text(_TESTS)
    monkeypatch.setattr(machines, "_BYTECODE", {})  # torch's, which is there
    run = machines.run("default", 1, (str(tmp_path / "test_two.py"), "-p", "no:xdist"))
    assert [name.partition(" ")[0].rpartition("::")[2] for name in run.failed] == ["test_red"]
    assert run.summary.startswith("1 failed, 1 passed")
    ((test, margin),) = run.margins.items()
    assert test.endswith("::test_near")
    assert margin == pytest.approx(0.6)


def _run(seed: int, failed: tuple[str, ...] = (), **margins: float) -> Run:
    return Run("default", seed, "said", failed, 1.0, margins)


def test_the_tightest_are_listed_in_their_worst_run() -> None:
    runs = [_run(0, a=0.1, b=0.5), _run(1, a=0.3, b=0.2, c=0.05)]
    assert [(margin, test, run.seed) for margin, test, run in tightest(runs)] == [
        (0.5, "b", 0),
        (0.3, "a", 1),
        (0.05, "c", 1),
    ]
    assert len(tightest([_run(0, **{f"t{i}": i / 100 for i in range(30)})])) == 10


@pytest.mark.parametrize(
    ("run", "arguments", "status"),
    [
        (_run(0, a=0.69), (), 0),
        (_run(0, a=0.71), (), 1),
        (_run(0, a=0.71), ("--random",), 0),  # in CI only a figure, not a failure
        (_run(0, ("test_red",)), ("--random",), 1),
    ],
)
def test_when_the_matrix_fails(run: Run, arguments: tuple[str, ...], status: int, monkeypatch, capsys) -> None:
    called = []
    monkeypatch.setattr(machines, "run", lambda *given, tests: (called.append((*given, tests)), run)[1])
    assert main(arguments) == status
    assert len(called) == (1 if arguments else len(machines.SETTINGS) * len(machines.SEEDS))
    out = capsys.readouterr().out
    assert all(test in out for test in run.failed)
    if arguments:
        assert called[0][1] != 0
        setting, seed, tests = called[0]
        assert out.startswith(f"setting {setting!r}, seed {seed}, {' '.join(tests)}\n")
        files = [str(path) for folder in machines.TESTS for path in Path(folder).glob("test_*.py")]
        assert len(files) <= 4 * len({*tests} & {*files}) == 4 * len(tests) < len(files) + 4
