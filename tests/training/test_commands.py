"""``linfast train`` on a small model: its files, its output, resuming, and one line for a mistake."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from linfast.examples import Trainer
from linfast.examples.one_step import recognised
from linfast.examples.runs import CHECKPOINT, Output, save_strips

import linfast as lf
from linfast.cli import _parser, main
from linfast.training import ModularStyle
from tests.laws.zoo import perturb

_DOCS = Path(__file__).parent.parent.parent / "docs"
_SMALL = ["--steps", "4", "--batch", "8", "--depth", "2"]


def _train(application: str, out: Path, *arguments: str) -> int:
    return main(["train", application, "--out", str(out), *_SMALL, *arguments])


def _is_png(path: Path) -> bool:
    return path.read_bytes()[:4] == b"\x89PNG"


_CONV = ("--flow", "conv", "--ema", "0.5")


@pytest.mark.parametrize("arguments", [(), ("--separate",), (*_CONV, "--labels")])
def test_one_step(tmp_path: Path, capsys, arguments: tuple[str, ...]) -> None:
    assert _train("one-step", tmp_path, "--hidden", "8", "--rank", "2", "--time-hidden", "16", *arguments) == 0
    text = capsys.readouterr().out
    assert float(re.search(r"one-step sampling of 64 +([\d.]+) dB", text)[1]) >= 100
    assert float(re.search(r"held-out digits +([\d.]+) dB", text)[1]) >= 60
    assert _is_png(tmp_path / "figure.png")
    f = lf.load(tmp_path / "model.safetensors")
    assert isinstance(f, lf.Linearizer)
    assert (f.g_x is f.g_y) is False
    assert bool({"--separate", "--labels"} & {*arguments}) == isinstance(f.g_x, lf.Flow)
    if "--labels" not in arguments:
        assert lf.sample(f, torch.randn(2, 64), steps=3).shape == (2, 64)
        return
    assert "nearest training digit has the same label" in text
    given = ["sample", "--checkpoint", str(tmp_path / "model.safetensors"), "--count", "3", "--steps", "3", "--out"]
    assert main([*given, str(tmp_path / "x.npy"), "--label", "7"]) == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 1, 8, 8)
    assert main([*given, str(tmp_path / "y.npy")]) == 2
    assert "takes labels" in capsys.readouterr().err
    images, classes = torch.randn(10, 1, 8, 8), torch.eye(10)
    (_, share, _), (_, distance, _) = recognised(f, (images, classes), (images, classes), seed=0)
    assert "held-out digits 100.0%" in share
    assert "held-out digits 0.00" in distance
    perturb(f.g_x)
    seven, six = (f.g_x(torch.ones(1, 1, 8, 8), context=torch.eye(10)[i : i + 1]) for i in (7, 6))
    assert not torch.allclose(seven, six)


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


def test_resume_continues_from_the_checkpoint(tmp_path: Path, capsys) -> None:
    small = ("--hidden", "8", "--rank", "2", "--time-hidden", "16")
    assert _train("one-step", tmp_path, *small) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert _train("one-step", tmp_path, *small, "--resume") == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert _train("one-step", tmp_path, *small, "--resume", "--seed", "1") == 2
    assert "had seed=0; got 1" in capsys.readouterr().err


def test_a_figure_labels_rows_with_any_name(tmp_path: Path) -> None:
    for label in ("$\\frac{a$", "5$ and 6$^", "to \udcff", "a\nb", "", "\\"):
        save_strips([(label, torch.zeros(1, 1, 4, 4))], tmp_path / "figure.png")
        assert _is_png(tmp_path / "figure.png")


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _pictures(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir()
    for i, name in enumerate(("original", "warm", "cold")):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("application", ["one-step", "ign", "style"])
def test_an_earlier_run_is_replaced_only_on_request(application: str, tmp_path: Path, capsys, monkeypatch) -> None:
    small = ("--hidden", "8") if application != "style" else ("--width", "4", "--resolution", "8", "--batch", "2")
    if application == "style":
        small += ("--data", str(_pictures(tmp_path / "pictures")))
    out = tmp_path / "out"
    assert _train(application, out, *small) == 0
    before = _files(out)
    assert {path.name for path in before} >= {"checkpoint.pt", "model.safetensors", "figure.png"}
    with monkeypatch.context() as patch:
        patch.setattr("linfast.examples.runs.Trainer", None)  # before any work
        capsys.readouterr()
        for kept in before:  # one file of the earlier run is enough
            for path in before.keys() - {kept}:
                path.unlink()
            assert _train(application, out, *small, "--seed", "1") == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert all(word in error for word in (f"{kept} exists", "--resume", "--overwrite"))
            for path, content in before.items():
                path.write_bytes(content)
        with pytest.raises(SystemExit):
            _train(application, out, *small, "--resume", "--overwrite")
        assert "not allowed with" in capsys.readouterr().err
    assert _files(out) == before
    (out / "notes.txt").write_text("mine")
    assert _train(application, out, *small, "--seed", "1", "--overwrite") == 0
    after = _files(out)
    assert after.keys() == before.keys() | {out / "notes.txt"}
    assert all(after[path] != content for path, content in before.items())


def test_the_demo_does_not_replace_its_files(tmp_path: Path, capsys) -> None:
    (tmp_path / "figure.png").write_text("mine")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}/figure.png exists: --resume" in capsys.readouterr().err
    assert (tmp_path / "figure.png").read_text() == "mine"


def test_overwriting_keeps_nothing_of_the_earlier_run(tmp_path: Path, monkeypatch) -> None:
    assert _train("one-step", tmp_path, "--hidden", "8") == 0
    before = _files(tmp_path)
    for wrong in (("--device", "nowhere"), ("--rank", "65"), ("--resolution", "5"), ("--data", "none.npz")):
        assert _train("one-step", tmp_path, "--hidden", "8", "--overwrite", *wrong) == 2
        assert _files(tmp_path) == before
    with lf.backend("triton"), monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        assert _train("one-step", tmp_path, "--hidden", "8", "--overwrite") == 2
        assert _files(tmp_path) == before
    assert _train("one-step", tmp_path, "--hidden", "8", "--overwrite", "--likelihood", "1e39") == 2
    assert not list(tmp_path.iterdir())  # only the model of the checkpoint


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (("--latent-noise", "0.2"), "had latent_noise=0.1; got 0.2"),
        (("--likelihood", "0"), "had likelihood=0.5; got 0.0"),
        (("--data", "DATA"), "had data="),
        (("--steps", "5"), "had steps=4; got 5"),
        (("--separate",), "had separate=False; got True"),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path: Path, capsys, other, says: str) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((1797, 8, 8), np.uint8))
    assert _train("one-step", tmp_path / "out", "--hidden", "8") == 0
    before = _files(tmp_path / "out")
    other = [str(tmp_path / "x.npz") if word == "DATA" else word for word in other]
    assert _train("one-step", tmp_path / "out", "--hidden", "8", "--resume", *other) == 2
    assert says in capsys.readouterr().err
    assert _files(tmp_path / "out") == before


_INTERRUPTED = """
import signal, sys
at, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
sys.argv[0] = "linfast"
from linfast.cli import main
from linfast.examples import Trainer
one_step = Trainer._one_step

def interrupted(self, compute):
    if self.step == at:
        signal.raise_signal(number)
    return one_step(self, compute)

Trainer._one_step = interrupted
raise SystemExit(main())
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_one_line_that_says_how_to_go_on(
    tmp_path: Path, capsys, number: int, status: int
) -> None:
    small = ("--hidden", "8", "--checkpoint-every", "2", "--denoising", "0", "1")
    whole, out = tmp_path / "whole", tmp_path / "out"

    def interrupted_at(step: int) -> str:
        command = ["train", "ign", "--out", str(out), *_SMALL, *small]
        done = subprocess.run(
            [sys.executable, "-c", _INTERRUPTED, str(step), str(int(number)), *command],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        lines = done.stderr.splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("training: "))  # progress, on a slow machine

    assert _train("ign", whole, *small) == 0
    said = interrupted_at(1)
    assert said == "linfast train: interrupted; there is no checkpoint yet, so nothing is kept\n"
    said = interrupted_at(3)
    assert said.count("\n") == 1
    assert f"kept in {out}/denoising-0/checkpoint.pt: the same command with --resume goes on" in said
    assert _train("ign", out, *small, "--resume") == 0  # the second model had not begun
    assert [p.relative_to(out) for p in sorted(_files(out))] == [
        p.relative_to(whole) for p in sorted(_files(whole))
    ]
    for name in ("denoising-0/model.safetensors", "denoising-1/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_an_interruption_in_a_callers_process_is_one_line_too(tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupted(self: Trainer, compute: torch.nn.Module) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert _train("one-step", tmp_path, "--hidden", "8") == 130
    error = capsys.readouterr().err
    assert error == "linfast train: interrupted; there is no checkpoint yet, so nothing is kept\n"
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_one_run_writes_to_a_folder(tmp_path: Path) -> None:
    with (
        closing(Output(tmp_path, [CHECKPOINT], False, False)) as first,
        closing(Output(tmp_path, [CHECKPOINT], False, True)) as second,
    ):
        first.begin()
        (tmp_path / CHECKPOINT).write_text("first")
        with pytest.raises(BlockingIOError, match=f"{tmp_path} is being written by another run"):
            second.begin()
        assert (tmp_path / CHECKPOINT).read_text() == "first"
    with closing(Output(tmp_path, [CHECKPOINT], True, False)) as third:
        (tmp_path / f"{CHECKPOINT}abc.partial").write_text("half")
        third.begin()
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_what_is_written_meanwhile_is_refused_too(tmp_path: Path) -> None:
    with closing(Output(tmp_path, ["model.safetensors", CHECKPOINT], False, False)) as output:
        (tmp_path / CHECKPOINT).write_text("another run, begun and ended")
        with pytest.raises(FileExistsError, match=CHECKPOINT):
            output.begin()


@pytest.mark.parametrize(("resume", "overwrite"), [(False, True), (True, False)])
def test_what_is_no_file_is_refused_before_anything_is_removed(
    tmp_path: Path, resume: bool, overwrite: bool
) -> None:
    (tmp_path / CHECKPOINT).write_text("kept")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileExistsError, match=r"model.safetensors exists and is no file"):
        Output(tmp_path, [CHECKPOINT, "model.safetensors"], resume, overwrite).begin()
    assert (tmp_path / CHECKPOINT).read_text() == "kept"


def test_a_model_without_its_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    names = [f"{folder}/{name}" for folder in "ab" for name in ("model.safetensors", CHECKPOINT)]
    for name in (names[1], names[2]):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    with pytest.raises(FileExistsError, match=r"b/model.safetensors exists: of another run"):
        Output(tmp_path, names, True, False)


def test_a_mistake_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for application, arguments, says in (
        ("one-step", ("--data", "none.npz"), "none.npz: no such file"),
        ("one-step", ("--resolution", "5"), "cannot average 8 pixels down to 5"),
        ("one-step", ("--device", "cuda:99"), "cuda:99"),
        ("one-step", ("--out", f"{out}/\udcff"), "out must be a name that a file can have, in UTF-8"),
        ("one-step", ("--learning-rate", "-1"), "learning_rate must be a finite number above 0"),
        ("one-step", ("--resume",), "no checkpoint to resume from"),
        ("ign", ("--start-rank", "65"), "rank must be between"),
        ("ign", ("--denoising", "0.5", "0.5"), "denoising must be different weights"),
        ("style", ("--data", str(tmp_path / "empty")), "no folder with PNG"),
        ("style", ("--data", str(out)), "out must not be the folder of the pictures"),
    ):
        assert _train(application, out, *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert says in error
        assert error.startswith("linfast train: ")
    assert not out.exists()
    with pytest.raises(SystemExit):
        main(["train", "nothing"])


def test_a_loss_that_blows_up_is_one_line(tmp_path: Path, capsys) -> None:
    assert _train("one-step", tmp_path, "--likelihood", "1e39") == 2
    assert "step 0: likelihood is" in capsys.readouterr().err


def test_the_commands_of_the_pages_parse_and_their_pictures_exist() -> None:
    for name in ("one_step_training", "ign", "style"):
        text = (_DOCS / f"{name}.md").read_text()
        commands = re.findall(r"^linfast (train .*)$", text.replace("\\\n", ""), re.MULTILINE)
        assert commands
        for command in commands:
            assert _parser().parse_args(command.split()).command == "train"
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", text, re.DOTALL)
        assert pictures
        assert all((_DOCS / picture).stat().st_size < 300_000 for picture in pictures)
