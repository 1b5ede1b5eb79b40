"""README.md: its examples run and print what it shows, its pictures and links exist, and it is short."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from .accelerate.zoo import require

_ROOT = Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()
_EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", _README, re.DOTALL)


def _run(code: str) -> tuple[str, dict[str, object]]:
    """What the code prints, and its variables."""
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "an example of README.md", "exec"), names)
    return printed.getvalue(), names


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The code of each example, and what it is said to print; files are written to a temporary folder."""
    monkeypatch.chdir(tmp_path)
    assert len(_EXAMPLES) == 3
    assert all(len(code.strip().splitlines()) <= 10 for code, _ in _EXAMPLES)
    return _EXAMPLES


def test_a_model_of_another_library(examples: list[tuple[str, str]]) -> None:
    require("nflows")
    code, output = examples[0]
    printed, names = _run(code)
    assert printed == output
    assert names["samples"].shape == (10_000, 6)


def test_a_density(examples: list[tuple[str, str]], tmp_path: Path) -> None:
    code, _ = examples[1]
    assert "range(1000)" in code
    torch.manual_seed(0)
    _, names = _run(code.replace("range(1000)", "range(20)"))
    assert names["samples"].shape == (1000, 2)
    assert names["log_density"].mean() > -1.5  # of the best normal distribution: -1.9
    loaded = names["lf"].load(tmp_path / "moons.safetensors")
    assert torch.equal(loaded.log_prob(names["x"]), names["log_density"])


def test_one_step_samples_as_many_steps_do(examples: list[tuple[str, str]]) -> None:
    _, names = _run(examples[2][0])
    assert names["loss"].isfinite()
    assert torch.allclose(names["one"], names["many"], atol=1e-4)


def test_it_is_short() -> None:
    assert len(_README.splitlines()) <= 150


def test_pictures_and_files_that_it_links_to_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", _README)
    assert len(links) > 20
    assert not [link for link in links if not (_ROOT / link).is_file()]
