"""What is swapped, what is not and why; hooks, reports and adapters that users write. Needs no library."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import types

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate import adapter as adapters
from linfast.accelerate import coupling, engine, find_mlp

from . import stand_in


class Coupling(nn.Module):
    """y = (x1 e^tanh(s) + t, x2), with t and s interleaved."""

    def __init__(self, features=6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features // 2, 8), nn.ReLU(), nn.Linear(8, features))

    def params(self, kept):
        p = self.net(kept)
        return p[:, 0::2], p[:, 1::2].tanh()

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        shift, log_s = self.params(x2)
        return torch.cat((x1 * log_s.exp() + shift, x2), 1), log_s.sum(1)

    def inverse(self, y):
        y1, x2 = y.chunk(2, 1)
        shift, log_s = self.params(x2)
        return torch.cat(((y1 - shift) * (-log_s).exp(), x2), 1), -log_s.sum(1)


class Derived(Coupling):
    def forward(self, x):
        y, log_det = super().forward(x)
        return y + 1, log_det


RIGHT = {
    "conditioner": "net",
    "scale_map": lf.ScaleMap("tanh", 1.0),
    "order": "scale_first",
    "layout": "interleaved",
    "log_det": True,
}


@pytest.fixture
def registered(monkeypatch):
    """register(cls, **changes): an adapter for the test's duration."""
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))

    def register(cls=Coupling, **changes):
        lf.register_adapter(cls, **{"features": None, **RIGHT, **changes})

    return register


class Even(Coupling):
    pass


def _values(model, x):
    return [*model(x), *model.inverse(x)]


def test_a_registered_class_runs_on_the_op(registered, monkeypatch):
    registered()
    model, x = Coupling(), torch.randn(4, 6)
    expected = _values(model, x)
    report = lf.accelerate(model)
    assert [(row.runs, row.conditioner) for row in report.rows] == [
        (
            "affine coupling, tanh (on a GPU: one launch; on this CPU: the original's own code)",
            "MLP 3-8-6 relu",
        )
    ]
    assert report.rows[0].error < 1e-6
    for a, b in zip(_values(model, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    seen = []
    monkeypatch.setattr(coupling, "affine_coupling", lambda x, *a, **k: seen.append(k) or (x, x[:, 0]))
    model(x), model.inverse(x)
    assert [call["inverse"] for call in seen] == [False, True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale_map": lf.ScaleMap("tanh", 1.0001)},
        {"order": "shift_first"},
        {"layout": "halves"},
        {"moves": "second"},
        {"log_det": False},
    ],
    ids=str,
)
def test_what_disagrees_with_the_original_stays_as_it_was(registered, wrong):
    registered(**wrong)
    model = Coupling()
    report = lf.accelerate(model)
    assert type(model) is Coupling
    assert report.swapped == ()
    assert "the original" in report.left[0].note or "linfast's code raised" in report.left[0].note


def test_wrong_gradients_are_seen(registered):
    class Detached(Coupling):
        def params(self, kept):
            return super().params(kept.detach())

    registered(Detached)
    model = Detached()
    assert "differs from the original" in lf.accelerate(model).left[0].note


def test_bad_registrations_are_named():
    with pytest.raises(TypeError, match=r"cls must be a subclass of nn\.Module; got 3"):
        lf.register_adapter(3, **RIGHT)
    with pytest.raises(ValueError, match="order must be one of shift_first, scale_first; got 'up'"):
        lf.register_adapter(Coupling, **{**RIGHT, "order": "up"})
    with pytest.raises(
        ValueError, match="inverse must name a method of Coupling or a flag of its forward; got 'back'"
    ):
        lf.register_adapter(Coupling, inverse="back", **RIGHT)


def _patched_instance(model):
    model.forward = lambda x: (x, x.sum(1))


def _patched_class(model):
    cls = type(model)
    before = cls.forward
    cls.forward = functools.wraps(before)(lambda self, x: before(self, 2 * x))


@pytest.mark.parametrize("patch", [_patched_instance, _patched_class])
def test_a_patched_method_is_left_alone(registered, patch):
    class Mine(Coupling):
        def forward(self, x):
            return super().forward(x)

    registered(Mine)
    model = Mine()
    patch(model)
    x = torch.randn(2, 6)
    expected = model(x)
    report = lf.accelerate(model)
    assert report.left[0].note == "its forward was replaced: not the library's own"
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_derived_class_is_left_alone(registered):
    registered()
    report = lf.accelerate(nn.Sequential(Derived(), Coupling()))
    assert [(row.path, row.swapped) for row in report.rows] == [("0", False), ("1", True)]
    assert "derived from tests Coupling" in report.left[0].note
    assert "register_adapter" in report.left[0].note


def test_hooks_of_the_module_fire(registered):
    registered()
    model, x, seen = Coupling(), torch.randn(2, 6), []
    model.register_forward_hook(lambda module, args, out: seen.append("module"))
    model.net.register_forward_hook(lambda module, args, out: seen.append("conditioner"))
    report = lf.accelerate(model)
    assert report.swapped
    assert seen == []  # the check ran on copies without hooks
    assert report.rows[0].conditioner == ""
    model(x)
    assert seen == ["conditioner", "module"]


def _reference_block():
    torch.manual_seed(0)
    block = stand_in.InvUnetBlock(4).eval()
    with torch.no_grad():
        block(torch.randn(8, 4, 4, 4), torch.rand(8))
    return block


def test_a_hook_on_a_module_that_would_be_passed_by_keeps_the_original():
    block, seen = _reference_block(), []
    block.F.register_forward_hook(lambda module, args, out: seen.append(out))
    report = lf.accelerate(block)
    assert "has a hook or a parametrization, which would be bypassed" in report.left[0].note
    assert type(block) is stand_in.InvUnetBlock
    block(torch.randn(2, 4, 4, 4), torch.rand(2))
    assert len(seen) == 1


def test_no_hook_fires_in_the_check():
    block, seen = stand_in.UNetBlock(8, 8, 4), []
    block.affine.register_forward_hook(lambda module, args, out: seen.append(out))
    assert lf.accelerate(block).rows[0].swapped
    assert seen == []
    block(torch.randn(2, 8, 4, 4), torch.randn(2, 4))
    assert len(seen) == 1


def test_a_hook_that_is_added_later_fires():
    block, seen = _reference_block(), []
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    assert lf.accelerate(block).rows[0].swapped
    expected = block(x, t)
    handle = block.F.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(block(x, t), expected)
    assert len(seen) == 1
    handle.remove()
    block(x, t)
    assert len(seen) == 1


def test_a_parametrized_inner_module_keeps_the_original():
    block = _reference_block()
    unet = block.F.cond.net.enc["4x4_block0"]
    nn.utils.parametrizations.weight_norm(unet.conv0)
    notes = {row.path: row.note for row in lf.accelerate(block).left}
    assert "which would be bypassed" in notes["F.cond.net.enc.4x4_block0"]


def test_nothing_is_touched_by_the_check():
    block = _reference_block()
    norm = stand_in.ActNorm2d(4)
    state = copy.deepcopy(block.state_dict())
    lf.accelerate(nn.ModuleList([block, norm]))
    for key, value in block.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert not norm.initialized
    assert not norm.bias.any()
    assert all(p.grad is None for p in block.parameters())


def test_restore_and_accelerate_again(registered):
    registered()
    model = nn.Sequential(Coupling(), Coupling())
    first, second = lf.accelerate(model), lf.accelerate(model)
    assert [row.path for row in first.rows] == [row.path for row in second.rows] == ["0", "1"]
    assert all(type(m).__mro__[2] is Coupling for m in model)
    lf.restore(model)
    lf.restore(model)
    assert all(type(m) is Coupling for m in model)


def test_an_error_midway_swaps_nothing(registered, monkeypatch):
    registered()
    model = nn.Sequential(Coupling(), Coupling(8))
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(engine, "difference", broken)
    with pytest.raises(KeyboardInterrupt):
        lf.accelerate(model)
    assert len(calls) == 2
    assert all(type(m) is Coupling for m in model)


def test_copies_and_pickles(registered):
    registered()
    model = Coupling()
    lf.accelerate(model)
    assert type(copy.deepcopy(model)) is type(model)
    assert type(copy.copy(model)) is Coupling
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        text = pickle.dumps(model, protocol)
        assert b"linfast" not in text
        loaded = pickle.loads(text)
        assert type(loaded) is Coupling
        assert set(vars(loaded)) == set(vars(Coupling()))
    assert list(model.state_dict()) == list(Coupling().state_dict())


def test_safetensors_take_it(registered, tmp_path):
    from safetensors.torch import load_model, save_model

    registered()
    model, other, x = Coupling(), Coupling(), torch.randn(2, 6)
    lf.accelerate(model)
    lf.accelerate(other)
    save_model(model, tmp_path / "m.safetensors")
    load_model(other, tmp_path / "m.safetensors")
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_bad_options_are_named():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or an object of a known class; got int"):
        lf.accelerate(3)
    with pytest.raises(ValueError, match="precision must be one of exact, high, tf32, fast; got 'bf16'"):
        lf.accelerate(model, precision="bf16")
    with pytest.raises(ValueError, match="memory must be one of store, invert; got 'auto'"):
        lf.accelerate(model, memory="auto")
    with pytest.raises(ValueError, match="keep_defects must be a collection of actnorm_reinit, rk_collapse; got"):
        lf.accelerate(model, keep_defects=["rk"])
    for removed in ("compile", "cuda_graph"):
        with pytest.raises(
            TypeError, match=rf"takes no {removed}: .* with torch.compile\(model\), .* torch.cuda.graph"
        ):
            lf.accelerate(model, **{removed: True})


def test_an_object_around_a_model_is_refused_with_the_name_of_the_model() -> None:
    """As sbi's DirectPosterior, whose flow is its posterior_estimator."""
    posterior = types.SimpleNamespace(posterior_estimator=nn.Linear(2, 2), prior=None)
    with pytest.raises(TypeError, match="got SimpleNamespace: pass its posterior_estimator"):
        lf.accelerate(posterior)


def test_a_class_that_lists_its_subclasses_does_not_see_ours(registered):
    class Listed(Coupling):
        known = []

        def __init_subclass__(cls, *, name):
            cls.known.append(name)

    class Own(Listed, name="own"):
        pass

    registered(Own)
    assert lf.accelerate(Own()).swapped
    assert Listed.known == ["own"]


def test_the_report_prints_as_a_table(registered):
    registered()
    text = str(lf.accelerate(nn.Sequential(Coupling(), Coupling(), Derived())))
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "module"
    assert lines[2].startswith("0 and 1 more  tests Coupling  affine coupling, tanh (")
    assert lines[2].endswith(", MLP 3-8-6 relu")
    assert lines[3].startswith("2 ")
    assert lines[-1] == "2 of 3 recognised modules swapped"
    assert "no module of a known library" in str(lf.accelerate(nn.Linear(2, 2)))
    flow = lf.coupling_flow(2, 1, (4,))
    for own in (flow, lf.Density(flow), nn.Sequential(flow), lf.Linearizer(flow, lf.Dense(2))):
        assert str(lf.accelerate(own)).startswith("accelerate: nothing to do: linfast's own modules")


def test_mlps_are_recognised():
    act = {"relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}
    for name, activation in act.items():
        mlp = find_mlp(nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 4, bias=False)))
        assert (mlp.sizes, mlp.activation, str(mlp)) == ((3, 8, 4), name, f"MLP 3-8-4 {name}")
        assert mlp.layers[1][1] is None
    layer = nn.Linear(3, 3)
    assert find_mlp(nn.Sequential(layer)).layers == ((layer.weight, layer.bias),)
    nested = nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2)), nn.Linear(8, 4))
    assert (find_mlp(nested).activation, find_mlp(nested).constants) == ("leaky_relu", (0.2,))


def _hooked():
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].register_forward_hook(lambda *a: None)
    return module


class _Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 3),
        nn.Sequential(),
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3)),
        nn.Sequential(_Own(3, 3)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
        _hooked(),
        "no module",
    ],
    ids=lambda m: str(m).replace("\n", "")[:40],
)
def test_what_is_no_mlp_is_not_taken_for_one(module):
    assert find_mlp(module) is None


def test_a_namesake_of_a_copied_class_is_not_taken_for_it():
    assert lf.accelerate(nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(2, 2))).rows == ()


def test_the_report_says_what_a_precision_reaches(registered):
    registered()
    other = Coupling()
    other.net.append(nn.Dropout(0.1))  # not a plain MLP: torch computes its products
    report = lf.accelerate(nn.Sequential(Coupling(), other), precision="fast")
    assert report.precision == "fast"
    assert str(report).splitlines()[-1].startswith("precision 'fast' reaches 1 of them; the products of the others")
    assert "precision" not in str(lf.accelerate(Coupling()))


def test_a_plan_knows_the_options_and_rows_that_take_a_precision_are_counted(registered, monkeypatch):
    registered()
    key = Coupling.__module__, Coupling.__qualname__
    adapter = adapters.ADAPTERS[key]
    seen = []

    def plan(module, options):
        seen.append(options)
        return dataclasses.replace(adapter.plan(module, options), takes_precision=True)

    adapters.ADAPTERS[key] = dataclasses.replace(adapter, plan=plan)
    model = Coupling()
    report = lf.accelerate(model, precision="high", memory="invert")
    assert "precision 'high' reaches 1 of them" in str(report)
    assert {(o.precision, o.memory) for o in seen} == {("high", "invert")}
    assert model._linfast_plan.options.precision == "high"
