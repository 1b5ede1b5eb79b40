"""Every option of every command with every kind of wrong value: one line, status 2, and no work is started."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import linfast as lf
from linfast.cli import _parser, main

_HUGE = str(10**30)
_WRONG = {
    int: ("-1", "1.5", "nan", "x", "", _HUGE, "9" * 5000),
    float: ("-1", "nan", "inf", "-inf", "1e400", "x", ""),
}
_MAY_BE_ZERO = ("--seed",)
_TOO_LARGE = {"--ema": "1", "--settle": "1.5", "--learning-rate": "0"}
_FEW = {
    ("train", "style"): ["--data", "PICTURES", "--width", "4", "--batch", "2"],
    ("sample",): ["--checkpoint", "MODEL", "--count", "3", "--out", "X"],
}


def _commands(
    parser: argparse.ArgumentParser, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The words of each command and its parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below and names not in (("bench",), ("info",)):
        yield names, parser
    for action in below:
        for name, child in action.choices.items():
            yield from _commands(child, (*names, name))


def _values(action: argparse.Action) -> tuple[str, ...]:
    """Wrong values for an option."""
    name = action.option_strings[0]
    if action.choices is not None:
        return ("nope", "")
    if name == "--device":
        return ("nope", "", "cuda:99", "cpu:-1", "meta", "0", "hpu", "privateuseone:3")
    if name in ("--data", "--checkpoint"):
        return ("/nowhere/at/all", "FOLDER", "DAMAGED")
    if action.type in _WRONG:
        zero = ("0",) if action.type is int and name not in _MAY_BE_ZERO else ()
        return (*_WRONG[action.type], *zero, *filter(None, [_TOO_LARGE.get(name)]))
    return ()


_CASES = [
    pytest.param((*names, option, value), _FEW.get(names, []), id=" ".join((*names, option, value))[:60])
    for names, parser in _commands(_parser())
    for action in parser._actions
    for option in action.option_strings[:1]
    if option != "-h"
    for value in _values(action)
    if (*names, option, value) != ("sample", "--seed", _HUGE)  # a seed for numpy may be arbitrarily large
]


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> dict[str, str]:
    """Files that the commands read."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("there")
    (folder / "pictures").mkdir()
    for name in ("original", "warm", "cold"):
        Image.new("RGB", (8, 8)).save(folder / "pictures" / f"{name}.png")
    (folder / "damaged").write_bytes(b"\x80\x02}q\x00no")
    lf.save(lf.Linearizer(lf.coupling_flow(4, 1, (4,)), lf.TimeLowRank(4, 1, hidden=4)), folder / "f.safetensors")
    names = {"PICTURES": "pictures", "DAMAGED": "damaged", "MODEL": "f.safetensors", "FOLDER": "", "X": "x.npy"}
    return {word: str(folder / name) for word, name in names.items()}


def test_there_are_cases_for_every_kind() -> None:
    said = {" ".join(case.values[0][:2]) for case in _CASES}
    assert said >= {"demo --data", "sample --count", "train one-step", "train ign", "train style"}
    assert len(_CASES) > 200


@pytest.mark.parametrize(("wrong", "right"), _CASES)
def test_a_wrong_value_is_one_line(
    wrong: tuple[str, ...], right: list[str], there: dict[str, str], tmp_path: Path, capsys, monkeypatch
) -> None:
    def begun(*arguments: object, **keywords: object) -> None:
        pytest.fail("work was begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("linfast.examples.runs.Output.begin", begun)
    monkeypatch.setattr("linfast.sampling.stream._blocks", begun)
    command = [there.get(word, word) for word in (*wrong[:-2], *right, *wrong[-2:])]
    try:
        status = main(command)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert status == 2, printed
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("linfast ")
    assert ": error: " in printed.err
    option = wrong[-2].lstrip("-")
    if option not in ("data", "checkpoint"):
        assert option in printed.err.replace("_", "-")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nothing"], ["train"], ["train", "nothing"], ["sample"], ["sample", "--count", "3"], ["info", "more"],
        ["demo", "--nothing"], ["train", "style"], ["train", "ign", "--denoising"], ["train", "one-step", "--out"],
        ["--nothing\nmore"], ["train", "one-step", "\udcff"], ["bench", "--nothing"], ["bench", "--batch", "x"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ": error: " in error


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "x"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-2"}, {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "x"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "99999"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": ""},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": "\udcff"},
        {"WORLD_SIZE": "9" * 30}, {"WORLD_SIZE": "9" * 5000},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "command", ["train one-step --hidden 4 --depth 1", "sample --checkpoint MODEL --count 3 --out X"]
)
def test_a_wrong_environment_is_one_line(
    variables: dict[str, str], command: str, there: dict[str, str], tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([there.get(word, word) for word in command.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert any(name in error for name in ("WORLD_SIZE", "RANK", "MASTER"))
    assert not list(tmp_path.iterdir())


def test_an_unforeseen_error_is_one_line_with_its_class(capsys, monkeypatch, tmp_path: Path) -> None:
    for error, line in (
        (RuntimeError("one\n  two"), "RuntimeError: one two"),
        (KeyError("key"), "KeyError: 'key'"),
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("no room"), "OutOfMemoryError: no room"),
    ):
        monkeypatch.setattr("linfast.examples.one_step.load_images", Mock(side_effect=error))
        assert main(["train", "one-step", "--out", str(tmp_path)]) == 1
        assert capsys.readouterr().err == f"linfast train: error: {line}\n"


def test_no_room_is_one_line(capsys, monkeypatch, tmp_path: Path) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "out/checkpoint.pt")

    monkeypatch.setattr("linfast.examples.trainer.write_checkpoint", full)
    small = ["--hidden", "4", "--depth", "1", "--steps", "2"]
    assert main(["train", "one-step", "--out", str(tmp_path / "out"), *small]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "linfast train: error: out/checkpoint.pt: No space left on device"
    )
