"""save_pretrained, from_pretrained and push_to_hub: the same model again, and no file of anyone else is lost."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import linfast as lf
from tests.hub_stand_in import OWNER, StandIn, serving
from tests.laws.zoo import perturb

MODELS: dict[str, Callable[[], nn.Module]] = {
    "Linearizer": lambda: lf.Linearizer(lf.coupling_flow(4, 2, (8,)), lf.Dense(4)),
    "Flow": lambda: lf.coupling_flow(4, 2, (8,), transform="spline"),
    "AffineCoupling": lambda: lf.AffineCoupling(lf.MLP(2, 4, (8,)), 4),
    "Density": lambda: lf.Density(lf.autoregressive_flow(4, 2, (8,))).standardize(3 + 5 * torch.randn(64, 4)),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _model(name: str = "Linearizer") -> nn.Module:
    return perturb(MODELS[name]()).eval()


def _assert_same(model: nn.Module, loaded: nn.Module) -> None:
    x = torch.randn(5, 4)
    assert type(loaded) is type(model)
    assert loaded.training == model.training
    assert torch.equal(loaded(x), model(x))


def _cached(cache: Path, model: nn.Module) -> None:
    """A cache such as huggingface_hub's own, with one commit of "someone/m"."""
    repository = cache / f"models--{OWNER}--m"
    model.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with serving(monkeypatch) as stand_in:
        yield stand_in


# Directories


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_gives_the_model_back(name: str, tmp_path: Path) -> None:
    model = _model(name)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        "README.md", "config.json", "model.safetensors"
    }  # fmt: skip
    for source in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder")):
        _assert_same(model, type(model).from_pretrained(source))
    _assert_same(model, lf.load(tmp_path / "new" / "folder" / "model.safetensors"))


def test_a_bijection_reads_any_bijection(tmp_path: Path) -> None:
    model = _model("AffineCoupling")
    model.save_pretrained(tmp_path)
    _assert_same(model, lf.Bijection.from_pretrained(tmp_path))


def test_a_model_of_another_class_is_refused(tmp_path: Path) -> None:
    _model("Flow").save_pretrained(tmp_path)
    for cls in (lf.Linearizer, lf.Density, lf.AffineCoupling):
        with pytest.raises(ValueError, match=f"holds a Flow, which is not a {cls.__name__}: use lf.Bijection"):
            cls.from_pretrained(tmp_path)


def test_the_loaded_model_is_on_the_device_that_was_asked_for(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    assert next(lf.Linearizer.from_pretrained(tmp_path, device="cpu").parameters()).device.type == "cpu"
    with pytest.raises(ValueError, match="device 'meta' cannot be used"):
        lf.Linearizer.from_pretrained(tmp_path, device="meta")


def test_a_second_model_replaces_the_first_and_keeps_the_card(tmp_path: Path) -> None:
    _model("Flow").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    model = _model("Linearizer")
    model.save_pretrained(tmp_path)
    _assert_same(model, lf.Linearizer.from_pretrained(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["linfast_class"] == "Linearizer"
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_a_card_that_no_person_edited_follows_the_model(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    _model("Flow").save_pretrained(tmp_path)
    assert "# Flow" in card.read_text()
    _model("Density").save_pretrained(tmp_path)
    assert "# Density" in card.read_text()
    assert "lf.Density.from_pretrained" in card.read_text()
    edited = card.read_text().replace("# Density", "# Two moons")
    card.write_text(edited)
    _model("Flow").save_pretrained(tmp_path)
    assert card.read_text() == edited


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_of_other_programs_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match=f"{name} is not of linfast and would be replaced"):
        _model().save_pretrained(tmp_path)
    assert (tmp_path / name).read_text() == '{"model_type": "bert"}'
    assert len(list(tmp_path.iterdir())) == 1


def test_a_model_that_cannot_be_saved_leaves_the_earlier_one(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    damaged = copy.deepcopy(model)
    damaged.A.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        damaged.save_pretrained(tmp_path)
    _assert_same(model, lf.Linearizer.from_pretrained(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        lf.Flow.from_pretrained(tmp_path)
    (tmp_path / "f.safetensors").write_bytes(b"x")
    for source in (str(tmp_path / "f.safetensors"), tmp_path / "f.safetensors", tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"directory_or_repo_id: .* is not a directory"):
            lf.Flow.from_pretrained(source)
    for missing in (str(tmp_path / "missing"), "./missing", "../missing/m", "~/missing", "my/saved/models"):
        with pytest.raises(FileNotFoundError, match=r"directory_or_repo_id: .* is not a directory"):
            lf.Flow.from_pretrained(missing)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02}q\x00no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        lf.Flow.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="map_location"):
        lf.Flow.from_pretrained(tmp_path, map_location="cpu")


def test_the_card_says_how_to_load_the_model(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    _model("Flow").save_pretrained(tmp_path / "two-moons")
    card = ModelCard.load(tmp_path / "two-moons" / "README.md")
    assert card.data.library_name == "linfast"
    assert 'lf.Bijection.from_pretrained("two-moons")' in card.text
    assert str(tmp_path) not in card.content


# The cache


def test_the_cache_is_read_without_the_network(tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    model = _model()
    _cached(tmp_path, model)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    for revision in (None, "main", COMMIT):
        _assert_same(model, lf.Linearizer.from_pretrained(f"{OWNER}/m", revision=revision, **where))
    _assert_same(model, lf.Linearizer.from_pretrained(snapshot_download(f"{OWNER}/m", **where)))
    for name, revision in ((f"{OWNER}/m", "v2"), (f"{OWNER}/other", None)):
        with pytest.raises(LocalEntryNotFoundError):
            lf.Linearizer.from_pretrained(name, revision=revision, **where)


# The Hub


@pytest.mark.parametrize("name", ["Linearizer", "Density"])
def test_a_pushed_model_comes_back(name: str, hub: StandIn, tmp_path: Path) -> None:
    model, cls = _model(name), type(_model(name))
    address = model.push_to_hub(f"{OWNER}/m", private=True, token="hf_mine")
    assert address.startswith(f"https://huggingface.co/{OWNER}/m/commit/")
    assert "private" in (hub.created[0].get("visibility"), *(["private"] if hub.created[0].get("private") else []))
    assert hub.repositories[f"{OWNER}/m"].keys() == {"README.md", "config.json", "model.safetensors"}
    assert f'from_pretrained("{OWNER}/m")' in hub.repositories[f"{OWNER}/m"]["README.md"].decode()
    _assert_same(model, cls.from_pretrained(f"{OWNER}/m", cache_dir=tmp_path, revision="v1", token="hf_mine"))
    assert ("GET", f"/{OWNER}/m/resolve/v1/model.safetensors") in hub.requests
    assert hub.tokens == {"Bearer hf_mine"}
    hub.repositories.clear()
    _assert_same(model, cls.from_pretrained(f"{OWNER}/m", cache_dir=tmp_path, revision="v1", local_files_only=True))


def test_a_second_push_keeps_the_card_of_the_repository(hub: StandIn) -> None:
    _model("Flow").push_to_hub("m", token="hf_mine")
    files = hub.repositories[f"{OWNER}/m"]
    assert f'from_pretrained("{OWNER}/m")' in files["README.md"].decode()
    files["README.md"], before = b"my own words", files["model.safetensors"]
    _model("Linearizer").push_to_hub("m", token="hf_mine", branch="main", commit_message="more")
    assert files["README.md"] == b"my own words"
    assert files["model.safetensors"] != before


def test_a_model_that_cannot_be_saved_makes_no_repository(hub: StandIn) -> None:
    model = _model()
    model.A.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.push_to_hub(f"{OWNER}/m", token="hf_mine")
    assert not hub.repositories


def test_another_librarys_repository_is_refused(hub: StandIn, tmp_path: Path) -> None:
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
    from safetensors.torch import save

    files = {"model.safetensors": save({"a": torch.zeros(2)}), "config.json": b'{"model": 1, "device": "cuda"}'}
    hub.repositories = {f"{OWNER}/bert": files, f"{OWNER}/empty": {}}
    with pytest.raises(ValueError, match="not a linfast file"):
        lf.Flow.from_pretrained(f"{OWNER}/bert", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        lf.Flow.from_pretrained(f"{OWNER}/empty", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        lf.Flow.from_pretrained(f"{OWNER}/missing", cache_dir=tmp_path)


# Without huggingface_hub, and beside the rest of torch

_WITHOUT = """
import sys
sys.modules["huggingface_hub"] = None  # as if it were not installed
import linfast as lf
f = lf.Linearizer(lf.coupling_flow(4, 1, (4,)), lf.Dense(4))
place = sys.argv[1]
for call in (lambda: f.save_pretrained(place), lambda: lf.Flow.from_pretrained(place), lambda: f.push_to_hub("f")):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_without_huggingface_hub_the_error_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT, tmp_path], capture_output=True, text=True)
    assert done.stdout.count("needs huggingface_hub: pip install 'linfast[hub]'") == 3, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_the_methods_leave_pickle_and_deepcopy_as_they_were(name: str) -> None:
    model = _model(name)
    _assert_same(model, pickle.loads(pickle.dumps(model)))
    _assert_same(model, copy.deepcopy(model))
    assert not [key for key in vars(model) if "hub" in key]
