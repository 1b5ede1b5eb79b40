"""Spline couplings and masked splines: the identity at first, what y depends on, nflows' values, memory."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from torch import Tensor, nn

import linfast as lf
from linfast import rows
from tests.kept import kept_bytes
from tests.laws.zoo import build, perturb, relative
from tests.ops.budget import DEVICE

TAILS = {"linear": -1, "circular": 0, "bounded": 1}
LAYOUTS = ("features_first", "bins_first")
METHODS = ("forward_and_log_det", "inverse_and_log_det")


def _coupling(features: int = 6, bins: int = 8, tails: str = "linear", **options: Any) -> lf.SplineCoupling:
    moved, kept = (features + 1) // 2, features // 2
    net = lf.MLP(kept, moved * (3 * bins + TAILS[tails]), (16,))
    return lf.SplineCoupling(net, features, bins=bins, tails=tails, **options)


def _masked(features: int = 5, bins: int = 6, tails: str = "linear", **net: Any) -> lf.MaskedAutoregressive:
    conditioner = lf.MaskedMLP(features, 3 * bins + TAILS[tails], (16, 16), "silu", **net)
    return lf.MaskedAutoregressive(conditioner, bins=bins, tails=tails)


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("make", [_coupling, _masked])
@pytest.mark.parametrize("least", [1e-3, 0.9])
def test_a_new_layer_is_the_identity(make: Callable[..., lf.Bijection], tails: str, least: float) -> None:
    options = {"min_derivative": least} if make is _coupling else {}
    x = 3 * torch.randn(50, 6)
    for y, log_det in (getattr(make(6, tails=tails, **options), method)(x) for method in METHODS):
        torch.testing.assert_close(y, x, rtol=4e-7, atol=4e-7)
        torch.testing.assert_close(log_det, torch.zeros(50), rtol=0, atol=4e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moves", ["first", "second"])
def test_it_reads_the_kept_half_and_moves_each_value_of_the_other_alone(layout: str, moves: str) -> None:
    g = perturb(_coupling(moves=moves, layout=layout), 0.3).double()
    row = 0.5 * torch.randn(6).double()
    found = torch.autograd.functional.jacobian(lambda x: g(x[None])[0], row) != 0
    expected, moved = torch.eye(6).bool(), slice(0, 3) if moves == "first" else slice(3, 6)
    expected[moved] |= ~torch.eye(6).bool()[moved] & ~torch.eye(6)[moved].sum(0).bool()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_masked_spline_depends_on_the_features_before(inverse: bool) -> None:
    order = [3, 0, 4, 1, 2]
    g = perturb(_masked(feature_order=order), 0.3).double()
    row = 0.5 * torch.randn(5).double()
    function = g.inverse if inverse else g
    found = torch.autograd.functional.jacobian(lambda x: function(x[None])[0], row) != 0
    assert torch.equal(found[order][:, order], torch.ones(5, 5).tril().bool())


@pytest.mark.parametrize("tails", TAILS)
def test_it_rises_inside_the_interval_and_is_the_identity_outside(tails: str) -> None:
    g = perturb(_coupling(2, 5, tails, tail_bound=2.0), 1.0).double()
    line = torch.linspace(-4, 4, 4001).double()
    x = torch.stack((line, torch.full_like(line, 0.3)), 1)
    y = g(x)
    inside = line.abs() <= 2
    assert (y[:, 0].diff() > 0).all()
    assert relative(y[inside], x[inside]) > 1e-2
    assert torch.equal(y[~inside], x[~inside])
    assert torch.equal(y[:, 1], x[:, 1])
    assert y[inside, 0].abs().max() <= 2


class _WithoutContext(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("tails", ["linear", None])
@pytest.mark.parametrize("inverse", [False, True])
def test_it_equals_nflows(tails: str | None, inverse: bool) -> None:
    """With the same network, whose biases of the derivatives ours adds the constant to."""
    bins, features, least = 7, 5, 1e-3
    moved, per_feature = 3, 3 * bins + (-1 if tails else 1)
    net = perturb(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, moved * per_feature)), 0.5).double()
    theirs = PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor([1, 1, 1, 0, 0]), lambda *_: _WithoutContext(net), num_bins=bins, tails=tails,
        **({"tail_bound": 2.5} if tails else {}),
    )  # fmt: skip
    constant = torch.zeros(moved, per_feature).double()
    constant[:, 2 * bins :] = math.log(math.expm1(1 - least))
    ours_net = copy.deepcopy(net)
    with torch.no_grad():
        ours_net[2].bias -= constant.flatten()
    bound = 2.5 if tails else 0.5  # nflows' bounded spline is on [0, 1]
    g = lf.SplineCoupling(ours_net, features, bins=bins, tail_bound=bound, tails="linear" if tails else "bounded")
    x = torch.randn(200, features).double()
    shift = torch.zeros(features).double()
    if tails is None:
        x[:, :3], shift[:3] = x[:, :3].sigmoid(), 0.5
    expected, expected_log_det = (theirs.inverse if inverse else theirs)(x)
    y, log_det = getattr(g, METHODS[inverse])(x - shift)
    torch.testing.assert_close(y + shift, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-12, atol=1e-11)


def test_both_layouts_are_the_same_numbers() -> None:
    first = perturb(_coupling(), 0.3)
    other = _coupling(layout="bins_first")
    other.load_state_dict(first.state_dict())
    with torch.no_grad():
        for parameter in other.conditioner.layers[-1].parameters():
            parameter.copy_(parameter.unflatten(0, (3, 23)).transpose(0, 1).flatten(0, 1))
    x = torch.randn(20, 6)
    for method in METHODS:
        for mine, given in zip(getattr(other, method)(x), getattr(first, method)(x), strict=True):
            torch.testing.assert_close(mine, given, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flow-spline", "spline-bounded", "masked-spline", "image-flow-spline"])
@pytest.mark.parametrize("method", METHODS)
def test_rebuilt_activations_give_the_gradients_of_stored_ones(name: str, method: str) -> None:
    g, shape = build(name)
    x = torch.randn(7, *shape).double()
    found, kept = [], []
    for mode in ("store", "invert"):
        flow = lf.Flow([g, lf.Flow([copy.deepcopy(g)], memory="store")], memory=mode)
        flow.load_state_dict(lf.Flow([g, lf.Flow([g])]).state_dict())
        leaf = x.clone().requires_grad_()

        def run(flow: lf.Flow = flow, leaf: Tensor = leaf) -> tuple[Tensor, Tensor]:
            return getattr(flow, method)(leaf)

        y, log_det = run()
        found.append(torch.autograd.grad(y.square().sum() + log_det.sin().sum(), [leaf, *flow.parameters()]))
        kept.append(kept_bytes(run))
    assert kept[1] < kept[0]
    for stored, rebuilt in zip(*found, strict=True):
        assert relative(rebuilt, stored) < 1e-9


@pytest.mark.parametrize("features", [5, 4])
def test_the_gradient_of_a_masked_inverse_is_that_of_an_unrolled_one(features: int) -> None:
    """Solved by a walk here, and by D evaluations of the forward's own network and spline there."""
    g = perturb(_masked(features, residual=True, context_features=2), 0.3).double()
    y, context = torch.randn(9, features).double(), torch.randn(9, 2).double()
    weights = torch.randn(9, features).double()

    def unrolled(y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x, total = torch.zeros_like(y), None
        for _ in range(features):
            params = g.conditioner(x, context=context).unflatten(1, (features, -1))
            x, total = _inverse_of(g, y, params)
        return x, total

    results = []
    for function in (g.inverse_and_log_det, unrolled):
        leaves = [y.clone().requires_grad_(), context.clone().requires_grad_()]
        x, log_det = function(leaves[0], context=leaves[1])
        loss = (weights * x).sum() + log_det.sin().sum()
        results.append([x, log_det, *torch.autograd.grad(loss, [*leaves, *g.parameters()])])
    for got, expected in zip(*results, strict=True):
        assert relative(got, expected) < 1e-10


def _inverse_of(g: lf.MaskedAutoregressive, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    bins = g.bins
    derivatives = params[..., 2 * bins :] + math.log(math.expm1(1 - g.min_derivative))
    with lf.backend("reference"):
        return lf.ops.rq_spline(
            y, params[..., :bins], params[..., bins : 2 * bins], derivatives, inverse=True, log_det=True
        )


@pytest.mark.parametrize("make", [_coupling, lambda: _masked(6)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make: Callable[[], lf.Bijection], dtype: torch.dtype) -> None:
    narrow = perturb(make(), 0.1).to(dtype)
    wide, x = copy.deepcopy(narrow).double(), torch.randn(64, 6).to(dtype)
    eps = torch.finfo(dtype).eps
    for method in METHODS:
        y, log_det = getattr(narrow, method)(x)
        truth, true_log_det = getattr(wide, method)(x.double())
        assert (y.dtype, log_det.dtype) == (dtype, torch.float32)
        assert relative(y, truth) < 4 * eps
        assert (log_det - true_log_det).abs().max() < 64 * eps


@pytest.mark.parametrize("make", [_coupling, lambda: _masked(6)])
def test_under_autocast_both_directions_read_the_same_parameters(make: Callable[[], lf.Bijection]) -> None:
    g, x = perturb(make(), 0.1), torch.randn(64, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = g.forward_and_log_det(x)
        back = g.inverse(y)
    assert y.dtype == log_det.dtype == torch.float32
    assert relative(back, x) < 1e-5


def test_long_batches_are_cut_and_give_the_same() -> None:
    torch.set_num_threads(1)
    g = perturb(lf.coupling_flow(4, 2, (64,), transform="spline"), 0.1).double()
    x, seen = torch.randn(10_000, 4).double(), []
    g.bijections[0].conditioner.layers[0].register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    whole = g.forward_and_log_det(x)
    assert seen == [10_000]  # the layer has a hook, which sees the whole batch
    g.bijections[0].conditioner.layers[0]._forward_hooks.clear()
    cut: list[int] = []
    real = rows.by_rows

    def counted(work: Any, x: Tensor, n: int) -> Any:
        cut.append(n)
        return real(work, x, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linfast.flows.match.by_rows", counted)
        parts = g.forward_and_log_det(x)
    assert cut
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["flow-spline", "flow-masked-spline", "spline-circular", "image-flow-spline"])
def test_copies_pickles_and_files_give_the_same(name: str, tmp_path: Path) -> None:
    g, shape = build(name)
    x = torch.randn(3, *shape).double()
    lf.save(g, tmp_path / "g.safetensors")
    for other in (copy.deepcopy(g), pickle.loads(pickle.dumps(g)), lf.load(tmp_path / "g.safetensors")):
        assert torch.equal(other(x), g(x))
        assert repr(other) == repr(g)


@pytest.mark.parametrize("transform", ["coupling_flow", "autoregressive_flow"])
def test_a_linearizer_with_such_a_g(transform: str) -> None:
    g = perturb(getattr(lf, transform)(5, 2, (16,), transform="spline"), 0.1).double()
    f = lf.Linearizer(g, lf.Dense(5).double())
    x = torch.randn(7, 5).double()
    assert relative(f.g_y(f(x)), f.A(f.g_x(x))) < 1e-12
    assert relative((f @ f)(x), f(f(x))) < 1e-10
    with lf.freeze(f), torch.no_grad():
        expected = f(x)
        assert torch.equal(f(x), expected)
    timed = lf.Linearizer(g, lf.TimeLowRank(5, 2).double(), g)
    noise = torch.randn(4, 5).double()
    many = lf.sample(timed, noise, steps=8, method="rk4", one_step=False)
    assert relative(lf.generator(timed, steps=8)(noise), many) < 1e-8


@pytest.mark.parametrize("transform", ["affine", "additive", "spline"])
def test_builders_make_what_they_are_told(transform: str) -> None:
    kind = {"affine": lf.AffineCoupling, "additive": lf.AdditiveCoupling, "spline": lf.SplineCoupling}[transform]
    for g in (
        lf.coupling_flow(4, 2, transform=transform),
        lf.coupling_flow(4, 2, coupling=transform),
        lf.image_flow(2, 4, 2, transform=transform, mix=None),
    ):
        assert {type(layer) for layer in g.bijections} == {kind}
    masked = lf.autoregressive_flow(4, 2, transform=transform).bijections[0]
    assert masked.conditioner.per_feature == {"affine": 2, "additive": 1, "spline": 23}[transform]
    x = torch.randn(5, 4)
    torch.testing.assert_close(masked(x), x)


def test_builders_pass_the_options_of_splines_on() -> None:
    given: dict[str, Any] = {"transform": "spline", "bins": 5, "tail_bound": 2.0}
    for g in (lf.coupling_flow(4, **given), lf.image_flow(2, 4, **given), lf.autoregressive_flow(4, **given)):
        layer = g.bijections[0]
        assert (layer.bins, layer.tail_bound) == (5, 2.0)
        assert (layer.spline.bins, layer.spline.low, layer.spline.high) == (5, -2.0, 2.0)


def test_builders_refuse_options_of_other_transforms() -> None:
    spline: dict[str, Any] = {"transform": "spline"}
    calls: list[tuple[Callable[[], lf.Flow], str]] = [
        (
            lambda: lf.coupling_flow(4, order="scale_first", **spline),
            "order must be 'shift_first' for transform='sp",
        ),
        (
            lambda: lf.image_flow(2, 4, order="scale_first", **spline),
            "order must be 'shift_first' for transform='sp",
        ),
        (
            lambda: lf.autoregressive_flow(4, order="shift_first", **spline),
            "order must be 'scale_first' for transf",
        ),
        (lambda: lf.coupling_flow(4, scale_map="tanh", **spline), "scale_map must be None for transform='spline'"),
        (lambda: lf.coupling_flow(4, bins=5), "bins must be 8 for transform='affine'"),
        (lambda: lf.autoregressive_flow(4, tail_bound=2.0), "tail_bound must be 3.0 for transform='affine'"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_plan_names_what_runs() -> None:
    coupling = lf.coupling_flow(5, 2, transform="spline").to(DEVICE)
    masked = lf.autoregressive_flow(5, 1, transform="spline").to(DEVICE)
    x = torch.randn(3, 5, device=DEVICE)
    with lf.backend("triton"):
        parts = {
            choice.part: choice
            for choice in lf.plan(lf.Flow([*coupling.bijections, *masked.bijections]), x).choices
        }
        inverse = lf.plan(lf.Linearizer(lf.Flow([]), lf.Dense(5).to(DEVICE), masked), x).choices[-1]
    assert parts["g.0"].runs == "torch products, rq_spline"
    assert parts["g.2"].runs == inverse.runs == "torch products, rq_spline"
    assert "one pass" in parts["g.2"].why
    assert "5 steps" in inverse.why
    assert "no kernel joins" in inverse.why
    with lf.backend("reference"):
        assert lf.plan(masked, x).choices[-1].runs == "torch"


def test_the_op_refuses_a_spline_that_does_not_fit() -> None:
    g = _masked()
    weights, biases = g.conditioner.tensors()
    given: dict[str, Any] = {"activation": "silu", "spline": g.spline}
    masks, x = g.conditioner.masks, torch.randn(3, 5)
    with pytest.raises(ValueError, match="scale_map must be None where spline is given"):
        lf.ops.masked_autoregressive(x, masks, weights, biases, scale_map=lf.ScaleMap(), **given)
    given["spline"] = g.spline._replace(bins=7)
    with pytest.raises(ValueError, match="a spline of 7 bins needs 20 parameters per feature; the masks have 17"):
        lf.ops.masked_autoregressive(x, masks, weights, biases, scale_map=None, **given)


@pytest.mark.parametrize("make", [lf.coupling_flow, lf.autoregressive_flow])
def test_forward_mode_derivatives_are_those_of_reverse_mode(make: Callable[..., lf.Flow]) -> None:
    """Also beneath and above reverse mode, as in torch.func.hessian, and under vmap."""
    p = lf.Density(perturb(make(3, 2, (8,), transform="spline").double(), 0.3))
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacfwd(p.flow)(x), torch.func.jacrev(p.flow)(x), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.func.jacfwd(p)(x), torch.func.jacrev(p)(x), rtol=1e-9, atol=1e-11)

    torch.compiler.reset()
    jacobian = torch.compile(torch.func.jacfwd(p), backend="aot_eager")
    torch.testing.assert_close(jacobian(x), torch.func.jacrev(p)(x), rtol=1e-9, atol=1e-11)

    def of_row(row: Tensor) -> Tensor:
        return p(row[None])[0]

    found = torch.func.vmap(torch.func.hessian(of_row))(x)
    expected = torch.stack([torch.autograd.functional.hessian(of_row, row) for row in x])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
