"""Classes of many shapes, taught with register_adapter, give the original's values and gradients."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate import adapter as adapters
from linfast.ops import plain_couplings

from . import shapes
from .launches import Launches
from .shapes import ONE_LOOP, SHAPES

FLAGS = "reverse", "rev", "inverse"
UNEVEN = "a log-determinant of the forward", "a path"  # networks that are no MLPs, and halves of two and three
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))


def taught(name, dtype=torch.float32):
    """(model, accelerated copy, x) of a shape."""
    make, features, how = SHAPES[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    lf.register_adapter(type(model), **how)
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast)
    assert report.swapped, report
    x = torch.randn(9, features, *((3, 2) if "image" in name else ()), dtype=dtype)
    return model, fast, x


def results(model, x):
    """The outputs of every method of the model, with each value of its flags."""
    found = {}
    for method in ("forward", "encode", "inverse", "decode", "undo"):
        function = getattr(type(model), method, None)
        if function is None or function is getattr(nn.Module, method, None):
            continue
        run = model if method == "forward" else getattr(model, method)
        found[method] = run(x)
        for flag in FLAGS:
            if flag in inspect.signature(function).parameters:
                found[f"{method}({flag})"] = run(x, **{flag: True})
    return {k: v if isinstance(v, tuple) else (v,) for k, v in found.items()}


def with_gradients(model, x):
    x = x.clone().requires_grad_()
    outputs = results(model, x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    every = {}
    for name, of in outputs.items():
        total = sum((o.sin() * torch.arange(o.numel(), dtype=o.dtype).cos().view_as(o)).sum() for o in of)
        every[name] = [*of, *torch.autograd.grad(total, [x, *parameters])]
    return every


def assert_same(model, fast, x, tolerance=None):
    tolerance = TOLERANCES[x.dtype] if tolerance is None else tolerance
    expected, actual = with_gradients(model, x), with_gradients(fast, x)
    assert list(actual) == list(expected)
    for name, values in expected.items():
        for a, b in zip(actual[name], values, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            error = (a - b).norm() / b.norm().clamp(min=1e-30)
            assert error <= tolerance, (name, error)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name, dtype):
    assert_same(*taught(name, dtype))


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_by_the_kernels(name):
    model, fast, x = taught(name)
    with lf.backend("triton"), Launches() as seen:
        assert_same(model, fast, x[:4], 1e-5)
    assert bool(seen.counts) == (name not in UNEVEN)


@pytest.mark.parametrize("name", SHAPES)
def test_couplings_of_one_module_run_in_one_loop(name, monkeypatch):
    _, fast, x = taught(name)
    calls = []
    run = plain_couplings.run_couplings
    from linfast.accelerate import loop

    monkeypatch.setattr(loop, "run_couplings", lambda *a: calls.append(len(a[1])) or run(*a))
    with torch.no_grad():
        outputs = results(fast, x)
    assert (sum(calls) >= 2 * len(outputs)) == (name in ONE_LOOP)


@pytest.mark.parametrize(("count", "together"), [(3, False), (4, True)])
def test_few_networks_run_one_by_one(count, together):
    """Where a loop would take longer than the class's own code."""
    lf.register_adapter(shapes.Stack, conditioner="nets", scale_map=shapes.TANH)
    (row,) = lf.accelerate(shapes.Stack(count)).swapped
    assert ("in one loop" in row.runs) == together, row.runs


@pytest.mark.parametrize("name", SHAPES)
def test_copies_pickles_and_restore(name):
    model, fast, x = taught(name, torch.float64)
    copied, loaded = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
    assert type(copied) is type(fast)
    assert type(loaded) is type(model)
    with torch.no_grad():
        for p in (*model.parameters(), *fast.parameters()):
            p.add_(0.01 * p.requires_grad)
    assert_same(model, fast, x)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01 * p.requires_grad)
    assert_same(model, copied, x)
    assert_same(model, loaded, x)
    lf.restore(fast)
    assert type(fast) is type(model)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_loaded_and_replaced_later(name):
    model, fast, x = taught(name, torch.float64)
    other = SHAPES[name][0]().double()
    for each in (model, fast):
        each.load_state_dict(other.state_dict())
    assert_same(model, fast, x)
    nets = [[m for m in each.modules() if isinstance(m, (nn.Linear, nn.Conv2d))] for each in (model, fast)]
    for first, *_ in nets:
        first.weight = nn.Parameter(2 * first.weight.detach())
    assert_same(model, fast, x)
    seen = []
    nets[1][0].register_forward_hook(lambda *a: seen.append(1))
    assert_same(model, fast, x)
    assert seen


def test_a_setting_and_a_mask_that_are_changed_later():
    model, fast, x = taught("an attribute's side")
    model.flip = fast.flip = False
    with lf.backend("triton"):
        assert_same(model, fast, x, 1e-5)
    model, fast, x = taught("masks")
    for each in (model, fast):
        each.mask.data.copy_(1 - each.mask)
    assert_same(model, fast, x)
    model, fast, x = taught("swapping")
    model.flips = fast.flips = True
    assert_same(model, fast, x)


class Gain(nn.Module):
    """Its settings are of every form in which modules hold them."""

    power = 1.0

    def __init__(self, frozen):
        super().__init__()
        self.register_buffer("gain", torch.ones(8))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False) if frozen else None
        self.tensor, self.options = torch.ones(8), SimpleNamespace(gain=1.0, nested={"gains": [1.0]})

    def factor(self):
        factor = self.gain * self.tensor * self.options.gain * self.options.nested["gains"][0] * self.power
        return factor if self.frozen is None else factor * self.frozen


class WithGain(shapes.Stack):
    def __init__(self, frozen=True):
        super().__init__()
        self.gain, self.order = Gain(frozen), [*range(8)]

    def forward(self, x):
        return (super().forward(x) * self.gain.factor())[:, self.order]

    def inverse(self, y):
        return super().inverse(y[:, torch.tensor(self.order).argsort()] / self.gain.factor())


CHANGES = {
    "a buffer of a submodule": lambda model: model.gain.gain.fill_(2.0),
    "its data": lambda model: model.gain.gain.data.fill_(2.0),
    "a frozen parameter": lambda model: model.gain.frozen.data.fill_(2.0),
    "a tensor": lambda model: model.gain.tensor.mul_(2.0),
    "another tensor": lambda model: setattr(model.gain, "tensor", torch.full((8,), 2.0)),
    "a namespace": lambda model: setattr(model.gain.options, "gain", 2.0),
    "a list in a dict": lambda model: model.gain.options.nested["gains"].__setitem__(0, 2.0),
    "a list": lambda model: model.order.reverse(),
    "an attribute that shadows the class's": lambda model: setattr(model.gain, "power", 2.0),
    "loaded": lambda model: model.load_state_dict(model.state_dict() | {"gain.gain": torch.full((8,), 2.0)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_outside_the_networks_that_is_changed_later(change):
    """The changed instance is no formula of couplings, or another one."""
    lf.register_adapter(WithGain, conditioner="nets", scale_map=shapes.TANH)
    model, x = WithGain(), torch.randn(5, 8)
    fast = copy.deepcopy(model)
    assert lf.accelerate(fast).swapped
    with lf.backend("triton"), Launches() as seen:
        assert_same(model, fast, x, 1e-5)
    assert seen.counts
    for each in (model, fast):
        CHANGES[change](each)
    with lf.backend("triton"):
        assert_same(model, fast, x, 1e-5)


def test_a_frozen_parameter_that_is_trained_later():
    lf.register_adapter(WithGain, conditioner="nets", scale_map=shapes.TANH)
    model, x = WithGain(), torch.randn(5, 8)
    fast = copy.deepcopy(model)
    assert lf.accelerate(fast).swapped
    for each in (model, fast):
        each.gain.frozen.requires_grad_()
    assert_same(model, fast, x)


@pytest.mark.parametrize(("name", "value"), [("power", 2.0), ("factor", lambda self: 2 * self.gain)])
def test_a_class_that_is_changed_later(name, value, monkeypatch):
    lf.register_adapter(WithGain, conditioner="nets", scale_map=shapes.TANH)
    model, x = WithGain(), torch.randn(5, 8)
    fast = copy.deepcopy(model)
    assert lf.accelerate(fast).swapped
    monkeypatch.setattr(Gain, name, value)
    assert_same(model, fast, x)


def test_an_attribute_whose_changes_could_not_be_seen():
    lf.register_adapter(WithGain, conditioner="nets", scale_map=shapes.TANH)
    model = WithGain()
    model.gain.numbers = torch.Generator()
    report = lf.accelerate(model)
    assert "numbers" in report.left[0].note, report
    del model.gain.numbers
    model.unregistered = [nn.Linear(2, 2)]
    report = lf.accelerate(model)
    assert "changes of its unregistered, a Linear, could not be seen" in report.left[0].note, report


def test_unchanged_state_is_compared_and_not_looked_for_again(monkeypatch):
    lf.register_adapter(WithGain, conditioner="nets", scale_map=shapes.TANH)
    model, x = WithGain(), torch.randn(5, 8)
    assert lf.accelerate(model).swapped
    from linfast.accelerate import registered

    monkeypatch.setattr(registered, "find_formula", None)
    model(x), model.eval()(x)


def test_instances_of_one_class_that_differ():
    lf.register_adapter(shapes.Flipped, conditioner="net", scale_map=lf.ScaleMap("exp"))
    model = nn.Sequential(shapes.Flipped(), shapes.Flipped(True), shapes.Flipped())
    fast, x = copy.deepcopy(model), torch.randn(5, 8)
    assert len(lf.accelerate(fast).swapped) == 3
    with lf.backend("triton"):
        torch.testing.assert_close(fast(x), model(x))


class Zeros(shapes.Stack):
    """As flows begin: every coupling is the identity."""

    def conditioner(self):
        net = super().conditioner()
        for p in net[-1].parameters():
            nn.init.zeros_(p)
        return net


@pytest.mark.parametrize("layout", [None, "halves", "raw_first"])
def test_networks_of_zeros_do_not_hide_a_wrong_layout(layout):
    lf.register_adapter(Zeros, conditioner="nets", scale_map=shapes.TANH, layout=layout)
    model, x = Zeros(), torch.randn(3, 8)
    report = lf.accelerate(model)
    assert bool(report.swapped) == (layout != "halves")
    if layout == "halves":
        assert "differs from the original" in report.left[0].note
        return
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        torch.testing.assert_close(model.inverse(model(x)), x, rtol=1e-3, atol=1e-3)
        fast = model(x)
        lf.restore(model)
        torch.testing.assert_close(fast, model(x))


class OtherBound(shapes.Pair):
    def params(self, kept):
        shift, log_s = self.cond(kept)
        return shift, log_s.clamp(-3, 3)


class OtherInverse(shapes.Stack):
    def inverse(self, y):
        return super().inverse(y) + 1e-6


class OtherFlag(shapes.TwoNets):
    """Its flag does something else."""

    def forward(self, x, twice=False):
        y = super().forward(x)
        return super().forward(y) if twice else y


class Centred(shapes.Stack):
    def params(self, net, kept):
        s, t = super().params(net, kept)
        return s - s.mean(1, keepdim=True), t


class Learned(shapes.Stack):
    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.ones(()))

    def params(self, net, kept):
        s, t = super().params(net, kept)
        return self.size * s, t


class Result(NamedTuple):
    z: torch.Tensor
    log_det: torch.Tensor


class Named(shapes.EvenOdd):
    def encode(self, x):
        return Result(*super().encode(x))


class WideClamp(shapes.Stack):
    def params(self, net, kept):
        s, t = net(kept).chunk(2, 1)
        return s.clamp(self.least, self.most), t

    least, most = -10, 10


class UpperClamp(WideClamp):
    least, most = None, 50


class FarIdentity(shapes.Stack):
    """Rows with a large feature pass unchanged."""

    def forward(self, x):
        return torch.where((x.abs() > 20).any(1, keepdim=True), x, super().forward(x))


class Stores(shapes.EvenOdd):
    def forward(self, x):
        y, self.log_det = super().forward(x)
        return y


class Counts(shapes.Stack):
    calls = 0

    def inverse(self, y):
        self.calls += 1
        return super().inverse(y)


class CountsInABuffer(shapes.Stack):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("cls", "how", "why"),
    [
        (OtherBound, {"conditioner": "cond", "scale_map": lf.ScaleMap("clamp")}, "differs from the original"),
        (OtherInverse, {"conditioner": "nets", "scale_map": shapes.TANH}, "its inverse, as described, differs"),
        (Centred, {"conditioner": "nets", "scale_map": shapes.TANH}, "differs from the original"),
        (Learned, {"conditioner": "nets", "scale_map": shapes.TANH}, "than the original"),
        (
            shapes.Stack,
            {"conditioner": "nets", "scale_map": shapes.TANH, "moves": "first"},
            "differs from the original",
        ),
        (shapes.Stack, {"conditioner": "net", "scale_map": shapes.TANH}, "its net is not a module"),
        (shapes.Stack, {"conditioner": "nets", "scale_map": shapes.TANH, "log_det": True}, "log_det is True"),
        (shapes.TwoNets, {"conditioner": "scale_net", "scale_map": shapes.EXP, "inverse": "undo"}, "differs"),
        (WideClamp, {"conditioner": "nets", "scale_map": shapes.EXP}, "differs from the original"),
        (UpperClamp, {"conditioner": "nets", "scale_map": shapes.EXP}, "differs from the original"),
        (FarIdentity, {"conditioner": "nets", "scale_map": shapes.TANH}, "differs from the original"),
        (Stores, {"conditioner": "couplings", "scale_map": lf.ScaleMap("tanh")}, "forward writes to the instance"),
        (Counts, {"conditioner": "nets", "scale_map": shapes.TANH}, "inverse writes to the instance"),
        (CountsInABuffer, {"conditioner": "nets", "scale_map": shapes.TANH}, "forward writes to the instance"),
        (Named, {"conditioner": "couplings", "scale_map": lf.ScaleMap("tanh")}, "forward returns a Result"),
    ],
)
def test_what_disagrees_is_left_alone(cls, how, why):
    model = cls()
    lf.register_adapter(cls, **how)
    report = lf.accelerate(model)
    assert type(model) is cls
    assert why in report.left[0].note, report


def test_an_argument_that_is_neither_flag_nor_context_runs_the_original():
    lf.register_adapter(OtherFlag, conditioner="scale_net", scale_map=shapes.TANH, inverse="undo")
    model = OtherFlag()
    fast, x = copy.deepcopy(model), torch.randn(3, 8)
    assert lf.accelerate(fast).swapped
    with lf.backend("triton"):
        for arguments in ((), (True,), (False,)):
            torch.testing.assert_close(fast(x, *arguments), model(x, *arguments))


def test_a_known_flag_by_position_and_by_keyword():
    model, fast, x = taught("two nets")
    with lf.backend("triton"):
        for arguments, named in (((True,), {}), ((), {"reverse": True}), ((False,), {})):
            with Launches() as seen:
                torch.testing.assert_close(fast(x, *arguments, **named), model(x, *arguments, **named))
            assert seen.counts


def test_arguments_of_other_shapes_run_the_original():
    """The class takes any dimensions after the channels, which no check has seen."""
    lf.register_adapter(shapes.Flipped, conditioner="net", scale_map=lf.ScaleMap("exp"))
    fast = shapes.Flipped()
    assert lf.accelerate(fast).swapped
    fast.net = nn.Conv1d(4, 8, 1)
    model, x = copy.deepcopy(fast), torch.randn(2, 8, 8)
    lf.restore(model)
    with lf.backend("triton"):
        torch.testing.assert_close(fast(x), model(x))


class Cut(shapes.Flipped):
    """A context that is joined to the kept half, not passed on."""

    def __init__(self):
        super().__init__()
        self.net = shapes.mlp(6, 8)

    def forward(self, x, context=None):
        a, b = x.chunk(2, 1)
        context = x.new_zeros(len(x), 2) if context is None else context
        t, s = self.net(torch.cat((a, context), 1)).chunk(2, 1)
        return torch.cat((a, b * s.exp() + t), 1)

    def inverse(self, y, context=None):
        a, b = y.chunk(2, 1)
        context = y.new_zeros(len(y), 2) if context is None else context
        t, s = self.net(torch.cat((a, context), 1)).chunk(2, 1)
        return torch.cat((a, (b - t) * (-s).exp()), 1)


class Added(shapes.Flipped):
    """A context that is added to the result."""

    def forward(self, x, context=None):
        return super().forward(x) + (0 if context is None else context.mean())


@pytest.mark.parametrize(("cls", "swapped"), [(Cut, False), (Added, True)])
def test_a_context_that_is_not_passed_on_is_never_lost(cls, swapped):
    lf.register_adapter(cls, conditioner="net", scale_map=lf.ScaleMap("exp"))
    model, x = cls(), torch.randn(3, 8)
    fast = copy.deepcopy(model)
    assert bool(lf.accelerate(fast).swapped) == swapped
    with lf.backend("triton"):
        for context in (None, torch.randn(3, 2)):
            torch.testing.assert_close(fast(x, context), model(x, context))


class Joined(nn.Module):
    """A network that joins the context, zeros without one, to the kept features."""

    def __init__(self):
        super().__init__()
        self.net = shapes.mlp(6, 8)

    def forward(self, kept, context=None):
        context = kept.new_zeros(len(kept), 2) if context is None else context
        return self.net(torch.cat((kept, context), 1))


class Noisy(nn.Module):
    """Two arguments after x: noise, which is added to the result, and a context, which the network gets."""

    def __init__(self):
        super().__init__()
        self.net = Joined()

    def forward(self, x, noise=None, context=None):
        a, b = x.chunk(2, 1)
        t, s = self.net(a, context).chunk(2, 1)
        return torch.cat((a, b * s.exp() + t), 1) + (0 if noise is None else noise[:, :1])

    def inverse(self, y, context=None):
        a, b = y.chunk(2, 1)
        t, s = self.net(a, context).chunk(2, 1)
        return torch.cat((a, (b - t) * (-s).exp()), 1)


def test_only_the_context_reaches_the_networks():
    lf.register_adapter(Noisy, conditioner="net", scale_map=lf.ScaleMap("exp"))
    model, x, noise, context = Noisy(), torch.randn(3, 8), torch.randn(3, 2), torch.randn(3, 2)
    fast = copy.deepcopy(model)
    assert lf.accelerate(fast).swapped
    with lf.backend("triton"):
        for arguments in ((), (noise,), (None, context), (noise, context)):
            with Launches() as seen:
                torch.testing.assert_close(fast(x, *arguments), model(x, *arguments))
            assert bool(seen.counts) == (arguments in ((), (None, context)))
        with Launches() as seen:
            torch.testing.assert_close(fast.inverse(x, context), model.inverse(x, context))
        assert seen.counts


@pytest.mark.parametrize("name", ["a flag alone", "pair", "stack", "masks"])
def test_torch_compile_traces_it_whole(name):
    model, fast, x = taught(name)
    method = "encode" if name == "masks" else "forward"
    compiled = torch.compile(getattr(fast, method), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), getattr(model, method)(x))


def test_a_mask_that_is_changed_after_torch_compile():
    model, fast, x = taught("masks")
    compiled = torch.compile(fast.encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model.encode(x))
    for each in (model, fast):
        each.mask.data.copy_(1 - each.mask)
    torch.testing.assert_close(compiled(x), model.encode(x))


def test_bad_arguments_are_named():
    good = {"conditioner": "nets", "scale_map": shapes.TANH}
    for change, error, message in (
        ({"conditioner": 3}, TypeError, "conditioner must be"),
        ({"conditioner": ()}, ValueError, "conditioner must name"),
        ({"conditioner": ("a", 3)}, ValueError, "conditioner must name"),
        ({"forward": "encode"}, ValueError, "forward must name a method of Stack"),
        ({"inverse": "rev"}, ValueError, "inverse must name a method of Stack or a flag of its forward; got 'rev'"),
        ({"layout": "pair"}, ValueError, "layout must be one of halves, raw_first, interleaved"),
        ({"log_det": 1}, TypeError, "log_det must be"),
    ):
        with pytest.raises(error, match=message):
            lf.register_adapter(shapes.Stack, **{**good, **change})
