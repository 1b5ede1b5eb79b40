"""The example notebooks run at small size, and their stored outputs are those of their code.

The code cells run in this process, one after another in one namespace: no Jupyter is needed.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from tests.accelerate.zoo import require
from tests.notebooks import FOLDER, NAMES, code_cells, digest, read, source

_SMALL = {"STEPS": "10", "SIMULATIONS": "200"}  # the variables that the first code cells read
_LIBRARY = {"sbi_posterior": "sbi"}
_MOST_BYTES = 400_000


def test_there_are_notebooks() -> None:
    assert NAMES == ["linear_algebra", "one_step_digits", "sbi_posterior", "two_moons"]
    page = (FOLDER / "README.md").read_text()
    assert all(f"({name}.ipynb)" in page for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs(name: str) -> None:
    notebook = read(name)
    cells = code_cells(notebook)
    assert notebook["metadata"]["linfast"]["digest"] == digest(notebook), f"run python -m tests.notebooks {name}"
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]]
    assert set(kinds) <= {("stream", "stdout"), ("display_data", None)}, "an error, a warning or a stray value"
    assert len(kinds) >= len(cells) // 2
    assert 10 <= len(notebook["cells"]) <= 20
    assert (FOLDER / f"{name}.ipynb").stat().st_size < _MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_code_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib = require("matplotlib")
    if name in _LIBRARY:
        require(_LIBRARY[name])
    notebook = read(name)
    first = source(code_cells(notebook)[0])
    assert any(f'os.environ.get("{variable}", ' in first for variable in _SMALL)
    for variable, value in _SMALL.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn: list[int] = []

    def show() -> None:
        """Draw the open pictures, as Jupyter does at the end of a cell."""
        for number in plt.get_fignums():
            plt.figure(number).savefig(os.devnull, format="png")
            drawn.append(number)
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        for number, cell in enumerate(code_cells(notebook), 1):
            exec(compile(source(cell), f"{name}.ipynb, cell {number}", "exec"), namespace)
    pictures = [o for cell in code_cells(notebook) for o in cell["outputs"] if o["output_type"] == "display_data"]
    assert len(drawn) == len(pictures)
    assert not plt.get_fignums()
    printed = capsys.readouterr().out
    assert "False" not in printed, "of a comparison that should be true"
    assert "nan" not in printed
