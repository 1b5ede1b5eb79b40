"""A coupling and its MLP in one launch, in the interpreter: when it is used, and when it must not be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate import adapter as adapters
from linfast.accelerate import find_mlp
from linfast.accelerate import launch as whole
from linfast.ops import register
from linfast.ops.stack_weights import pack_stacks
from tests.marks import long

from .launches import Launches
from .zoo import require


class Coupling(nn.Module):
    """y = ((x1 + t) e^(2 tanh s), x2), where [t | s] = net(x2, context)."""

    def __init__(self, features=6, net=None):
        super().__init__()
        first, second = (features + 1) // 2, features // 2
        self.net = mlp(second, 2 * first) if net is None else net

    def params(self, kept, *context):
        shift, raw = self.net(kept, *context).chunk(2, 1)
        return shift, 2 * raw.tanh()

    def forward(self, x, *context):
        x1, x2 = x.chunk(2, 1)
        shift, log_s = self.params(x2, *context)
        return torch.cat(((x1 + shift) * log_s.exp(), x2), 1), log_s.sum(1)

    def inverse(self, y, *context):
        y1, x2 = y.chunk(2, 1)
        shift, log_s = self.params(x2, *context)
        return torch.cat((y1 * (-log_s).exp() - shift, x2), 1), -log_s.sum(1)


def mlp(n_in, n_out, depth=3, activation=nn.SiLU, width=16, **options):
    layers = []
    for i in range(depth - 1):
        layers += [nn.Linear(width if i else n_in, width, **options), activation()]
    return nn.Sequential(*layers, nn.Linear(width if depth > 1 else n_in, n_out, **options))


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    lf.register_adapter(Coupling, conditioner="net", scale_map=lf.ScaleMap("tanh", 2.0), log_det=True)


def values(model, x, *context):
    """Both directions, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    outputs = [*model(x, *context), *model.inverse(x, *context)]
    total = sum((o.float() * torch.arange(o.numel()).sin().view_as(o)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(total, [x, *model.parameters()])]


def assert_taken(model, x, launches, *context, tolerance=1e-5):
    """The accelerated model gives the original's values with this many whole-layer launches."""
    expected = values(model, x, *context)
    lf.accelerate(model)
    with lf.backend("triton"), Launches() as seen:
        actual = values(model, x, *context)
    assert seen.counts["coupling_stack"] == launches, seen.counts
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("features", "depth"),
    [
        *((2, 1), (5, 2), (6, 3)),
        *long(*((f, d) for f in (2, 5, 6) for d in (1, 2, 3) if f // 2 != d)),
    ],
)
def test_sizes(features, depth):
    first, second = (features + 1) // 2, features // 2
    assert_taken(Coupling(features, mlp(second, 2 * first, depth)), torch.randn(5, features), 2)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Tanh, nn.GELU, lambda: nn.LeakyReLU(0.0)])
def test_activations(activation):
    assert_taken(Coupling(net=mlp(3, 6, activation=activation, bias=False)), torch.randn(4, 6), 2)


def test_no_rows():
    assert_taken(Coupling(), torch.randn(0, 6), 2)


def test_strided_rows():
    assert_taken(Coupling(), torch.randn(6, 5).mT, 2)


def test_half_precision():
    assert_taken(Coupling().half(), torch.randn(4, 6).half(), 2, tolerance=2e-2)


@pytest.mark.parametrize("precision", [None, "exact", "fast"])
def test_the_requested_precision_reaches_the_launch(precision, monkeypatch):
    model, seen = Coupling(), []
    lf.accelerate(model, precision=precision)

    def record(stacks, precision, half):
        seen.append(precision)
        return pack_stacks(stacks, precision, half)

    monkeypatch.setattr(whole, "pack_stacks", record)
    with lf.backend("triton"):
        model(torch.randn(4, 6))
    assert seen == [precision or "exact"]


class WithContext(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(3, 6)

    def forward(self, x, context=0.0):
        return self.net(x) + context


class PassesOn(nn.Module):
    def __init__(self, net=None):
        super().__init__()
        self.net = mlp(3, 6) if net is None else net

    def forward(self, x, context=None):
        return self.net(x)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _with(change):
    net = mlp(3, 6)
    change(net)
    return net


def _patch(net):
    forward = net[0].forward
    net[0].forward = lambda x: 2 * forward(x)


NOT_WHOLE = {
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 6)),
    "hooked layer": lambda: _with(lambda net: net[0].register_forward_hook(lambda m, a, y: 2 * y)),
    "hooked net": lambda: _with(lambda net: net.register_forward_pre_hook(lambda m, a: (2 * a[0],))),
    "hooked activation": lambda: _with(lambda net: net[1].register_forward_hook(lambda m, a, y: 2 * y)),
    "parametrized": lambda: _with(lambda net: nn.utils.parametrizations.weight_norm(net[2])),
    "patched": lambda: _with(_patch),
    "derived layer": lambda: nn.Sequential(Own(3, 8), nn.ReLU(), nn.Linear(8, 6)),
    "another forward": WithContext,
    "another activation": lambda: mlp(3, 6, activation=nn.ELU),
    "slope": lambda: mlp(3, 6, activation=nn.LeakyReLU),
    "tanh's GELU": lambda: mlp(3, 6, activation=lambda: nn.GELU("tanh")),
    "too many layers": lambda: mlp(3, 6, 5),
    "too wide": lambda: mlp(3, 6, width=600),
}


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_what_is_no_such_mlp_runs_by_itself(name):
    model = Coupling(net=NOT_WHOLE[name]())
    assert_taken(model, torch.randn(4, 6), 0)
    assert "on a GPU: fused tail" in lf.accelerate(model).rows[0].runs


def test_what_is_too_large_for_one_launch_takes_one_per_linear_layer_without_gradients():
    model, x = Coupling(net=mlp(3, 6, width=300, depth=2)), torch.randn(4, 6)
    expected = model(x)[0].detach()
    assert_taken(model, x, 0)
    with torch.no_grad(), lf.backend("triton"), Launches() as seen:
        y = model(x)[0]
    assert seen.counts["coupling_stack"] == 1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert "on a GPU: one launch per linear layer" in lf.accelerate(model).rows[0].runs


def test_a_context_runs_the_conditioner():
    assert_taken(Coupling(net=WithContext()), torch.randn(4, 6), 0, torch.randn(4, 1))


def test_a_wrapper_that_only_forwards_is_examined():
    assert_taken(Coupling(net=PassesOn()), torch.randn(4, 6), 2)
    assert str(find_mlp(PassesOn(PassesOn()))) == "MLP 3-16-16-6 silu"


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, context=None: self.net(context),
        lambda self, x: self.net(x) + 0,
        lambda self, x: self.net(x, x),
        lambda self, x: self.net(self.net(x)),
        lambda self, x: self.net[0](x),
        lambda self, x: x,
        lambda self, x: (self.net(x), None)[0],
    ],
)
def test_a_wrapper_that_does_more_is_not(forward):
    class Wrapper(PassesOn):
        pass

    forward.__qualname__, forward.__module__ = f"{Wrapper.__qualname__}.forward", Wrapper.__module__
    Wrapper.forward = forward
    assert find_mlp(Wrapper()) is None
    Wrapper.forward = PassesOn.forward
    assert find_mlp(Wrapper()) is None  # inherited: whoever wrote the class has not said it


def test_hooks_that_are_added_later_fire():
    model, x, seen = Coupling(), torch.randn(4, 6), []
    lf.accelerate(model)
    with lf.backend("triton"):
        expected = model(x)
        handle = model.net[1].register_forward_hook(lambda m, a, y: seen.append(y))
        with Launches() as launches:
            actual = model(x)
        assert len(seen) == 1
        assert launches.counts["coupling_stack"] == 0
        handle.remove()
        every = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
        try:
            model(x)
        finally:
            every.remove()
    assert model.net[2] in seen
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_live_parameters_and_frozen_ones(monkeypatch):
    """Outside freeze an optimiser's step takes effect; inside it the weights are packed once."""
    model, x, packed = Coupling(), torch.randn(4, 6), []
    lf.accelerate(model)
    monkeypatch.setattr(whole, "pack_stacks", lambda *a, **k: packed.append(1) or pack_stacks(*a, **k))
    with lf.backend("triton"), torch.no_grad():
        before = model(x)[0]
        model.net[0].weight.data.mul_(2)
        after = model(x)[0]
        assert len(packed) == 2
        with lf.freeze(model):
            frozen = [model(x)[0], model.inverse(model(x)[0])[0]]
        assert len(packed) == 3
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, lf.restore(model) or model(x)[0])
    torch.testing.assert_close(frozen[0], after)
    torch.testing.assert_close(frozen[1], x)


def test_the_check_sees_a_layer_that_is_wrong(monkeypatch):
    def swapped(coupling):
        layer = arranged(coupling)
        return layer._replace(weights=[*layer.weights[:-1], layer.weights[-1].flip(0)])

    arranged = whole._arranged
    model = Coupling()
    monkeypatch.setattr(whole, "_arranged", swapped)
    assert lf.accelerate(model).swapped  # on a CPU it does not run
    with lf.backend("triton"):
        report = lf.accelerate(model)
    assert "the layer in one launch differs from the original by" in report.left[0].note
    assert type(model) is Coupling


def test_a_fullgraph_holds_the_one_launch(monkeypatch):
    model, x, launched = Coupling(), torch.randn(4, 6), []
    expected = model(x)
    lf.accelerate(model)
    launcher = register._launcher
    monkeypatch.setattr(register, "_launcher", lambda path: launched.append(path) or launcher(path))
    with lf.backend("triton"), torch.no_grad():
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert launched == ["stack_pack:launch_stack_pack", "coupling_stack:launch_coupling_stack"]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("moves", ["first", "second"])
def test_odd_features_in_turn(moves):
    """The coupling moves every other one of five features: the halves have three and two."""
    transforms, nets = require("nflows.transforms"), require("nflows.nn.nets")
    mask = [1, 0, 1, 0, 1] if moves == "first" else [0, 1, 0, 1, 0]
    model = transforms.AffineCouplingTransform(mask, lambda i, o: PassesOn(nets.MLP([i], [o], [8])))
    assert_taken(model, torch.randn(4, 5), 2)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("residual", [False, True])
def test_values_that_are_not_finite_are_nan_in_a_masked_flow(value, residual):
    nf = require("normflows")
    b, net = torch.tensor([1.0, 0.0, 1.0, 0.0]), mlp(4, 4)
    with torch.no_grad():
        net[-1].bias[1] = value
    s = nn.Sequential(net, nn.Identity()) if residual else net
    model = nf.flows.MaskedAffineFlow(b, mlp(4, 4), s)
    x = torch.randn(3, 4)
    expected = [*copy.deepcopy(model)(x), *model.inverse(x)]
    lf.accelerate(model)
    for a, b in zip([*model(x), *model.inverse(x)], expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert expected[0][:, 1].isnan().all()


def test_a_context_that_the_net_refuses_is_refused():
    coupling, nets = require("glasflow.transforms.coupling"), require("glasflow.nets.mlp")
    models = (
        (Coupling(net=mlp(3, 6)), TypeError),
        (coupling.AffineCouplingTransform([1, 0] * 3, lambda i, o: nets.MLP(i, o, [8])), ValueError),
    )
    for model, error in models:
        assert lf.accelerate(model).swapped
        with lf.backend("triton"), pytest.raises(error):
            model(torch.randn(4, 6), torch.randn(4, 2))
