"""Chains of spline couplings run as a whole: every order of their members, later changes, copies, and restore."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linfast as lf
from linfast.accelerate.fused import Fused
from linfast.accelerate.spline_chain import SplineChain

from .zoo import redraw, require

D, CONTEXT, BATCH = 6, 3, 7


def _spline(mask: str = "alternate", context: int | None = CONTEXT, **net) -> nn.Module:
    transforms, nets = require("nflows.transforms"), require("nflows.nn.nets")
    of = {"alternate": [1, 0] * 3, "halves": [0, 0, 0, 1, 1, 1], "gather": [1, 1, 0, 1, 0, 1]}[mask]
    return transforms.PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor(of), lambda i, o: nets.ResidualNet(i, o, 8, context, **net), 4, "linear", 3.0,
        apply_unconditional_transform=mask == "halves",
    )  # fmt: skip


def _lu(**options) -> nn.Module:
    return require("nflows.transforms").LULinear(D, identity_init=False, **options)


def _permutation() -> nn.Module:
    return require("nflows.transforms").RandomPermutation(D)


_CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "dingo": lambda: [
        _permutation(), _lu(), _spline("gather", use_batch_norm=True, activation=F.elu), _permutation(), _lu(),
        _spline(use_batch_norm=True, activation=F.elu), _permutation(), _lu(),
    ],
    "no map": lambda: [_spline("halves"), _spline("gather"), _spline()],
    "permutations alone": lambda: [_permutation(), _spline("gather"), _permutation(), _permutation(), _spline()],
    "a chain inside": lambda: [
        require("nflows.transforms").CompositeTransform([_permutation(), _lu()]), _spline("gather"), _spline(),
    ],
    "maps in a row": lambda: [_lu(), _permutation(), _lu(), _spline("gather"), _lu(), _permutation(), _spline()],
    "another member": lambda: [
        _lu(), require("nflows.transforms").PointwiseAffineTransform(0.5, 2.0), _spline(), _permutation(),
        require("nflows.transforms").HouseholderSequence(D, 2), _permutation(), _spline("gather"),
    ],
    "a cached map": lambda: [_lu(using_cache=True), _spline(), _lu(), _spline()],
}  # fmt: skip


def _model(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = require("nflows.transforms").CompositeTransform(_CHAINS[name]())
    redraw(model, model.state_dict(), 0)
    return model


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """A cached map's inverse, in the library, is of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _outputs(model: nn.Module, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of both directions, with all gradients, and the buffers after it."""
    generator = torch.Generator().manual_seed(3)
    x, c = (torch.randn(BATCH, n, generator=generator).to(dtype).requires_grad_() for n in (D, CONTEXT))
    found = [*model(x, c)] + ([*model.inverse(x, c)] if dtype == torch.float64 else [])
    total = sum((t * torch.arange(t.numel()).view(t.shape).cos()).sum() for t in found)
    return [*found, *torch.autograd.grad(total, [x, c, *model.parameters()]), *(b.clone() for b in model.buffers())]


def _is_close(found: list[Tensor], wanted: list[Tensor], least: float) -> bool:
    largest = max(float(t.double().norm()) for t in wanted)
    return all(
        float((a.double() - b.double()).norm()) <= least * max(float(b.double().norm()), 1e-2 * largest)
        for a, b in zip(found, wanted, strict=True)
    )


def _runs_whole(model: nn.Module) -> bool:
    with mock.patch.object(SplineChain, "__call__", side_effect=SplineChain.__call__, autospec=True) as seen:
        model(torch.randn(BATCH, D), torch.randn(BATCH, CONTEXT))
    return seen.called


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", _CHAINS)
def test_outputs_and_gradients_are_the_librarys(name: str, training: bool) -> None:
    model = _model(name).train(training)
    original = copy.deepcopy(model)
    lf.accelerate(model)
    assert _is_close(_outputs(model), _outputs(original), 1e-12)
    assert _runs_whole(model)
    copied = copy.deepcopy(model.train().train(training))  # which empties a map's cache
    again = copy.deepcopy(copied)
    assert _is_close(_outputs(copied), _outputs(again), 0.0)
    assert _runs_whole(copied)
    lf.restore(model)
    assert not _runs_whole(model)


@pytest.mark.parametrize("name", ["dingo", "no map"])
def test_in_float32_the_error_is_the_librarys(name: str) -> None:
    model = _model(name).float()
    exact, original = copy.deepcopy(model).double(), copy.deepcopy(model)
    lf.accelerate(model)
    wanted = _outputs(exact)[:2]
    assert _is_close(_outputs(model, torch.float32)[:2], wanted, 2e-6)
    assert _is_close(_outputs(original, torch.float32)[:2], wanted, 2e-6)


def test_a_training_step_by_kernels_counts_its_batches_as_the_library() -> None:
    """Also the networks that ran before an error."""
    model = _model("dingo").float().train()
    original = copy.deepcopy(model)
    lf.accelerate(model)
    x, c = torch.randn(BATCH, D, dtype=torch.float32), torch.randn(BATCH, CONTEXT, dtype=torch.float32)
    for fails in (False, True):
        for each in (model, original):
            last = each._transforms[5].transform_net.final_layer
            with lf.backend("triton"), contextlib.ExitStack() as stack:
                if fails:
                    last.weight.data = last.weight.data[:, :-1]
                    stack.enter_context(pytest.raises(RuntimeError))
                each(x, c)
        assert _is_close([*model.buffers()], [*original.buffers()], 1e-5)
    counts = [b.item() for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {2}


_CHANGES: dict[str, tuple[Callable[[nn.Module], object], bool]] = {  # and whether the chain then still runs whole
    "a permutation's values": (lambda m: m._transforms[0]._permutation.copy_(torch.arange(D).flip(0)), True),
    "a map's entries": (lambda m: m._transforms[1].lower_entries.data.mul_(2), True),
    "a conditioner": (
        lambda m: setattr(m._transforms[2], "transform_net", _spline("gather").transform_net), True,
    ),
    "a bound": (lambda m: setattr(m._transforms[2], "tail_bound", 2.0), True),
    "the eps of a map": (lambda m: setattr(m._transforms[1], "eps", 0.1), False),
    "a member": (lambda m: m._transforms.append(_lu()), True),
    "the mode": (lambda m: m.eval(), True),
    "a hook": (lambda m: m._transforms[2].transform_net.register_forward_hook(lambda *_: None), False),
}  # fmt: skip


@pytest.mark.parametrize("change", _CHANGES)
def test_later_changes_are_followed(change: str) -> None:
    model = _model("dingo")
    lf.accelerate(model)
    assert _runs_whole(model), "before the change"
    original = copy.deepcopy(model)
    lf.restore(original)
    run, whole = _CHANGES[change]
    torch.manual_seed(4)
    with torch.no_grad():
        run(model)
    torch.manual_seed(4)
    with torch.no_grad():
        run(original)
    assert _is_close(_outputs(model), _outputs(original), 1e-12)
    assert _runs_whole(model) == whole


def test_a_context_of_one_row_expanded_is_multiplied_once() -> None:
    model = _model("no map")
    original = copy.deepcopy(model)
    lf.accelerate(model)
    x, c = torch.randn(2000, D), torch.randn(1, CONTEXT).expand(2000, -1)
    with torch.no_grad():
        assert _is_close([*model(x, c)], [*original(x, c)], 1e-12)
        assert _is_close([*model.inverse(x, c)], [*original.inverse(x, c)], 1e-12)


def test_a_long_batch_in_parts_is_the_whole_one() -> None:
    model = _model("maps in a row")
    original = copy.deepcopy(model)
    lf.accelerate(model)
    x, c = torch.randn(6000, D), torch.randn(6000, CONTEXT)
    assert _is_close([*model(x, c)], [*original(x, c)], 1e-12)


def test_changes_of_a_chain_inside_are_followed() -> None:
    model = _model("a chain inside")
    lf.accelerate(model)
    inside = model._transforms[0]
    assert _runs_whole(model)
    inside._transforms.append(_lu())
    original = copy.deepcopy(model)
    lf.restore(original)
    assert _is_close(_outputs(model), _outputs(original), 1e-12)
    assert _runs_whole(model)
    called: list[nn.Module] = []
    inside.register_forward_hook(lambda module, *_: called.append(module))
    assert not _runs_whole(model)
    assert called == [inside]


def _nested(kind: str) -> nn.Module:
    """Two chains inside a chain, of spline couplings, or of affine ones with MLPs."""
    transforms = require("nflows.transforms")
    couplings = [_spline(mask, None) for mask in ("alternate", "gather")]
    if kind == "affine":
        make = transforms.AffineCouplingTransform
        couplings = [make(torch.tensor([i, 1 - i] * 3), lambda i, o: _MLP(i, o)) for i in (0, 1)]
    halves = [[_permutation(), couplings[0]], [_lu(), couplings[1]]]
    torch.manual_seed(1)
    model = transforms.CompositeTransform([transforms.CompositeTransform(half) for half in halves])
    redraw(model, model.state_dict(), 0)
    return model


class _MLP(nn.Module):
    def __init__(self, n_in: int, n_out: int, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, n_out))

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return self.net(x)


def _of_nested(model: nn.Module) -> nn.Module:
    return model._transforms[0]


_NESTED_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a hook": lambda m: m.register_forward_hook(lambda module, given, found: (found[0] * 2, found[1])),
    "its forward": lambda m: setattr(m, "forward", lambda x, context=None: (x * 2, x[:, 0])),
    "a member replaced": lambda m: m._transforms.__setitem__(0, require("nflows.transforms").ReversePermutation(D)),
    "a member appended": lambda m: m._transforms.append(require("nflows.transforms").ReversePermutation(D)),
}


@pytest.mark.parametrize("first", [True, False], ids=["before accelerate", "after it"])
@pytest.mark.parametrize("change", _NESTED_CHANGES)
@pytest.mark.parametrize("kind", ["spline", "affine"])
def test_changes_of_a_nested_chain_are_followed(kind: str, change: str, first: bool) -> None:
    model = _nested(kind)
    original, x = copy.deepcopy(model), torch.randn(128, D)
    if first:
        _NESTED_CHANGES[change](_of_nested(model))
    report = lf.accelerate(model)
    assert report.swapped
    assert _is_close([*model(x)], [*original(x)], 1e-12) != first
    if not first:
        _NESTED_CHANGES[change](_of_nested(model))
    _NESTED_CHANGES[change](_of_nested(original))
    assert _is_close([*model(x)], [*original(x)], 1e-12)


@pytest.mark.parametrize("kind", ["spline", "affine"])
def test_an_actnorm_is_initialised_on_a_whole_long_batch(kind: str) -> None:
    transforms = require("nflows.transforms")
    couplings = [_spline(mask, None) for mask in ("alternate", "gather")]
    if kind == "affine":
        make = transforms.AffineCouplingTransform
        couplings = [make(torch.tensor([i, 1 - i] * 3), lambda i, o: _MLP(i, o, 512)) for i in (0, 1)]
    model = transforms.CompositeTransform([couplings[0], transforms.ActNorm(D), couplings[1]])
    x = torch.randn(6000, D) * torch.linspace(0, 3, 6000)[:, None]
    original = copy.deepcopy(model)
    lf.accelerate(model)
    for each in (model, original):
        each(x)
    assert original._transforms[1].initialized
    assert _is_close([*model.state_dict().values()], [*original.state_dict().values()], 1e-12)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["spline", "affine"])
def test_another_dtype_later_runs_whole_too(kind: str, assign: bool) -> None:
    model = _nested(kind).float()
    wanted = copy.deepcopy(model).double()
    lf.accelerate(model)
    if assign:
        model.load_state_dict(wanted.state_dict(), assign=True)
    else:
        model.double()
    x = torch.randn(128, D)
    runs = SplineChain if kind == "spline" else Fused
    with mock.patch.object(runs, "__call__", side_effect=runs.__call__, autospec=True) as seen:
        found = model(x)
    assert seen.called
    assert _is_close([*found], [*wanted(x)], 1e-12)


def test_a_chain_of_normflows_runs_whole() -> None:
    """Of couplings that take no context, in a class that gives none."""
    nf, parts = require("normflows"), require("normflows.flows.neural_spline.coupling")
    nets, make = require("normflows.nets"), parts.PiecewiseRationalQuadraticCoupling
    torch.manual_seed(1)
    flows = [
        make(torch.tensor([i, 1 - i] * 3), lambda i, o: nets.ResidualNet(i, o, 8), 4, "linear", 3.0) for i in (0, 1)
    ]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(D), flows)
    redraw(model, model.state_dict(), 0)
    original, x = copy.deepcopy(model), torch.randn(128, D)
    assert "in one loop" in str(lf.accelerate(model))
    for method in ("forward_and_log_det", "inverse_and_log_det"):
        assert _is_close([*getattr(model, method)(x)], [*getattr(original, method)(x)], 1e-12)


def _doubled(self, x, *more, **named):
    return 2 * x, x[:, 0]


_PATCHES = {
    "CDF forward": ("nonlinearities.PiecewiseRationalQuadraticCDF", "forward", _doubled),
    "CDF inverse": ("nonlinearities.PiecewiseRationalQuadraticCDF", "inverse", _doubled),
    "CDF spline": ("nonlinearities.PiecewiseRationalQuadraticCDF", "_spline", _doubled),
    "coupling": (
        "coupling.PiecewiseRationalQuadraticCouplingTransform", "_piecewise_cdf",
        lambda s, x, p, inverse=False: (2 * x, x),
    ),
    "LU factors": ("lu.LULinear", "_create_lower_upper", lambda s: (torch.eye(D), 2 * torch.eye(D))),
    "LU forward": ("lu.LULinear", "forward_no_cache", _doubled),
    "LU inverse": ("lu.LULinear", "inverse_no_cache", _doubled),
    "LU diagonal": ("lu.LULinear", "upper_diag", property(lambda s: 1 + s.unconstrained_upper_diag**2)),
    "LU log_det": ("lu.LULinear", "logabsdet", lambda s: s.bias.sum()),
}  # fmt: skip


@pytest.mark.parametrize("patch", _PATCHES)
@pytest.mark.parametrize("alone", [True, False])
def test_methods_replaced_on_a_class_are_followed(patch: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    transforms = require("nflows.transforms")
    torch.manual_seed(1)
    members = [_lu(), _spline("halves", None), _lu(), _spline("halves", None)]
    model = members[1] if alone else transforms.CompositeTransform(members)
    redraw(model, model.state_dict(), 0)
    original, x = copy.deepcopy(model), torch.randn(512, D)
    lf.accelerate(model)
    for each in (model, original):
        each(x)
    where, method, other = _PATCHES[patch]
    module, _, cls = where.partition(".")
    monkeypatch.setattr(getattr(require(f"nflows.transforms.{module}"), cls), method, other)
    for each in (lambda m: m(x), lambda m: m.inverse(x)):
        assert _is_close([*each(model)], [*each(original)], 1e-12)


@pytest.mark.parametrize("kind", ["spline", "affine"])
@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_a_method_replaced_on_the_class_of_a_nested_chain_is_followed(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _nested(kind)
    original, x = copy.deepcopy(model), torch.randn(512, D)
    lf.accelerate(model)
    getattr(model, method)(x)
    cls = require("nflows.transforms").CompositeTransform
    before = getattr(cls, method)

    def tripled(self: nn.Module, x: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
        y, log_det = before(self, x, context)
        return 3 * y, log_det

    monkeypatch.setattr(cls, method, tripled)
    wanted = getattr(original, method)(x)
    assert not _is_close([wanted[0]], [before(original, x)[0]], 1e-12)
    assert _is_close([*getattr(model, method)(x)], [*wanted], 1e-12)


def test_a_map_of_another_dtype_fails_as_in_the_library() -> None:
    model = _model("maps in a row")
    original = copy.deepcopy(model)
    lf.accelerate(model)
    for each in (model, original):
        each._transforms[0].float()
        with pytest.raises(RuntimeError, match="dtype"):
            each(torch.randn(BATCH, D), torch.randn(BATCH, CONTEXT))


def test_the_tables_of_the_maps_are_made_whatever_the_default_device_is() -> None:
    original = _model("maps in a row")
    model, x, c = copy.deepcopy(original), torch.randn(BATCH, D), torch.randn(BATCH, CONTEXT)
    lf.accelerate(model)
    with torch.device("meta"):  # a stand-in for a GPU
        found = [*model(x, c), *model.inverse(x, c)]
    assert _is_close(found, [*original(x, c), *original.inverse(x, c)], 1e-12)


def test_another_transform_of_the_kept_features_is_followed() -> None:
    model = _spline("halves", None)
    original, x = copy.deepcopy(model), torch.randn(512, D)
    lf.accelerate(model)
    model(x)
    other = require("nflows.transforms").LULinear(D // 2, identity_init=False)
    for each in (model, original):
        each.unconditional_transform = other
    assert _is_close([*model(x)], [*original(x)], 1e-12)
