"""``linfast train``, small: what it writes, what it prints, resuming, and one line for a mistake."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import linfast as lf
from linfast.cli import _parser, main
from linfast.training import ModularStyle

_DOCS = Path(__file__).parent.parent.parent / "docs"
_SMALL = ["--steps", "4", "--batch", "8", "--depth", "2"]


def _train(application: str, out: Path, *arguments: str) -> int:
    return main(["train", application, "--out", str(out), *_SMALL, *arguments])


def _is_png(path: Path) -> bool:
    return path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments", [(), ("--separate",), ("--flow", "conv", "--ema", "0.5")])
def test_one_step(tmp_path: Path, capsys, arguments: tuple[str, ...]) -> None:
    assert _train("one-step", tmp_path, "--hidden", "8", "--rank", "2", "--time-hidden", "16", *arguments) == 0
    text = capsys.readouterr().out
    assert float(re.search(r"one-step sampling of 64 +([\d.]+) dB", text)[1]) >= 100
    assert float(re.search(r"held-out digits +([\d.]+) dB", text)[1]) >= 60
    assert _is_png(tmp_path / "figure.png")
    f = lf.load(tmp_path / "model.safetensors")
    assert isinstance(f, lf.Linearizer)
    assert (f.g_x is f.g_y) is False
    assert ("--separate" in arguments) == isinstance(f.g_x, lf.Flow)
    shape = (1, 8, 8) if "conv" in arguments else (64,)
    assert lf.sample(f, torch.randn(2, *shape), steps=3).shape == (2, *shape)


def test_ign(tmp_path: Path, capsys) -> None:
    assert _train("ign", tmp_path, "--hidden", "8", "--denoising", "0", "0.5") == 0
    text = capsys.readouterr().out
    errors = [
        float(value) for value in re.findall(r"\|f\(f\(x\)\) - f\(x\)\| / \|f\(x\)\|, .* ([\d.e+-]+)\n", text)
    ]
    assert len(errors) == 6
    assert max(errors) <= 1e-5
    assert len(re.findall(r"rank of P +\d+ of 64", text)) == 2
    assert _is_png(tmp_path / "figure.png")
    for weight in ("0", "0.5"):
        f = lf.load(tmp_path / f"denoising-{weight}" / "model.safetensors")
        assert isinstance(f.A, lf.Projection)


@pytest.mark.parametrize("operators", ["generated", "free"])
def test_style(tmp_path: Path, capsys, operators: str) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for name, picture in zip(("original", "warm", "cold", "dark"), pixels, strict=True):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    arguments = ("--data", str(tmp_path), "--resolution", "8", "--width", "4", "--operators", operators)
    assert _train("style", tmp_path / "out", *arguments, "--batch", "3") == 0
    text = capsys.readouterr().out
    assert "ends of the strips are the styles          bit for bit" in text
    assert len(re.findall(r"(cold|dark|warm) against its target +[\d.]+ dB", text)) == 3
    assert float(re.search(r"styles in turn +([\d.e+-]+) rel", text)[1]) < 1e-5
    assert _is_png(tmp_path / "out" / "figure.png")
    assert _is_png(tmp_path / "out" / "strips.png")
    styles = lf.load(tmp_path / "out" / "model.safetensors")
    assert isinstance(styles, ModularStyle)
    assert styles.names == ("cold", "dark", "warm")


def test_resume_goes_on_from_the_checkpoint(tmp_path: Path, capsys) -> None:
    small = ("--hidden", "8", "--rank", "2", "--time-hidden", "16")
    assert _train("one-step", tmp_path, *small) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert _train("one-step", tmp_path, *small, "--resume") == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert _train("one-step", tmp_path, *small, "--resume", "--seed", "1") == 2
    assert "had seed=0; got 1" in capsys.readouterr().err


def test_a_mistake_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for application, arguments, says in (
        ("one-step", ("--data", "none.npz"), "none.npz: no such file"),
        ("one-step", ("--resolution", "5"), "cannot average 8 pixels down to 5"),
        ("one-step", ("--device", "cuda:99"), "cuda:99"),
        ("one-step", ("--learning-rate", "-1"), "learning_rate must be positive"),
        ("one-step", ("--resume",), "no checkpoint to resume from"),
        ("ign", ("--start-rank", "65"), "rank must be between"),
        ("style", ("--data", str(tmp_path / "empty")), "no folder with PNG"),
    ):
        assert _train(application, out, *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert says in error
        assert error.startswith("linfast train: ")
    assert not out.exists()
    with pytest.raises(SystemExit):
        main(["train", "nothing"])


def test_a_loss_that_blows_up_is_one_line(tmp_path: Path, capsys) -> None:
    assert _train("one-step", tmp_path, "--likelihood", "inf") == 2
    assert "step 0: likelihood is" in capsys.readouterr().err


def test_the_pages_commands_are_understood_and_their_pictures_are_there() -> None:
    for name in ("one_step_training", "ign", "style"):
        text = (_DOCS / f"{name}.md").read_text()
        commands = re.findall(r"^linfast (train .*)$", text.replace("\\\n", ""), re.MULTILINE)
        assert commands
        for command in commands:
            assert _parser().parse_args(command.split()).command == "train"
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", text, re.DOTALL)
        assert pictures
        assert all((_DOCS / picture).stat().st_size < 300_000 for picture in pictures)
