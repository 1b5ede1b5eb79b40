"""The demo, quick: its files, its table, its claims that hold at any quality, its errors."""

from __future__ import annotations

import contextlib
import io
import re

import numpy as np
import pytest
import torch

import linfast as lf
from linfast.cli import main
from linfast.examples import demo
from tests.marks import long


@pytest.fixture(scope="module", params=[10, *long(1)])
def quick(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[str, object]:
    """What the quick demo printed and the folder it wrote; of its training steps a tenth, or all."""
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    model, steps = demo._QUICK
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo, "_QUICK", (model, steps // request.param))
        assert main(["demo", "--quick", "--out", str(out)]) == 0
    return printed.getvalue(), out


def test_it_prints_what_it_measured(quick) -> None:
    text, _ = quick
    assert float(re.search(r"one-step sampling of 64 +([\d.]+) dB", text)[1]) >= 100
    assert float(re.search(r"inversion of 64 held-out digits +([\d.]+) dB", text)[1]) >= 80
    assert float(re.search(r"superposition.* ([\d.e-]+) relative", text)[1]) <= 1e-5
    assert len(re.findall(r"\d\.\d{4}$", text, re.MULTILINE)) == 6


def test_it_saves_a_figure_and_a_model_that_samples(quick) -> None:
    _, out = quick
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    f = lf.load(out / "model.safetensors")
    assert lf.sample(f, torch.randn(2, 64), steps=5).shape == (2, 64)


def test_bad_input_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "bad.npz").write_text("no")
    np.savez(tmp_path / "other.npz", y=np.zeros(3))
    np.savez(tmp_path / "shape.npz", x=np.zeros((200, 4, 5), np.uint8))
    for arguments, expected in (
        (["--data", str(tmp_path / "none.npz")], "no such file"),
        (["--data", str(tmp_path / "bad.npz")], "expected an .npz"),
        (["--data", str(tmp_path / "other.npz")], "array x"),
        (["--data", str(tmp_path / "shape.npz")], "(200, 4, 5)"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "nonsense"], "nonsense"),
    ):
        assert main(["demo", "--quick", "--out", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.startswith("linfast demo: ")
    assert not (tmp_path / "out").exists()


def test_info_names_versions(capsys) -> None:
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
