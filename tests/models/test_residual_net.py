"""ResidualMLP: its formula and gradients, batch statistics, random numbers, contexts of one row, long batches."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf
from linfast import rows
from linfast.flows import reversible
from linfast.ops.residual_network import all_context_terms, context_terms, counted_at_once, residual_network
from tests.laws.zoo import perturb, relative
from tests.ops.budget import DEVICE

B, N_IN, N_OUT, HIDDEN = 7, 3, 5, 8
ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "silu": lambda x: x * torch.sigmoid(x), "tanh": torch.tanh, "gelu": F.gelu,
    "elu": lambda x: torch.where(x > 0, x, torch.expm1(x)),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no blocks": {"blocks": 0, "context_features": 4},
    "context": {"context_features": 4, "activation": "elu"},
    "time": {"time_features": 6, "activation": "gelu"},
    "both, batch norm": {"context_features": 2, "time_features": 4, "batch_norm": True, "activation": "silu"},
    "batch norm, dropout": {"batch_norm": True, "dropout": 0.4, "activation": "tanh", "blocks": 3},
}


def _net(**options: Any) -> lf.ResidualMLP:
    net = perturb(lf.ResidualMLP(N_IN, N_OUT, HIDDEN, zero_last=False, **options), 0.3).double()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return net  # type: ignore[return-value]


def _given(net: lf.ResidualMLP, batch: int = B, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    context = torch.randn(batch, net.context_features, dtype=dtype) if net.context_features else None
    return {"t": torch.rand(batch, dtype=dtype) if net.time_features else None, "context": context}


def _formula(net: lf.ResidualMLP, x: Tensor, t: Tensor | None, context: Tensor | None) -> Tensor:
    """The formula of the class's docstring, with every input joined; it updates the statistics."""
    activate, training = ACTIVATE[net.activation], net.training
    parts = [] if t is None else [net.embedding(t)]
    parts += [] if context is None else [context.expand(len(x), -1)]
    given = torch.cat(parts, 1) if parts else None
    h = F.linear(x if given is None else torch.cat([x, given], 1), net.first.weight, net.first.bias)
    for block in net.blocks:
        r = h
        for i, layer in enumerate(block.layers):
            if net.batch_norm:
                norm = block.norms[i]
                mean, var = (
                    (r.mean(0), r.var(0, correction=0)) if training else (norm.running_mean, norm.running_var)
                )
                if training:
                    norm.running_mean.lerp_(mean.detach(), norm.momentum)
                    norm.running_var.lerp_(r.detach().var(0), norm.momentum)
                r = (r - mean) / (var + 1e-3).sqrt() * norm.weight + norm.bias
            r = activate(r)
            r = F.dropout(r, net.dropout, training) if i else r
            r = r @ layer.weight.mT + layer.bias
        h = h + (r if given is None else r * torch.sigmoid(given @ block.gate.weight.mT + block.gate.bias))
    return h @ net.last.weight.mT + net.last.bias


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_and_its_gradients(kind: str, training: bool) -> None:
    net = _net(**KINDS[kind]).train(training)
    other, x, given = copy.deepcopy(net), torch.randn(B, N_IN).double(), _given(net)
    found = []
    for call, model in ((net, net), (lambda *a, **k: _formula(other, *a, **k), other)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in given.items()}
        y = call(leaf, **leaves)
        inputs = [leaf, *(v for v in leaves.values() if v is not None), *model.parameters()]
        gradients = torch.autograd.grad(y.sin().sum(), inputs)
        found.append([y, torch.rand(1), *gradients, *model.buffers()])
    for got, expected in zip(*found, strict=True):
        if got.is_floating_point() and got.ndim:
            assert relative(got, expected) < 1e-12 or (got - expected).abs().max() < 1e-13
    net.eval()
    with torch.no_grad():
        for transposed, strides in ((False, (N_OUT, 1)), (True, (1, B))):
            y = net(x, **given, transposed=transposed)
            assert relative(y, _formula(net, x, **given)) < 1e-13
            assert y.stride() == strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", [None, 4])
@pytest.mark.parametrize(("batch_norm", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_it_is_the_residual_network_of_nflows(
    dtype: torch.dtype, context: int | None, batch_norm: bool, dropout: float
) -> None:
    nets = pytest.importorskip("nflows.nn.nets")
    net = _net(context_features=context or 0, batch_norm=batch_norm, dropout=dropout, activation="elu").to(dtype)
    theirs = nets.ResidualNet(N_IN, N_OUT, HIDDEN, context, 2, F.elu, dropout, batch_norm).to(dtype)
    names = {
        "initial_layer": "first",
        "final_layer": "last",
        "linear_layers": "layers",
        "batch_norm_layers": "norms",
        "context_layer": "gate",
    }
    renamed = {".".join(names.get(p, p) for p in key.split(".")): key for key in theirs.state_dict()}
    state = {renamed[key]: value for key, value in net.state_dict().items()}
    theirs.load_state_dict(copy.deepcopy(state))
    x, c = torch.randn(B, N_IN, dtype=dtype), None if context is None else torch.randn(B, context, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for training in (True, False):
        for grad in (True, False):
            found = []
            for model in (net.train(training), theirs.train(training)):
                torch.manual_seed(5)
                with torch.set_grad_enabled(grad):
                    found.append((model(x, context=c), torch.rand(3)))
            assert relative(found[0][0], found[1][0]) < tolerance
            assert torch.equal(found[0][1], found[1][1])
    after = {renamed[key]: value for key, value in net.state_dict().items()}
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(after[key], value, rtol=tolerance, atol=tolerance, msg=key)
        assert "num_batches" not in key or value == 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_the_formula_its_gradients_and_statistics(kind: str, one_row: bool, training: bool) -> None:
    net = _net(**{**KINDS[kind], "dropout": 0.0}).float().to(DEVICE).train(training)
    x, given = torch.randn(20, N_IN, device=DEVICE), _given(net, 20, torch.float32)
    given = {k: None if v is None else v.to(DEVICE) for k, v in given.items()}
    if one_row and given["context"] is not None:
        given["context"] = given["context"][:1]
    found = []
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(net).to(dtype)
        cast = {k: None if v is None else v.to(dtype) for k, v in given.items()}
        with lf.backend("triton"):
            y = model(x.to(dtype), **cast) if dtype == torch.float32 else _formula(model, x.to(dtype), **cast)
            gradients = torch.autograd.grad(y.sin().sum(), [*model.parameters()])
        if dtype == torch.float32 and training:
            assert all(
                norm.num_batches_tracked == 1 for norm in model.modules() if isinstance(norm, nn.BatchNorm1d)
            )
        found.append([y, *gradients, *(b for b in model.buffers() if b.is_floating_point())])
    for got, expected in zip(*found, strict=True):  # the gradient of a bias before batch norm is 0 or rounding
        assert relative(got, expected) < 1e-4 or (got - expected).abs().max() < 1e-4
    unknown = _net(batch_norm=True, activation="relu").float().to(DEVICE)
    called: list[int] = []
    unknown.blocks[0].norms[0].register_forward_hook(lambda *_: called.append(1))
    with lf.backend("triton"):
        unknown(x)
    assert called == [1]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["context", "both, batch norm"])
def test_a_context_of_one_row_is_that_row_for_every_sample(kind: str, grad: bool) -> None:
    net = _net(**KINDS[kind]).eval()
    x, row = torch.randn(B, N_IN).double(), torch.randn(1, net.context_features).double()
    t = 0.3 if net.time_features else None
    with torch.set_grad_enabled(grad):
        expected = net(x, t, row.expand(B, -1).clone())
        for given in (row, row.expand(B, -1)):
            assert relative(net(x, t, given), expected) < 1e-13
    row.requires_grad_()
    (of_row,) = torch.autograd.grad(net(x, t, row).sin().sum(), row)
    expanded = row.expand(B, -1)
    (of_rows,) = torch.autograd.grad(net(x, t, expanded).sin().sum(), expanded)
    (expected,) = torch.autograd.grad(net(x, t, each := expanded.clone()).sin().sum(), each)
    assert relative(of_rows, expected) < 1e-12  # each row has its own
    assert relative(of_row[0], expected.sum(0)) < 1e-12


class _Products(TorchDispatchMode):
    """Records the rows of the products with a weight that has this many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            left, right = args[-2:]
            self.rows += [left.shape[0]] * (right.shape[0] == self.columns)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
def test_the_products_with_one_row_have_one_row(grad: bool) -> None:
    net, x = _net(context_features=17, blocks=4), torch.randn(B, N_IN).double()
    row = torch.randn(1, 17).double()
    for given in (row, row.expand(B, -1)):
        with torch.set_grad_enabled(grad), _Products(17) as seen:
            net(x, context=given)
        assert seen.rows == [1] * 5


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_terms_may_be_computed_before(few: bool, at_once: bool) -> None:
    net, x, c = _net(context_features=4), torch.randn(B, N_IN).double(), torch.randn(B, 4).double()
    for given in (c, c[:1]):
        with torch.no_grad():  # the network that is given the context of every sample
            expected = net(x, context=given.repeat(B // len(given), 1))
        for at_once in (False, True):
            (terms,) = (
                all_context_terms(given, [net.network()]) if at_once else [context_terms(given, net.network())]
            )
            kept = copy.deepcopy([terms.first.detach(), *(gate.detach() for gate in terms.gates)])
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    assert relative(residual_network(x, net.network(), terms=terms), expected) < 1e-13
            assert all(map(torch.equal, (terms.first, *terms.gates), kept))


FEW = rows._Sizes(bytes=64 * HIDDEN * 8, fewest=8)


@pytest.mark.parametrize(
    ("options", "training", "expected"),
    [
        ({}, True, 64),
        ({"context_features": 4, "batch_norm": True, "dropout": 0.5}, False, 64),
        ({"batch_norm": True}, True, 517),
        ({"dropout": 0.5}, True, 517),
    ],
    ids=["plain", "eval", "batch norm", "dropout"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_long_batches_are_cut_where_rows_are_independent(
    options: dict[str, Any], training: bool, expected: int, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _net(**options).train(training)
    x, given = torch.randn(517, N_IN).double(), _given(net, 517)
    found = []
    for sizes in (rows._SIZES, FEW):
        monkeypatch.setattr(rows, "_SIZES", sizes)
        for transposed in (False, True):
            torch.manual_seed(1)
            with torch.set_grad_enabled(grad), _Products(HIDDEN) as seen:
                y = net(x, **given, transposed=transposed)
            assert y.stride() == ((1, 517) if transposed else (N_OUT, 1))
            assert sizes is not FEW or max(seen.rows) == expected
            found.append(y)
    for y in found[1:]:
        assert relative(y, found[0]) < 1e-12


def test_inputs_are_not_written_to() -> None:
    net = _net(context_features=4, activation="relu").eval()
    x, c = torch.randn(B, N_IN).double(), torch.randn(B, 4).double()
    before = x.clone(), c.clone(), copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net(x, context=c)
    assert torch.equal(x, before[0])
    assert torch.equal(c, before[1])
    assert all(torch.equal(v, before[2][k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("every_module", [False, True], ids=["of the norm", "of every module"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_hook_runs_and_what_it_keeps_is_not_overwritten(grad: bool, backend: str, every_module: bool) -> None:
    net = _net(batch_norm=True, activation="relu").float().to(DEVICE)
    x, norm, kept, gradients = torch.randn(B, N_IN, device=DEVICE), net.blocks[1].norms[0], [], []

    def keep(module: nn.Module, given: Any, y: Tensor) -> None:
        if module is norm:
            kept.extend((t, t.detach().clone()) for t in (*given, y))

    def keep_gradient(module: nn.Module, _: Any, given: Any) -> None:
        gradients.extend(given if module is norm else ())

    if every_module:
        handles = [
            nn.modules.module.register_module_forward_hook(keep),
            nn.modules.module.register_module_full_backward_hook(keep_gradient),
        ]
    else:
        handles = [norm.register_forward_hook(keep), norm.register_full_backward_hook(keep_gradient)]
    try:
        with lf.backend(backend), torch.set_grad_enabled(grad):
            y = net(x)
            if grad:
                y.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept) == 2
    assert all(torch.equal(tensor, before) for tensor, before in kept)
    assert len(gradients) == grad


def test_copies_files_and_a_model_without_values(tmp_path: Path) -> None:
    net = _net(**KINDS["both, batch norm"]).eval()
    x, given = torch.randn(B, N_IN).double(), _given(net)
    expected = net(x, **given)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x, **given), expected)
    moved = (N_IN + 1) // 2
    flow = lf.Flow([lf.AffineCoupling(_net_for(moved, batch_norm=True, dropout=0.1), N_IN)]).double().eval()
    perturb(flow, 0.2)
    lf.save(flow, tmp_path / "flow.safetensors")
    assert torch.equal(lf.load(tmp_path / "flow.safetensors").eval()(x), flow(x))
    with torch.device("meta"):
        assert lf.ResidualMLP(N_IN, N_OUT)(torch.randn(B, N_IN)).shape == (B, N_OUT)


def _net_for(moved: int, **options: Any) -> lf.ResidualMLP:
    return lf.ResidualMLP(N_IN - moved, 2 * moved, HIDDEN, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    net = _net(**KINDS["context"]).to(dtype).eval()
    wide = copy.deepcopy(net).double()
    x, c = torch.randn(B, N_IN).to(dtype), torch.randn(B, 4).to(dtype)
    truth, eps = wide(x.double(), context=c.double()), torch.finfo(dtype).eps
    assert relative(net(x, context=c), truth) < 8 * eps
    single = copy.deepcopy(net).float()
    for grad in (True, False):
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
            y = single(x.float(), context=c.float())
        assert y.dtype == dtype
        assert relative(y, truth) < 8 * eps


@pytest.mark.parametrize("kind", ["context", "batch norm, dropout"])
def test_torch_compile_and_transforms(kind: str) -> None:
    net = _net(**KINDS[kind]).eval()
    x, given = torch.randn(B, N_IN).double(), _given(net)
    torch.compiler.reset()
    assert relative(torch.compile(net, backend="aot_eager", fullgraph=True)(x, **given), net(x, **given)) < 1e-13
    context = given["context"]

    def one(row: Tensor) -> Tensor:
        return net(row[None], context=None if context is None else context[:1])[0]

    expected = torch.autograd.functional.jacobian(one, x[0])
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert relative(transform(one)(x[0]), expected) < 1e-12
    with torch.no_grad():
        assert relative(torch.vmap(one)(x)[0], one(x[0])) < 1e-12
        if context is not None:  # only the context is mapped over
            many = torch.vmap(lambda row: net(x[:1], context=row[None])[0])(context)
            assert relative(many[1], net(x[:1], context=context[1:2])[0]) < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_kernels_are_compiled_whole(training: bool) -> None:
    net, x = _net(batch_norm=True, context_features=4).float().train(training), torch.randn(B, N_IN)
    given, again = _given(net, dtype=torch.float32), copy.deepcopy(net)
    torch.compiler.reset()
    with lf.backend("triton"):
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)(x, **given)
        eager = again(x, **given)
    for a, b in zip((compiled, *net.buffers()), (eager, *again.buffers()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_norms_whose_batches_are_not_counted() -> None:
    net = _net(batch_norm=True).float()
    net.blocks[0].norms[0].num_batches_tracked = None
    before = net.blocks[0].norms[0].running_mean.clone()
    with lf.backend("triton"):
        net(torch.randn(B, N_IN))
    assert not torch.equal(net.blocks[0].norms[0].running_mean, before)
    assert net.blocks[0].norms[1].num_batches_tracked == 1


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_step_that_is_undone_by_running_again_runs_by_the_same_kernels(precision: str, monkeypatch) -> None:
    """Without gradients a network is one launch, whose sums are others in "high"."""
    flow = lf.Flow([lf.AffineCoupling(_net_for(2 - i % 2), N_IN, ("first", "second")[i % 2]) for i in range(4)])
    perturb(flow, 0.2)
    flow.memory = "invert"
    monkeypatch.setattr("linfast.flows.drift.DriftGuard.strayed", lambda *_: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with lf.backend("triton"):
            flow(torch.randn(B, N_IN, requires_grad=True)).square().sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("options", [{"batch_norm": True}, {"batch_norm": True, "dropout": 0.3}])
def test_rebuilt_activations_give_the_gradients_of_stored_ones(options: dict[str, Any]) -> None:
    flow = lf.Flow([lf.AffineCoupling(_net_for(2 - i, **options), N_IN, ("first", "second")[i]) for i in (0, 1)])
    perturb(flow, 0.2).double()
    x, found = torch.randn(B, N_IN).double(), []
    for mode in ("store", "invert"):
        model = copy.deepcopy(flow)
        model.memory = mode
        torch.manual_seed(0)
        y, log_det = model.forward_and_log_det(x)
        gradients = torch.autograd.grad(y.sin().sum() + log_det.sum(), [*model.parameters()])
        found.append([y, log_det, *gradients, *(b for b in model.buffers() if b.is_floating_point())])
    for stored, rebuilt in zip(*found, strict=True):
        torch.testing.assert_close(rebuilt, stored, rtol=1e-10, atol=1e-12)


def test_batches_of_none_and_of_one() -> None:
    for options in ({}, {"context_features": 4}, {"batch_norm": True}):
        net = _net(**options).eval()
        for batch in (0, 1):
            for transposed in (False, True):
                y = net(torch.ones(batch, N_IN).double(), **_given(net, batch), transposed=transposed)
                assert y.shape == (batch, N_OUT)
    assert _net(context_features=4)(torch.ones(0, N_IN).double(), context=torch.ones(1, 4).double()).shape[0] == 0
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        _net(batch_norm=True)(torch.ones(1, N_IN).double())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [False, True])
def test_a_captured_graph_with_dropout_stores(
    training: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = lf.Flow([lf.AffineCoupling(_net_for(2, dropout=dropout), N_IN)], memory="invert").train(training)
    monkeypatch.setattr(reversible, "capturing", lambda _: True)  # a replay draws other numbers than the capture
    made_by = flow(torch.randn(B, N_IN)).grad_fn
    assert ("_Link" in type(made_by).__name__) == (not (training and dropout))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_samples_leave_the_statistics_of_batch_norm_as_torch_does(backend: str) -> None:
    net = _net(batch_norm=True).float().to(DEVICE)
    before = {k: v.clone() for k, v in net.named_buffers() if v.is_floating_point()}
    with lf.backend(backend):
        assert net(torch.ones(0, N_IN, device=DEVICE)).shape == (0, N_OUT)
    after = dict(net.named_buffers())
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(v == 1 for k, v in after.items() if "num_batches" in k)


@pytest.mark.parametrize("together", [False, True])
def test_a_norm_that_runs_twice_is_counted_twice(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is in two networks, that are counted at once; a list of one call holds a tensor once."""
    nets = [_net(batch_norm=True).float().to(DEVICE) for _ in range(2)]
    shared = nets[0].blocks[0].norms[0]
    nets[0].blocks[1].norms[0] = nets[1].blocks[1].norms[1] = shared
    expected = copy.deepcopy(nets)
    x, lerp = torch.randn(20, N_IN, device=DEVICE), torch._foreach_lerp_

    def checked(tensors: list[Tensor], *rest: Any) -> None:
        assert len({t.data_ptr() for t in tensors}) == len(tensors)
        lerp(tensors, *rest)

    monkeypatch.setattr(torch, "_foreach_lerp_", checked)
    with lf.backend("triton"), counted_at_once() if together else contextlib.nullcontext():
        for net in nets:
            net(x)
        assert shared.num_batches_tracked == (0 if together else 3)
    with lf.backend("reference"):
        for net in expected:
            net(x)
    assert shared.num_batches_tracked == 3
    torch.testing.assert_close(
        [*nets[0].buffers(), *nets[1].buffers()], [*expected[0].buffers(), *expected[1].buffers()]
    )


def test_a_new_network_is_zero_and_its_blocks_are_nearly_the_identity() -> None:
    x, net = torch.randn(B, N_IN), lf.ResidualMLP(N_IN, N_OUT, 32, 4)
    assert not net(x).any()
    nn.init.eye_(net.last.weight)
    assert relative(net(x), net.last(net.first(x))) < 0.1


class _Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer, "__class__", _Shifted),
        lambda layer: setattr(layer, "forward", lambda x: x + 1),
    ],
    ids=["pruned", "forward hook", "backward hook", "backward pre hook", "subclass", "instance"],
)
def test_a_layer_whose_hook_or_forward_would_not_run_is_refused(change: Callable[[nn.Linear], object]) -> None:
    net, masked = lf.ResidualMLP(N_IN, N_OUT), lf.MaskedMLP(N_IN, 2, (HIDDEN,))
    change(net.blocks[1].layers[0])
    change(masked.layers[1])
    message = "must be an nn.Linear without hooks and without a forward of its own"
    with pytest.raises(ValueError, match=rf"ResidualMLP: blocks\[1\].layers\[0\] {message}"):
        net(torch.ones(B, N_IN))
    with pytest.raises(ValueError, match=rf"MaskedMLP: layers\[1\] {message}"):
        masked(torch.ones(B, N_IN))


def test_a_parametrized_layer_is_used() -> None:
    net, x = _net(), torch.randn(B, N_IN).double()
    doubled = copy.deepcopy(net)
    with torch.no_grad():
        doubled.blocks[0].layers[1].weight.mul_(2)
    parametrize.register_parametrization(net.blocks[0].layers[1], "weight", _Double())
    assert relative(net(x), doubled(x)) < 1e-13


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lf.ResidualMLP(3, 4, activation="sine"), "activation must be one of relu, silu, tanh, gelu, elu"),
        (lambda: lf.ResidualMLP(3, 4, dropout=1.0), "dropout must be"),
        (lambda: lf.ResidualMLP(3, 4, blocks=-1), "blocks must be at least 0"),
        (lambda: lf.ResidualMLP(3, 4)(torch.ones(2, 4)), r"x must be \[B, 3\]; got \(2, 4\)"),
        (lambda: lf.ResidualMLP(3, 4)(torch.ones(2, 3).double()), "x is torch.float64 and the parameters are"),
        (lambda: _conditional(torch.ones(3, 2)), r"context must be \[4, 2\] or \[1, 2\] .*got \(3, 2\)"),
        (lambda: _conditional(torch.ones(2)), r"context must be \[4, 2\] or \[1, 2\] .*got \(2,\)"),
        (lambda: _conditional(torch.ones(1, 3)), r"context must be \[4, 2\] or \[1, 2\] .*got \(1, 3\)"),
        (lambda: _with_norm(nn.Identity()), r"blocks\[1\].norms\[0\] must be a BatchNorm1d .*got"),
        (lambda: _with_norm(nn.LayerNorm(8)), r"blocks\[1\].norms\[0\] must be a BatchNorm1d .*got"),
        (lambda: _conditional(None), "ResidualMLP has context_features=2; got context=None"),
    ],
)
def test_bad_input_gets_a_clear_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def _conditional(context: Tensor | None) -> Tensor:
    return lf.ResidualMLP(3, 4, context_features=2)(torch.ones(4, 3), context=context)


def _with_norm(norm: nn.Module) -> Tensor:
    net = _net(batch_norm=True)
    net.blocks[1].norms[0] = norm
    return net(torch.ones(B, N_IN).double())
