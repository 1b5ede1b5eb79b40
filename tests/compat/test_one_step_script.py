"""A script in the research repository's style gives the same results after its import line is changed."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from linfast.compat import linearizer as compat

HERE = Path(__file__).parent
SCRIPT = (HERE / "one_step_script.py").read_text()
STAND_IN = (HERE / "stand_in.py").read_text()
BEFORE = "from linearizer import G, Linearizer, LinearModule\n"
AFTER = "from linfast.compat.linearizer import G, Linearizer, LinearModule\n"
STEPS = 6


@pytest.fixture
def load(monkeypatch):
    """load(name, source): the module with this source, importable by this name."""

    def _load(name: str, source: str) -> types.ModuleType:
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, name, "exec"), module.__dict__)
        return module

    return _load


@pytest.fixture
def theirs(load):
    """The script with the original classes."""
    load("linearizer", STAND_IN)
    return load("script_theirs", SCRIPT)


@pytest.fixture
def ours(load):
    """The script with its one import changed."""
    assert SCRIPT.count(BEFORE) == 1
    script = load("script_ours", SCRIPT.replace(BEFORE, AFTER))
    assert issubclass(script.TwoModes, compat.Linearizer)
    return script


def _trained(script, steps: int, seed: int = 0):
    torch.manual_seed(seed)
    f = script.build()
    return f, script.train(f, steps)


def _outputs(script, f) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, script.CHANNELS, script.SIZE, script.SIZE, generator=generator)
    matcher = script.Matcher(f.eval())
    with torch.no_grad():
        forward = f(noise, t=torch.linspace(0.1, 0.9, 4))
    return {
        "forward": forward,
        "rk": matcher.sample(noise, STEPS, "rk"),
        "euler": matcher.sample(noise, STEPS, "euler"),
        "one step": matcher.one_step(noise, STEPS),
    }


def _assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def _mark_initialized(f) -> None:
    """Set the flag, which is a plain bool and so is not loaded with a state_dict."""
    for module in f.modules():
        if hasattr(module, "initialized"):
            module.initialized = True


def test_trains_and_samples_as_the_unchanged_classes(theirs, ours):
    f_theirs, losses_theirs = _trained(theirs, 20)
    f_ours, losses_ours = _trained(ours, 20)
    _assert_equal({"losses": losses_ours}, {"losses": losses_theirs})
    _assert_equal(dict(f_ours.named_parameters()), dict(f_theirs.named_parameters()))
    outputs = _outputs(ours, f_ours)
    _assert_equal(outputs, _outputs(theirs, f_theirs))
    # The script itself works: its loss falls, and its one step equals its many Euler steps.
    assert losses_ours[-3:].mean() < 0.8 * losses_ours[:3].mean()
    torch.testing.assert_close(outputs["one step"], outputs["euler"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_state_dict_loads_both_ways(theirs, ours, tmp_path, direction):
    source, target = (theirs, ours) if direction == "theirs to ours" else (ours, theirs)
    f, _ = _trained(source, 3)
    torch.save(f.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    g = target.build()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {key.split(".")[0] for key in state} == {"net_gx", "net_gy", "linear_network"}
    assert g.load_state_dict(state).missing_keys == []
    _mark_initialized(g)
    _assert_equal(_outputs(target, g), _outputs(source, f))


def test_whole_module_pickles(ours, tmp_path):
    f, _ = _trained(ours, 2)
    torch.save(f, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert loaded.net_gx is loaded.net_gy
    _assert_equal(_outputs(ours, loaded), _outputs(ours, f))


def test_whole_module_pickle_of_the_unchanged_classes_loads_under_the_old_name(load, tmp_path, monkeypatch):
    old = load("linearizer", STAND_IN)
    script = load("script", SCRIPT)
    f, _ = _trained(script, 2)
    plain = old.Linearizer(f.net_gx, f.linear_network)
    expected = _outputs(script, f)
    torch.save([f, plain], tmp_path / "whole.pt")

    monkeypatch.setitem(sys.modules, "linearizer", compat)
    script = load("script", SCRIPT)
    loaded, loaded_plain = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert isinstance(loaded, compat.Linearizer)
    assert type(loaded_plain) is compat.Linearizer
    _assert_equal(_outputs(script, loaded), expected)
