"""Masked autoregressive transforms: what a parameter depends on, feature orders, freezing, memory, bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.flows import reversible as memory
from tests.kept import kept_bytes
from tests.laws.zoo import build, perturb, relative
from tests.ops.budget import DEVICE

ORDER = (3, 0, 4, 1, 2)


def _flow(features: int = 5, **options: object) -> lf.Flow:
    return perturb(lf.autoregressive_flow(features, 2, (16, 16), **options), 0.2).double()  # type: ignore[arg-type, return-value]


def _depends(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """[out, in]: where the Jacobian at the one row ``at`` is not zero."""
    return torch.autograd.functional.jacobian(lambda row: function(row[None])[0], at[0]) != 0


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_feature_depends_on_itself_and_all_features_before_it(residual: bool, inverse: bool) -> None:
    net = lf.MaskedMLP(5, 2, (16, 16), "silu", residual, feature_order=ORDER)
    g = perturb(lf.MaskedAutoregressive(net), 0.2).double()
    found = _depends(g.inverse if inverse else g, torch.randn(1, 5).double())
    assert torch.equal(found[list(ORDER)][:, list(ORDER)], torch.ones(5, 5).tril().bool())


def test_every_parameter_depends_on_all_features_before_it_and_on_the_context() -> None:
    net = perturb(lf.MaskedMLP(5, 3, (4,), "silu", context_features=2, feature_order=ORDER), 0.2).double()
    x, context = torch.randn(1, 5).double(), torch.randn(1, 2).double()
    of_x = _depends(lambda v: net(v, context=context), x).view(5, 3, 5)[list(ORDER)][..., list(ORDER)]
    few_units = torch.ones(5, 5).tril(-1).bool()
    few_units[4, 3] = False  # 4 units have degrees 0, 1, 2, 3: the last feature sees the first three
    assert torch.equal(of_x, few_units[:, None].expand(5, 3, 5))
    assert _depends(lambda c: net(x, context=c), context).all()


@pytest.mark.parametrize("features", [1, 2, 64])
def test_a_new_flow_is_the_identity(features: int) -> None:
    x = torch.randn(3, features)
    g = lf.autoregressive_flow(features, hidden=(8, 8), residual=True, feature_order="random")
    for y, log_det in (g.forward_and_log_det(x), g.inverse_and_log_det(x)):
        assert torch.equal(y, x)
        assert not log_det.any()


def test_layers_alternate_or_draw_their_orders() -> None:
    g = lf.autoregressive_flow(4, 3)
    forwards, backwards = [0, 1, 2, 3], [3, 2, 1, 0]
    orders = [layer.conditioner.feature_order.tolist() for layer in g.bijections]
    assert orders == [forwards, backwards, forwards]
    torch.manual_seed(0)
    drawn = [
        tuple(layer.conditioner.feature_order.tolist())
        for layer in lf.autoregressive_flow(8, 3, feature_order="random").bijections
    ]
    assert len(set(drawn)) == 3


def test_a_state_dict_carries_the_order() -> None:
    g, h = _flow(feature_order="random"), _flow(feature_order="random")
    h.load_state_dict(g.state_dict())
    x = torch.randn(3, 5).double()
    assert torch.equal(h(x), g(x))
    assert torch.equal(h.inverse(x), g.inverse(x))
    wrong = {key: torch.zeros_like(value) for key, value in g.state_dict().items()}
    with pytest.raises(ValueError, match="feature_order must hold 0 to 4 once each"):
        h.load_state_dict(wrong)


@pytest.mark.parametrize("assign", [False, True])
def test_built_without_values_and_filled(assign: bool) -> None:
    g = _flow(feature_order="random")
    with torch.device("meta"):
        h = lf.autoregressive_flow(5, 2, (16, 16)).double()
    assert h(torch.randn(3, 5, device="meta", dtype=torch.float64)).shape == (3, 5)
    if not assign:
        h.to_empty(device="cpu")
    h.load_state_dict(g.state_dict(), assign=assign)
    x = torch.randn(3, 5).double()
    assert torch.equal(torch.compile(h, backend="eager", fullgraph=True)(x), g(x))
    assert torch.equal(h.inverse(x), g.inverse(x))


def test_a_copy_shares_the_masks_and_no_weights() -> None:
    g = _flow()
    h = copy.deepcopy(g)
    assert h.bijections[0].conditioner.masks is g.bijections[0].conditioner.masks
    x = torch.randn(3, 5).double()
    expected = g.inverse(x)
    perturb(g)
    assert torch.equal(h.inverse(x), expected)


def test_frozen_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    g, x, packed = _flow(), torch.randn(3, 5).double(), []
    real = lf.ops.AutoregressiveMasks.pack
    monkeypatch.setattr(lf.ops.AutoregressiveMasks, "pack", lambda *given: packed.append(1) or real(*given))
    with torch.no_grad():
        expected = g.inverse(x)
        with lf.freeze(g):
            packed.clear()
            assert torch.equal(g.inverse(x), expected)
            assert torch.equal(g.inverse(x), expected)
            assert len(packed) == 2
        perturb(g)
        assert relative(g(g.inverse(x)), x) < 1e-12
    with lf.freeze(g):
        g.inverse(x).sum().backward()
    assert all(p.grad is not None for p in g.parameters())


@pytest.mark.parametrize("inverse", [False, True])
def test_rebuilt_activations_give_the_gradients_of_stored_ones(inverse: bool) -> None:
    g = _flow(3, context_features=2, residual=True)
    x, context = torch.randn(4, 3).double(), torch.randn(4, 2).double().requires_grad_()
    found = []
    for mode in ("store", "invert"):
        g.memory = mode
        leaf = x.clone().requires_grad_()
        y, log_det = (g.inverse_and_log_det if inverse else g.forward_and_log_det)(leaf, context=context)
        inputs = [leaf, context, *g.parameters()]
        found.append(torch.autograd.grad(y.square().sum() + log_det.sin().sum(), inputs))
    for stored, rebuilt in zip(*found, strict=True):
        assert relative(rebuilt, stored) < 1e-10


def test_auto_inverts_above_a_size_of_its_own_and_never_where_only_ends_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g, x = lf.autoregressive_flow(64, 4, (64, 64), "silu").double(), torch.randn(256, 64).double()

    def kept(mode: str) -> int:
        g.memory = mode
        return kept_bytes(lambda: g(x))

    stored, inverted = kept("store"), kept("invert")
    assert 0.5 < g._stored[0] * x.nbytes / stored < 2
    monkeypatch.setattr(memory, "AUTO_BYTES", 0)
    monkeypatch.setattr(memory, "AUTO_BYTES_WITH_WALKS", 2 * stored)
    assert kept("auto") == stored
    monkeypatch.setattr(memory, "AUTO_BYTES_WITH_WALKS", stored // 2)
    assert kept("auto") == inverted < stored / 4
    assert g._stored[1] == 4 * 4


def test_a_linearizer_with_such_a_g_is_linear_in_its_space() -> None:
    f = lf.Linearizer(_flow(), lf.Dense(5).double())
    x = torch.randn(7, 5).double()
    assert relative(f.g_y(f(x)), f.A(f.g_x(x))) < 1e-12
    with lf.freeze(f), torch.no_grad():
        assert relative(f(x), f(x)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    wide, shape = build("masked-residual")
    narrow = copy.deepcopy(wide).to(dtype)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(16, *shape).to(dtype)
    eps = torch.finfo(dtype).eps
    for method in ("forward_and_log_det", "inverse_and_log_det"):
        y, log_det = getattr(narrow, method)(x)
        truth, true_log_det = getattr(wide, method)(x.double())
        assert (y.dtype, log_det.dtype) == (dtype, torch.float32)
        assert relative(y, truth) < 4 * eps
        assert relative(log_det, true_log_det) < 16 * eps


def test_plan_names_what_runs() -> None:
    g, x = lf.autoregressive_flow(5, 2).to(DEVICE), torch.randn(3, 5, device=DEVICE)
    f = lf.Linearizer(lf.Flow([*g.bijections, lf.Mix(5).to(DEVICE)]), lf.Dense(5).to(DEVICE))
    with lf.backend("triton"):
        parts = {choice.part: choice for choice in lf.plan(f, x).choices}
    assert parts["g_x.0"].runs == parts["g_y.0"].runs == "masked_autoregressive"
    assert "one pass" in parts["g_x.0"].why
    assert "5 steps" in parts["g_y.0"].why
    with lf.backend("reference"):
        parts = {choice.part: choice for choice in lf.plan(g, x).choices}
    assert parts["g.1"].runs == "torch"
    assert "the backend is 'reference'; one pass" in parts["g.1"].why


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lf.MaskedMLP(3, hidden=()), "hidden must hold at least one width"),
        (lambda: lf.MaskedMLP(3, hidden=(4, 5), residual=True), "hidden must hold at least two equal widths"),
        (lambda: lf.MaskedMLP(3, feature_order=[0, 1, 1]), "feature_order must hold 0 to 2 once each"),
        (lambda: lf.MaskedAutoregressive(lf.MLP(3, 6)), "conditioner must be a MaskedMLP; got MLP"),
        (lambda: lf.MaskedAutoregressive(lf.MaskedMLP(3, 1)), "conditioner must have per_feature=2 .*; got 1"),
        (
            lambda: lf.MaskedAutoregressive(lf.MaskedMLP(3), None),
            "per_feature=1 for scale_map=None, bins=None; got 2",
        ),
        (lambda: _conditional()(torch.ones(2, 3)), "context_features=2; got context=None"),
        (lambda: _conditional()(torch.ones(2, 3), context=torch.ones(2, 3)), r"context must be \[2, 2\]"),
        (lambda: _conditional().inverse(torch.ones(2, 3), context=torch.ones(3, 2)), r"context must be \[2, 2\]"),
        (lambda: lf.MaskedMLP(3)(torch.ones(2, 4)), r"x must be \[B, 3\]"),
    ],
)
def test_bad_input_gets_a_clear_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def _conditional() -> lf.MaskedAutoregressive:
    return lf.MaskedAutoregressive(lf.MaskedMLP(3, context_features=2))


def test_the_order_follows_writes_to_its_buffer():
    flows = [_random(lf.autoregressive_flow(5, 3, (8, 8), feature_order="random")) for _ in range(2)]
    x = torch.randn(4, 5)
    with torch.no_grad():
        pairs = zip(*(flow.state_dict(keep_vars=True).values() for flow in flows), strict=True)
        for mine, other in pairs:
            mine.copy_(other)
        torch.testing.assert_close(flows[0](x), flows[1](x), rtol=0, atol=0)
        torch.testing.assert_close(flows[0].inverse(flows[1](x)), x)


def test_both_directions_read_the_same_network_under_autocast():
    g, x = _random(lf.MaskedAutoregressive(lf.MaskedMLP(5, hidden=(16, 16)))), torch.randn(9, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(g.inverse(g(x)), x)


def test_a_gradient_with_a_graph_is_finite_where_the_gradient_is():
    torch.manual_seed(59)  # a pass of the network from x = 0 overflows, the inverse does not
    g = _random(lf.MaskedAutoregressive(lf.MaskedMLP(3, hidden=(8, 8)), scale_map="exp"), 3.0).double()
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(g.inverse(y).sum(), y, create_graph=graph)[0] for graph in (False, True)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("strict", [False, True])
def test_exports_of_a_model_that_has_not_run(strict):
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = _random(lf.MaskedAutoregressive(lf.MaskedMLP(3, hidden=(8, 8))))

        def forward(self, z):
            return self.g.inverse(z)

    model, z = Sampler(), torch.randn(4, 3)
    with lf.backend("reference"):
        exported = torch.export.export(model, (z,), strict=strict).module()
        torch.testing.assert_close(exported(z), model(z))


def test_masks_pickle_without_their_copies_on_devices():
    g = lf.MaskedAutoregressive(lf.MaskedMLP(3, hidden=(8, 8)))
    g.inverse(torch.randn(2, 3))
    assert pickle.loads(pickle.dumps(g)).conditioner.masks._copies == {}


def _random(module, size=0.3):
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, size)
    return module


@pytest.mark.parametrize("kept", [0, 2])
def test_a_module_pickled_before_there_were_splines_runs(kept: int, tmp_path: Path) -> None:
    g, x = perturb(lf.autoregressive_flow(4, 2, (8,)), 0.3), torch.randn(5, 4)
    old = copy.deepcopy(g)
    for layer in old.bijections:
        for name in ("spline", "bins", "tail_bound", "tails", "min_width", "min_height", "min_derivative"):
            del vars(layer)[name]
    vars(old)["_stored"] = old._stored[:kept]
    if not kept:
        del old._stored
    old = pickle.loads(pickle.dumps(old))
    for backend in ("auto", "triton"):
        with lf.backend(backend):
            assert torch.equal(old.to(DEVICE)(x.to(DEVICE)), g.to(DEVICE)(x.to(DEVICE)))
    assert torch.equal(old.inverse(x.to(DEVICE)), g.inverse(x.to(DEVICE)))
    lf.save(old, tmp_path / "old.safetensors")
    assert repr(old) == repr(g)
