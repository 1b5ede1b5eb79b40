"""Damaged checkpoints: each is refused with a clear error, and the trainer does not change."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linfast.examples import Trainer, TrainSettings
from linfast.examples.runs import save_strips
from linfast.examples.trainer import write_checkpoint
from torch import nn

import linfast as lf

from .toys import Breaking

_SETTINGS = TrainSettings(steps=4, batch=8, checkpoint_every=2, ema=0.5)
_NAN = float("nan")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    Trainer(Breaking(), _SETTINGS, path).run(progress=False)
    return path.read_bytes()


def _everything(trainer: Trainer) -> list[Any]:
    """Everything that resuming changes, as comparable values."""
    tensors = [*trainer.objective.state_dict().values(), *trainer.model.state_dict().values()]
    moments = [value for entry in trainer.optimizer.state_dict()["state"].values() for value in entry.values()]
    groups = str(trainer.optimizer.state_dict()["param_groups"])
    return [*(t.tolist() for t in (*tensors, *moments)), groups, trainer.step, trainer._terms, len(trainer._losses)]


def _refused(path: Path, match: str) -> None:
    trainer = Trainer(Breaking(), _SETTINGS, path)
    trainer.step = trainer._saved_step = 1
    trainer._one_step(trainer.objective)
    before = _everything(trainer)
    with pytest.raises(ValueError, match=match) as raised:
        trainer.resume()
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert _everything(trainer) == before


def test_every_truncation_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        _refused(path, "not a checkpoint")


def test_a_changed_byte_of_a_tensor_is_refused(whole: bytes, tmp_path: Path) -> None:
    weight = Trainer(Breaking(), _SETTINGS, tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes(whole)
    weight.resume()
    place = whole.index(weight.objective.model.weight.detach().numpy().tobytes())
    (tmp_path / "c.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    _refused(tmp_path / "c.pt", "not a checkpoint, or a damaged one")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    for content in (b"", b"hello\n", b"\x00" * 999, b"PK\x05\x06" + b"\x00" * 18):
        path.write_bytes(content)
        _refused(path, "not a checkpoint")
    for state in ({}, [1], {"format": "linfast-training-1"}, torch.ones(2)):
        torch.save(state, path)
        _refused(path, "not a checkpoint")


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def _drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


_LOSSES = torch.ones(4, 3, dtype=torch.float64)
_DAMAGES = [
    *map(_drop, ("format", "settings", "step", "model", "optimizer", "averaged", "terms", "losses", "digest")),
    *(_set(key, value=3) for key in ("format", "settings", "model", "optimizer", "averaged", "terms")),
    *(_set("step", value=value) for value in (-1, 0, 5, 2.0, True, "4", None)),
    _set("step", value=3),
    _set("settings", "unknown", value=1),
    _drop("settings", "clip"),
    _set("settings", "clip", value=torch.ones(2, 2)),
    _set("settings", "clip", value=_NAN),
    _set("model", "weight", value=torch.ones(2, 2)),
    _set("model", "weight", value=torch.ones(1, 3).double()),
    _set("model", "weight", value=torch.full((1, 3), _NAN)),
    _set("model", "weight", value="1"),
    _set("model", "other", value=torch.ones(1)),
    _drop("model", "bias"),
    _set("averaged", value=None),
    _drop("averaged", "module.bias"),
    _set("averaged", "module.bias", value=torch.ones(9)),
    _set("terms", value=["fit", "fit", "gradient norm"]),
    _set("terms", value=["fit", "other"]),
    _set("terms", value=["fit", 1, "gradient norm"]),
    _set("losses", value=_LOSSES.float()),
    _set("losses", value=_LOSSES * _NAN),
    _set("losses", value=-_LOSSES),
    _set("losses", value=[1.0]),
    _drop("optimizer", "state"),
    _set("optimizer", "param_groups", value=[]),
    _set("optimizer", "param_groups", 0, "params", value=[0]),
    _set("optimizer", "param_groups", 0, "params", 1, value=torch.ones(2)),
    _set("optimizer", "state", value={}),
    _set("optimizer", "state", 7, value={}),
    _drop("optimizer", "state", 0, "exp_avg"),
    _set("optimizer", "state", 0, "exp_avg", value=torch.ones(5)),
    _set("optimizer", "state", 0, "exp_avg", value=torch.full((1, 3), _NAN)),
    _set("optimizer", "state", 0, "exp_avg_sq", value=-torch.ones(1, 3)),
    *(_set("optimizer", "state", 0, "step", value=torch.tensor(v)) for v in (-1.0, 9.0, _NAN)),
    _set("optimizer", "state", 0, "step", value=None),
    _drop("optimizer", "state", 0),
    _set("optimizer", "state", 0, "step", value=torch.tensor(1.5)),
    _set("optimizer", "state", 0, "step", value=torch.tensor(4)),
    _set("optimizer", "state", 0, "step", value=torch.tensor(3.0)),
    _set("optimizer", "state", 0, "exp_avg", value=torch.ones(1, 1).expand(1, 3)),
    lambda state: state["optimizer"]["state"][0].update(exp_avg=state["optimizer"]["state"][0]["exp_avg_sq"]),
    _set("optimizer", "param_groups", 0, "lr", value=_NAN),
    _set("terms", value=["other", "fit", "gradient norm"]),
    _set("terms", value=["fit", "another", "gradient norm"]),
    lambda state: state.update(terms=["more", *state["terms"]], losses=torch.ones(4, 4).double()),
    _set("losses", value=_LOSSES),
    _set("model", "weight", value=torch.ones(1, 3)),
    _set("averaged", "module.bias", value=torch.ones(1)),
    _set("digest", value="0" * 64),
    _set("digest", value=None),
    _set("model", "weight", value=torch.ones(1, 3, device="meta")),
    _set("losses", value=_LOSSES.to("meta")),
    _set("optimizer", "state", 0, "exp_avg", value=torch.ones(1, 3, device="meta")),
    _set("optimizer", "state", 0, "step", value=torch.ones((), device="meta")),
    _set("averaged", "n_averaged", value=torch.ones((), dtype=torch.int64, device="meta")),
]


@pytest.mark.parametrize("number", range(len(_DAMAGES)))
def test_damaged_contents_are_refused_before_anything_changes(number: int, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(whole)
    state = torch.load(path, weights_only=True)
    _DAMAGES[number](state)
    torch.save(state, path)
    _refused(path, "not a checkpoint, or a damaged one")


@pytest.mark.parametrize("part", ["model", "averaged"])
@pytest.mark.parametrize("name", ["permutation", "initialized"])
def test_attributes_of_layers_are_not_changed(part: str, name: str, tmp_path: Path) -> None:
    """An invalid permutation, and an ActNorm that would initialise again."""

    def trainer() -> Trainer:
        objective = Breaking()
        torch.manual_seed(1)
        objective.model = nn.Sequential(lf.ActNorm(3), lf.Mix(3), nn.Linear(3, 1))
        objective.model.bias = objective.model[2].bias
        return Trainer(objective, _SETTINGS, tmp_path / "c.pt")

    trainer().run(progress=False)
    trainer().resume()
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    for key, value in state[part].items():
        if key.endswith(name):
            value.zero_()
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="damaged"):
        trainer().resume()


def test_a_checkpoint_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    Trainer(Breaking(), _SETTINGS, tmp_path / "c.pt").run(progress=False)
    (tmp_path / "new").touch()
    assert (tmp_path / "c.pt").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize(
    "about",
    [
        {"x": Path("x")}, {"x": object()}, {"x": np.ones(2)}, {"x": torch.float32}, {"x": (1, 2)}, {"x": {1}},
        {"x": [1]}, {"x": torch.ones(2)}, {"x": _NAN}, {"x": -float("inf")}, {"x": np.float32("nan")}, {"x": 1j},
        {"x": np.longdouble(1)}, {"x": b"x"}, {1: 1}, {np.str_("x"): 1}, {"steps": 9}, {"ema": 0.5},
        {"x": 10**1000},
    ],
)  # fmt: skip
def test_an_about_that_could_not_be_resumed_is_refused(about: dict[Any, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^about"):
        Trainer(Breaking(), _SETTINGS, about=about)


def test_the_description_of_a_run_is_restored(tmp_path: Path) -> None:
    about = {
        "a": np.float64(0.5),
        "b": np.int64(3),
        "c": np.str_("x"),
        "d": None,
        "e": True,
        "f": "\udcff",
        "g": 2**63,
    }
    Trainer(Breaking(), _SETTINGS, tmp_path / "c.pt", about).run(progress=False)
    Trainer(Breaking(), _SETTINGS, tmp_path / "c.pt", about).resume()


class _Other:
    """A class that a checkpoint does not name."""


class _Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return _Other()

    def set_extra_state(self, state: Any) -> None: ...


def _with_buffer(value: torch.Tensor) -> nn.Module:
    module = nn.Linear(3, 1)
    module.register_buffer("mask", value)
    return module


_MODELS = {
    "sparse": lambda: _with_buffer(torch.eye(3).to_sparse()),
    "csr": lambda: _with_buffer(torch.eye(3).to_sparse_csr()),
    "lazy": lambda: nn.LazyLinear(1),
    "meta": lambda: nn.Linear(3, 1, device="meta"),
    "an object": lambda: _Extra(3, 1),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|Lazy modules)")
@pytest.mark.parametrize("name", _MODELS)
def test_a_model_that_could_not_be_resumed_is_refused(name: str, tmp_path: Path) -> None:
    objective = Breaking()
    objective.model = _MODELS[name]()
    with pytest.raises(ValueError, match=r"^objective has a model that no checkpoint can hold: "):
        Trainer(objective, _SETTINGS, tmp_path / "c.pt")


@pytest.mark.parametrize(
    "value",
    [
        torch.full((2,), -float("inf")),
        torch.ones(2).bool(),
        torch.empty(0),
        torch.tensor(5),
        torch.ones(3).to(torch.float8_e4m3fn),
    ],
)
def test_other_models_are_resumed(value: torch.Tensor, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        objective = Breaking()
        objective.model = _with_buffer(value)
        objective.model.rotated = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        return Trainer(objective, _SETTINGS, tmp_path / "c.pt")

    first, second = trainer(), trainer()
    first.objective.model.register_forward_hook(lambda m, x, y: y * m.rotated.abs().mean())
    first.run(progress=False)
    second.resume()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


@pytest.mark.parametrize("checkpoint", ["a\0b", "."])
def test_a_checkpoint_that_is_no_file_is_refused(checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint must be a"):
        Trainer(Breaking(), _SETTINGS, checkpoint)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_checkpoint({"model": torch.zeros(10**5)}, path),
        lambda path: lf.save(lf.Dense(300), path),
        lambda path: save_strips([("", torch.rand(9, 1, 99, 99))], path),
    ],
)
def test_a_full_disk_names_the_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    try:
        with pytest.raises(OSError, match=rf"{path}.*") as raised:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in str(raised.value)
    assert path.read_text() == "earlier"
