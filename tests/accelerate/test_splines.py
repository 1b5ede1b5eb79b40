"""Rational-quadratic spline couplings of nflows, glasflow and normflows, and ResidualNet as a conditioner."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf
from linfast import rows
from linfast.accelerate.residual import find_residual

from .test_libraries import assert_close, assert_same, outputs, relative
from .zoo import CONTEXT, FEATURES, KINDS, make, require

SPLINES = {
    "nflows spline gather",
    "nflows spline of all features",
    "nflows spline without tails",
    "glasflow NSF batch norm",
    "normflows spline",
    "normflows circular spline",
}
SEEDS = 8
LONG = 64


def coupling(net=None, package="nflows", context=CONTEXT, **options):
    """(one spline coupling in eval mode, its accelerated copy, the report)."""
    transforms, nets = require(f"{package}.transforms"), require(f"{package}.nn.nets")

    def resnet(n_in, n_out):
        return nets.ResidualNet(n_in, n_out, hidden_features=16, context_features=context)

    named = {"num_bins": 5, "tails": "linear", "tail_bound": 2.0, **options}
    torch.manual_seed(0)
    mask = torch.arange(FEATURES) % 2
    model = transforms.PiecewiseRationalQuadraticCouplingTransform(mask, net or resnet, **named).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    fast = copy.deepcopy(model)
    return model, fast, lf.accelerate(fast)


def resnet_of(**options):
    nets = require("nflows.nn.nets")
    return lambda n_in, n_out: nets.ResidualNet(n_in, n_out, hidden_features=16, **options)


def values(batch=LONG, dtype=torch.float32):
    torch.manual_seed(1)
    return 1.5 * torch.randn(batch, FEATURES, dtype=dtype), torch.randn(batch, CONTEXT, dtype=dtype)


def both_ways(model, x, c=None):
    return [*model(x, c), *model.inverse(x, c)]


def cut(monkeypatch, size=8):
    """Count products; from now on long batches are taken in parts of ``size`` rows."""
    monkeypatch.setattr(rows, "_SIZES", rows._Sizes(bytes=1, fewest=size))


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in ("aten::addmm", "aten::mm", "aten::addmm_")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(SPLINES))
def test_draws_of_weights_and_inputs(name):
    """In float32 within twice the original's own error, in float64 the same to 1e-12."""
    kind = KINDS[name]
    for seed in range(SEEDS):
        model = make(kind, seed)
        fast = copy.deepcopy(model)
        assert not lf.accelerate(fast).left
        exact = outputs(kind, copy.deepcopy(model).double(), torch.float64, seed)
        for actual, own, truth in zip(
            outputs(kind, fast, torch.float32, seed), outputs(kind, model, torch.float32, seed), exact, strict=True
        ):
            assert relative(actual, truth) <= 2 * relative(own, truth) + 2e-6
        fast = copy.deepcopy(model).double()
        assert not lf.accelerate(fast).left
        assert_close(outputs(kind, fast, torch.float64, seed), exact, 1e-12)


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_parameters(scale):
    model, fast, _ = coupling(apply_unconditional_transform=True)
    x, c = values(dtype=torch.float64)
    x[:2], x[2:4] = 2.0, -2.0  # the ends of the interval
    for each in (model, fast):
        each.double()
        with torch.no_grad():
            each.transform_net.final_layer.weight *= scale
    for actual, expected in zip(fast(x, c), model(x, c), strict=True):
        assert actual.isfinite().all()
        if expected.isfinite().all():
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("package", ["nflows", "glasflow.nflows"])
@pytest.mark.parametrize("far", [-0.1, 1.1, float("nan")])
def test_outside_the_domain_the_library_raises_its_own_error(package, far):
    model, fast, report = coupling(package=package, tails=None, apply_unconditional_transform=True)
    assert report.swapped
    x, c = values()
    x = x.sigmoid()
    assert_close(both_ways(fast, x, c), both_ways(model, x, c), 2e-6)
    for feature in (0, 1):
        wrong = x.clone()
        wrong[3, feature] = far
        for run, original in ((fast, model), (fast.inverse, model.inverse)):
            with pytest.raises(Exception) as theirs:  # noqa: PT011
                original(wrong, c)
            with pytest.raises(type(theirs.value)):
                run(wrong, c)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("feature", [0, 1], ids=["kept", "moved"])
def test_outside_the_domain_the_network_runs_no_second_time(own, feature):
    net = resnet_of(use_batch_norm=True)
    model, fast, _ = coupling(net, tails=None, apply_unconditional_transform=own)
    x = values()[0].sigmoid()
    x[3, feature] = 1.1
    for each in (model, fast):
        with contextlib.suppress(Exception):
            each.train()(x)
    assert_same([*fast.buffers()], [*model.buffers()])


class _Half(nn.Module):
    """Its output is of half precision, as of a network that was quantised."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, n_out))

    def forward(self, x, context=None):
        return self.net(x).half()


@pytest.mark.parametrize("inverse", [False, True])
def test_where_the_librarys_spline_runs_the_network_has_run_once(inverse):
    """It may count its calls, as batch norm does, and draw random numbers."""
    model, fast, report = coupling(_Half)
    assert len(report.swapped) == 1
    found = []
    for each in (model, fast):
        torch.manual_seed(2)
        outputs = (each.train().inverse if inverse else each.train())(values()[0])
        found.append([t.double() for t in (*outputs, torch.rand(3), *each.buffers())])
    assert_close(found[1], found[0], 1e-5)


def test_an_error_of_the_network_is_raised_at_once():
    model, fast, _ = coupling(lambda n_in, n_out: _Refuses(n_in, n_out))
    for each in (model, fast):
        with pytest.raises(ValueError, match="refused"):
            each(values()[0])
    assert fast.transform_net.calls == model.transform_net.calls == 1


class _Refuses(nn.Module):
    """Raises an error at its first call."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear, self.hidden_features, self.calls = nn.Linear(n_in, n_out), 16, 0

    def forward(self, x, context=None):
        self.calls += 1
        if self.calls == 1:
            raise ValueError("refused")
        return self.linear(x)


def test_without_rows_it_does_as_the_library():
    for options in ({}, {"tails": None}):
        model, fast, _ = coupling(**options)
        x, c = values(0)
        try:
            expected = model(x, c)
        except (RuntimeError, IndexError) as error:
            with pytest.raises(type(error)):
                fast(x, c)
        else:
            assert_same(fast(x, c), expected)


def test_dropout_draws_the_same_random_numbers():
    model, fast, _ = coupling(resnet_of(dropout_probability=0.4))
    x, _ = values()
    for each in (model, fast):
        each.train()
    for _ in range(3):
        results = []
        for each in (model, fast):
            torch.manual_seed(3)
            results.append([*each(x), torch.rand(1)])
        assert_close(results[1], results[0], 2e-6)
    assert not torch.equal(model(x)[0], model(x)[0])


def test_batch_norm_in_training_sees_the_whole_batch(monkeypatch):
    model, fast, _ = coupling(resnet_of(use_batch_norm=True))
    cut(monkeypatch)
    x, _ = values()
    for mode in (True, False):
        for each in (model, fast):
            each.train(mode)
        assert_close(both_ways(fast, x), both_ways(model, x), 1e-5)
    assert_close([b.float() for b in fast.buffers()], [b.float() for b in model.buffers()], 1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_long_batches_are_cut_with_their_contexts(monkeypatch, train):
    model, fast, _ = coupling(apply_unconditional_transform=True)
    x, c = values()
    expected = both_ways(model, x, c)
    with Products() as whole:
        both_ways(fast, x, c)
    cut(monkeypatch)
    for each in (model, fast):
        each.train(train)
    with Products() as parts:
        actual = both_ways(fast, x, c)
    assert parts.count == whole.count * LONG // 8
    assert_close(actual, expected, 2e-6)
    gradients = [
        torch.autograd.grad(sum(t.sum() for t in both_ways(m, x, c)), [*m.parameters()]) for m in (model, fast)
    ]
    assert_close(gradients[1], gradients[0], 1e-5)


def test_an_affine_coupling_with_a_residual_network_is_cut_too(monkeypatch):
    transforms = require("nflows.transforms")
    mask = torch.arange(FEATURES) % 2
    net = resnet_of(context_features=CONTEXT, dropout_probability=0.5)
    model = transforms.AffineCouplingTransform(mask, net)
    fast = copy.deepcopy(model.eval())
    (row,) = lf.accelerate(fast).rows
    assert row.conditioner == "ResidualNet 6-16x2-6 relu"
    assert "as many at a time as fit its cache" in row.runs
    x, c = values(4 * LONG)
    expected = both_ways(model, x, c)
    with Products() as whole:
        both_ways(fast, x, c)
    cut(monkeypatch)
    with Products() as parts:
        actual = both_ways(fast, x, c)
    assert parts.count > whole.count
    assert_close(actual, expected, 2e-6)
    with Products() as training:
        both_ways(fast.train(), x, c)
    assert training.count == whole.count


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"min_bin_width": 0.0}, "min_width"),
        ({"min_bin_height": 0.3}, "min_height"),
        ({"min_derivative": 0.0}, "min_derivative"),
        ({"num_bins": 1}, "bins"),
        ({"tails": "circular"}, "tails"),
    ],
)
def test_options_that_the_op_refuses_are_left_alone(options, why):
    model, fast, report = coupling(**options)
    (row,) = report.rows
    assert not row.swapped
    assert why in row.note, row.note
    assert type(fast) is type(model)


def test_another_unconditional_transform_is_left_alone():
    model, _, _ = coupling(apply_unconditional_transform=True)
    model.unconditional_transform = require("nflows.transforms").ActNorm(3)
    (row,) = lf.accelerate(model).rows
    assert "unconditional transform is a ActNorm" in row.note


def test_settings_written_later_are_followed():
    model, fast, _ = coupling(apply_unconditional_transform=True)
    x, c = values()
    for change in (
        lambda m: setattr(m, "tail_bound", 1.0),
        lambda m: setattr(m, "min_derivative", 0.1),
        lambda m: setattr(m.transform_net, "hidden_features", 4),
        lambda m: setattr(m.unconditional_transform, "tail_bound", 3.0),
        lambda m: setattr(m.unconditional_transform, "min_bin_width", 0.0),  # which the op refuses
        lambda m: setattr(m, "min_bin_width", 0.0),
        lambda m: setattr(m, "unconditional_transform", None),
        swap_masks,
    ):
        before = model(x, c)[0]
        for each in (model, fast):
            change(each)
        expected = both_ways(model, x, c)
        assert not torch.equal(before, expected[0])
        assert_close(both_ways(fast, x, c), expected, 2e-6)


def swap_masks(model):
    kept, moved = model.identity_features.clone(), model.transform_features.clone()
    model.identity_features.copy_(moved)
    model.transform_features.copy_(kept)


def test_hooks_on_the_conditioner_run():
    _, fast, _ = coupling()
    x, c = values()
    expected = fast(x, c)
    seen = []
    inside = fast.transform_net, fast.transform_net.blocks[0], fast.transform_net.blocks[1].linear_layers[0]
    for module in inside:
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        assert find_residual(fast.transform_net) is None
        assert_close(fast(x, c), expected, 2e-6)
        handle.remove()
    assert len(seen) == len(inside)


def test_hooks_on_the_spline_of_the_kept_features_run():
    _, fast, _ = coupling(apply_unconditional_transform=True)
    x, c = values()
    seen = []
    fast.unconditional_transform.register_forward_hook(lambda *_: seen.append(1))
    fast(x, c)
    assert seen == [1]


@pytest.mark.parametrize(
    "options",
    [
        {"activation": nn.ReLU(inplace=True)},
        {"activation": torch.relu_},
        {"activation": torch.sin},
        {"activation": nn.PReLU()},
    ],
    ids=["in place", "in-place function", "unknown", "with parameters"],
)
def test_other_activations_run_the_librarys_own_network(options):
    model, fast, report = coupling(resnet_of(**options))
    assert report.swapped
    assert find_residual(fast.transform_net) is None
    x, _ = values(dtype=torch.float64)
    assert_close(both_ways(fast.double(), x), both_ways(model.double(), x), 1e-12)


def test_a_subclass_of_the_network_is_not_taken_for_it():
    nets = require("nflows.nn.nets")

    class Twice(nets.ResidualNet):
        def forward(self, inputs, context=None):
            return 2 * super().forward(inputs, context)

    model, fast, _ = coupling(lambda n_in, n_out: Twice(n_in, n_out, hidden_features=16))
    assert find_residual(fast.transform_net) is None
    x, _ = values(dtype=torch.float64)
    assert_close(both_ways(fast.double(), x), both_ways(model.double(), x), 1e-12)


def test_networks_of_all_three_libraries_are_recognised():
    for where in ("nflows.nn.nets.resnet", "glasflow.nflows.nn.nets.resnet", "normflows.nets.resnet"):
        require(where.partition(".")[0])
        net = require(where).ResidualNet(3, 7, 16, context_features=2, activation=nn.ELU(0.5), use_batch_norm=True)
        assert str(find_residual(net)) == "ResidualNet 5-16x2-7 elu 0.5"


def test_a_context_of_other_rows_fails_as_in_the_library():
    model, fast, _ = coupling()
    x, c = values()
    for wrong in (c[:1], c[:, :1], None):
        for each in (model, fast):
            with pytest.raises(RuntimeError):
                each(x, wrong)


def test_autocast_gives_the_librarys_result():
    model, fast, _ = coupling(package="glasflow.nflows")
    x, c = values()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fast(x, c), model(x, c))


def test_second_derivatives():
    model, fast, _ = coupling(apply_unconditional_transform=True)
    x, c = values(8, torch.float64)
    results = []
    for each in (model.double(), fast.double()):
        given = x.clone().requires_grad_()
        y, log_det = each(given, c)
        (first,) = torch.autograd.grad((y.sin().sum() + log_det.sum()), given, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [given, *each.parameters()], allow_unused=True))
    pairs = [(a, b) for a, b in zip(*results, strict=True) if a is not None]
    assert_close([b for _, b in pairs], [a for a, _ in pairs], 1e-9)


def test_samples_are_the_same():
    flow = require("glasflow").CouplingNSF(FEATURES, 2, n_neurons=16, linear_transform="lu").eval()
    fast = copy.deepcopy(flow)
    assert not lf.accelerate(fast).left
    samples = []
    for each in (flow, fast):
        torch.manual_seed(5)
        samples.append(
            [*each.sample_and_log_prob(50), each.log_prob(samples[0][0] if samples else torch.zeros(50, 6))]
        )
    assert_close(samples[1][:2], samples[0][:2], 2e-6)


@pytest.mark.parametrize("name", ["CoupledRationalQuadraticSpline", "CircularCoupledRationalQuadraticSpline"])
def test_a_new_conditional_flow_of_normflows(name):
    """New ones are the identity, so that their log-determinants are only roundings."""
    nf = require("normflows")
    options = {"ind_circ": [0, 3]} if name.startswith("Circular") else {}
    flows = [getattr(nf.flows, name)(FEATURES, 2, 16, num_context_channels=CONTEXT, **options) for _ in range(2)]
    model = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(FEATURES), flows)
    fast = copy.deepcopy(model)
    assert not lf.accelerate(fast).left
    x, c = values()
    results = [m.inverse_and_log_det(x, c) for m in (fast, model)]
    exact = model.double().inverse_and_log_det(x.double(), c.double())
    for actual, own, truth in zip(*results, exact, strict=True):
        assert (actual - truth).abs().max() <= 2 * (own - truth).abs().max() + 2e-6


def test_outside_a_list_of_tails_normflows_gives_zero():
    kind = require("normflows").flows.CircularCoupledRationalQuadraticSpline
    model = kind(FEATURES, 1, 8, ind_circ=[1], tail_bound=2.0)
    fast = copy.deepcopy(model)
    assert not lf.accelerate(fast).left
    x = torch.full((3, FEATURES), 2.5)
    assert_same(fast.inverse(x), model.inverse(x))
    assert not fast.inverse(x)[0].any()


def test_inputs_without_a_net_that_scales():
    """A net without hidden_features: the library warns, and does not divide."""
    model, fast, report = coupling(lambda n_in, n_out: _Linear(n_in, n_out), context=None)
    assert report.swapped
    x, _ = values()
    with pytest.warns(UserWarning, match="not scaled down"):
        expected = both_ways(model, x)
    assert_close(both_ways(fast, x), expected, 2e-6)


class _Linear(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    def forward(self, x, context=None):
        return self.linear(x)
