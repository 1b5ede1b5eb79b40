"""The quick demo: its files, its table, its claims that hold at any quality, and its errors."""

from __future__ import annotations

import contextlib
import io
import re
import shlex

import numpy as np
import pytest
import torch
from linfast.examples import commands, one_step
from linfast.examples.one_step import OneStepModel, build_one_step, conditioned

import linfast as lf
from linfast.cli import main
from tests.marks import long


@pytest.fixture(scope="module", params=[10, *long(1)])
def quick(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[str, object]:
    """The output and the folder of the quick demo, with a tenth of its training steps or all of them."""
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    model, steps = commands._QUICK
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(commands, "_QUICK", (model, steps // request.param))
        assert main(["demo", "--quick", "--out", str(out)]) == 0
    return printed.getvalue(), out


def test_it_prints_what_it_measured(quick) -> None:
    text, _ = quick
    trained = re.search(r"training, (\d+) steps", text)[1] == str(commands._QUICK[1])
    assert float(re.search(r"one-step sampling of 64 +([\d.]+) dB", text)[1]) >= 100
    assert float(re.search(r"inversion of 64 held-out digits +([\d.]+) dB", text)[1]) >= 80
    assert float(re.search(r"superposition.* ([\d.e-]+) relative", text)[1]) <= 1e-5
    assert len(re.findall(r"\d\.\d{4}$", text, re.MULTILINE)) == 6
    share, real = map(float, re.search(r"same label +([\d.]+)% \(held-out digits ([\d.]+)%\)", text).groups())
    assert share >= (70 if trained else 0)
    assert real > 95


def test_it_saves_a_figure_and_a_model_that_samples(quick) -> None:
    _, out = quick
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    f = conditioned(lf.load(out / "model.safetensors"), torch.eye(10)[7:8])
    assert lf.sample(f, torch.randn(2, 64), steps=5).shape == (2, 64)


def test_the_command_that_it_names_next_samples_the_class(quick, tmp_path, monkeypatch) -> None:
    text, out = quick
    monkeypatch.chdir(tmp_path)
    named = shlex.split(re.search(r"next: +linfast (.*)", text)[1])
    assert main([*named, "--seed", "3"]) == 0
    found = torch.from_numpy(np.load("x.npy"))
    f = lf.load(out / "model.safetensors").eval()
    for label, same in ((7, True), (6, False)):
        one = conditioned(f, torch.eye(10)[label : label + 1])
        expected = next(lf.sample_stream(one, 4096, 4096, seed=3))
        assert torch.allclose(found[: len(expected)], expected, atol=1e-5) == same


def test_other_images_are_sampled_without_labels(tmp_path, monkeypatch, capsys) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.integers(0, 256, (100, 4, 4), dtype=np.uint8))
    monkeypatch.setattr(commands, "_QUICK", (commands._QUICK[0], 2))
    assert main(["demo", "--quick", "--data", str(tmp_path / "x.npz"), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "same label" not in text
    assert "--label" not in text


def test_samples_are_compared_with_the_nearest_training_image(monkeypatch) -> None:
    training = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]]), torch.eye(2)[[0, 1, 1]]
    held = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.9, 1.0]]), torch.eye(2)[[0, 1, 1]]
    monkeypatch.setattr(one_step, "conditioned", lambda f, context: context)
    monkeypatch.setattr(one_step, "generator", lambda context, steps: lambda noise: 9 * context.flip(1) - 9)
    found = one_step.recognised(torch.nn.Linear(1, 1), training, held, 0)  # class 0 at (-1, 0), class 1 at (0, -1)
    assert [value for _, value, _ in found] == ["66.6% (held-out digits 66.7%)", "1.00 (held-out digits 0.37)"]


@pytest.mark.parametrize(
    ("label", "labels", "expected"),
    [
        (10, True, "0 to 9; got 10"),
        (-1, True, "0 to 9; got -1"),
        (0, False, "none: the model takes none, or has a fixed one; got 0"),
    ],
)
def test_a_wrong_label_is_one_line(tmp_path, capsys, label: int, labels: bool, expected: str) -> None:
    model = OneStepModel(hidden=8, depth=2)
    lf.save(build_one_step(model, 4, 10 if labels else 0), tmp_path / "f.safetensors")
    given = ["--checkpoint", str(tmp_path / "f.safetensors"), "--count", "2", "--out", str(tmp_path / "x.npy")]
    assert main(["sample", *given, f"--label={label}"]) == 2
    assert capsys.readouterr().err == f"linfast sample: error: label must be one of {expected}\n"


def test_a_label_is_given_once(tmp_path, capsys) -> None:
    """It is asked for where the model takes one, and refused where it is fixed already."""
    f = build_one_step(OneStepModel(hidden=8, depth=2), 4, 10)
    lf.save(f, tmp_path / "f.safetensors")
    lf.save(conditioned(f, torch.eye(10)[3:4]), tmp_path / "three.safetensors")

    def sample(name: str, *more: str) -> str:
        given = ["--checkpoint", str(tmp_path / name), "--count", "2", "--out", str(tmp_path / f"{name}.npy")]
        status = main(["sample", *given, *more])
        text = capsys.readouterr()
        return text.err if status else text.out

    says = "linfast sample: error: the model takes labels: pass --label, one of 0 to 9\n"
    assert sample("f.safetensors") == says
    says = "linfast sample: error: label must be one of none: the model takes none, or has a fixed one; got 5\n"
    assert sample("three.safetensors", "--label=5") == says
    assert "float32 (2, 16)" in sample("three.safetensors")


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
