"""Whatever can be done with the original model can be done with the accelerated one."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate.sides import split_of
from linfast.accelerate.swap import Swapped
from tests.laws.zoo import relative
from tests.marks import long

from . import stand_in
from .zoo import FEATURES, KINDS, inputs, make, net, require, sweep

USED = {
    "FrEIA all in one",
    "FrEIA GLOWCouplingBlock ATAN",
    "glasflow MLP",
    "memcnn sigmoid",
    "nflows Affine MLP gather",
    "nflows spline of all features",
    "normflows additive",
    "normflows circular spline",
    "normflows masked gather",
    "zuko",
    "zuko random masks",
}


class Run(nn.Module):
    """A model and the way to run it, as one module."""

    def __init__(self, kind, model):
        super().__init__()
        self.kind, self.model = kind, model

    def forward(self, x, c):
        return tuple(self.kind.run(self.model, x, c))


def _pickled(run, x, c):
    text = pickle.dumps(run.model)
    assert b"linfast" not in text
    return Run(run.kind, pickle.loads(text))(x, c)


def _copied(run, x, c):
    copied = copy.deepcopy(run.model)
    assert any(isinstance(m, Swapped) for m in copied.modules()) == any(
        isinstance(m, Swapped) for m in run.model.modules()
    )
    return Run(run.kind, copied)(x, c)


def replica_of(model):
    """A replica as torch.nn.parallel.replicate makes it: its modules have no parameters, only tensors."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        replica._modules.update({name: None if m is None else copies[m] for name, m in module._modules.items()})
        for name, value in module._parameters.items():
            setattr(replica, name, None if value is None else value * 1.0)
    return copies[model]


def _replicated(run, x, c):
    return Run(run.kind, replica_of(run.model))(x, c)


def _by_function(run, x, c):
    moved = {name: 1.1 * p.detach() for name, p in run.named_parameters() if p.requires_grad}
    return torch.func.functional_call(run, moved, (x, c))


def _of_an_ensemble(run, x, c):
    stacked = {n: torch.stack((p, 1.1 * p)).detach() for n, p in run.named_parameters() if p.requires_grad}
    return torch.func.vmap(lambda p: torch.func.functional_call(run, p, (x, c)))(stacked)


def _row_by_row(run, x, c):
    return torch.func.vmap(lambda x, c: run(x[None], c[None]))(x.detach(), c.detach())


def _derivatives(run, x, c):
    return torch.func.jvp(lambda x: run(x, c), (x.detach(),), (torch.ones_like(x),))[1]


def _loaded(run, x, c):
    other = copy.deepcopy(run)
    other.load_state_dict({name: v.clone() for name, v in run.state_dict().items()}, assign=True)
    return other(x, c)


def _from_meta(run, x, c):
    other = copy.deepcopy(copy.deepcopy(run).to("meta"))
    other.load_state_dict(run.state_dict(), assign=True)
    return other(x, c)


def _traced(run, x, c):
    with torch.no_grad():
        traced = torch.jit.trace(run, (x[:3].detach(), c[:3].detach()), check_trace=False)
        return traced(x.detach(), c.detach())


def _exported(run, x, c, strict=False):
    batch = torch.export.Dim("batch", min=2, max=4096)
    with torch.no_grad():
        made = torch.export.export(
            run, (x[:3].detach(), c[:3].detach()), dynamic_shapes=({0: batch}, {0: batch}), strict=strict
        )
        return made.module()(x.detach(), c.detach())


def _compiled(run, x, c):
    torch._dynamo.reset()
    return torch.compile(run, backend="aot_eager", fullgraph=True)(x, c)


def _in_double(run, x, c):
    return copy.deepcopy(run).double()(x.double(), c.double())


def _of_no_rows(run, x, c):
    return run(x[:0], c[:0])


OPERATIONS = [
    _of_no_rows,
    _pickled,
    _copied,
    _replicated,
    _by_function,
    _of_an_ensemble,
    _row_by_row,
    _derivatives,
    _loaded,
    _from_meta,
    _traced,
    _exported,
    _in_double,
]


def _attempt(operation, run, x, c):
    """The result, or the error where the original may raise one."""
    torch.manual_seed(0)
    try:
        return operation(run, x, c)
    except Exception as error:
        return error


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("name", sweep(sorted(USED), USED))
def test_it_can_do_what_the_original_can(name, operation):
    kind = KINDS[name]
    original = Run(kind, make(kind, 0))
    fast = copy.deepcopy(original)
    x, c = inputs(kind, torch.float32)
    assert lf.accelerate(fast).swapped
    expected = _attempt(operation, original, x, c)
    if isinstance(expected, Exception):
        return  # the original cannot either
    for actual, value in zip(operation(fast, x, c), expected, strict=True):
        assert actual.shape == value.shape
        assert relative(actual, value) < 1e-4
    lf.restore(fast)
    assert not any(isinstance(m, Swapped) or "_linfast_plan" in vars(m) for m in fast.modules())
    assert [type(m) for m in fast.modules()] == [type(m) for m in original.modules()]


@pytest.mark.parametrize("name", ["zuko", *long("nflows Affine MLP gather")])
def test_strict_export_and_compilation(name):
    kind = KINDS[name]
    original = Run(kind, make(kind, 0))
    fast = copy.deepcopy(original)
    x, c = inputs(kind, torch.float32)
    lf.accelerate(fast)
    for operation in (lambda *given: _exported(*given, strict=True), _compiled):
        expected = _attempt(operation, original, x, c)
        if not isinstance(expected, Exception):
            for actual, value in zip(operation(fast, x, c), expected, strict=True):
                assert relative(actual, value) < 1e-4


def _zuko(context=3):
    flow = require("zuko").flows.RealNVP(FEATURES, context, transforms=2, hidden_features=(16,))
    lf.accelerate(flow)
    return flow


@pytest.mark.parametrize("context", [0, 3])
def test_what_zuko_gives_is_pickled_as_zukos_own(context):
    flow, x = _zuko(context), torch.randn(5, FEATURES)
    distribution = flow(torch.randn(3) if context else None)
    transform = distribution.transform
    for given in (transform, transform.inv, transform.transforms[0], transform.transforms[0].inv):
        text = pickle.dumps(given)
        assert b"linfast" not in text
        for actual, expected in zip(pickle.loads(text).call_and_ladj(x), given.call_and_ladj(x), strict=True):
            torch.testing.assert_close(actual, expected)
    file = io.BytesIO()
    torch.save(distribution, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False).log_prob(x), distribution.log_prob(x))
    assert type(pickle.loads(pickle.dumps(transform.transforms[0]))).__module__ == "zuko.transforms"


def test_a_process_without_linfast_loads_it(tmp_path):
    flow, x = _zuko(), torch.randn(5, FEATURES)
    distribution = flow(torch.randn(3))
    torch.save((flow, distribution, x, distribution.log_prob(x)), tmp_path / "flow.pt")
    code = (
        "import sys, torch; sys.modules['linfast'] = None;"
        f"_, d, x, expected = torch.load({str(tmp_path / 'flow.pt')!r}, weights_only=False);"
        "torch.testing.assert_close(d.log_prob(x), expected)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _grown(layer):
    nf = require("normflows")
    flows = [nf.flows.AffineCouplingBlock(nn.Sequential(layer(3, 16), nn.ReLU(), layer(16, 6))) for _ in range(2)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), flows)


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_a_lazy_model_is_reported_and_runs(memory):
    model = _grown(lambda n_in, n_out: nn.LazyLinear(n_out))
    report = lf.accelerate(model, memory=memory)
    assert not report.swapped
    assert "lazy modules" in str(report)
    model.forward_and_log_det(torch.randn(2, FEATURES))
    assert lf.accelerate(model, memory=memory).swapped


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_a_model_on_the_meta_device_is_reported(memory):
    model = _grown(nn.Linear)
    lf.accelerate(model, memory=memory)
    values, log_dets = copy.deepcopy(model).to("meta").forward_and_log_det(torch.randn(2, FEATURES, device="meta"))
    assert (values.shape, log_dets.shape) == ((2, FEATURES), (2,))
    report = lf.accelerate(model.to("meta"), memory=memory)
    assert not report.swapped
    assert "on the meta device" in str(report)


@pytest.mark.parametrize("name", ["FrEIA GLOWCouplingBlock ATAN", "nflows Affine MLP gather", "normflows additive"])
def test_a_replica_of_a_chain_that_inverts_has_its_gradients(name):
    kind = KINDS[name]
    model = make(kind, 0)
    lf.accelerate(model, memory="invert")
    x, c = inputs(kind, torch.float32)
    nets = [p for name, p in model.named_parameters() if p.requires_grad and "q0" not in name]
    found = []
    for run in (model, replica_of(model)):
        total = sum(value.square().sum() for value in kind.run(run, x, c))
        found.append(torch.autograd.grad(total, nets))
    for actual, expected in zip(*found, strict=True):
        assert relative(actual, expected) < 1e-3


def test_forward_derivatives_of_a_block_with_attention():
    block = stand_in.UNetBlock(8, 8, 4, attention=True).eval()
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)

    def derivatives():
        return torch.func.jvp(lambda x: block(x, emb), (x,), (torch.ones_like(x),))

    expected = derivatives()
    assert lf.accelerate(block).rows[0].swapped
    for actual, value in zip(derivatives(), expected, strict=True):
        assert relative(actual, value) < 1e-4


@pytest.mark.parametrize("attention", [False, True])
def test_second_derivatives_through_norm_and_silu(attention):
    """The weight is used twice: x was computed from it too."""
    torch.manual_seed(0)
    block = stand_in.UNetBlock(8, 8, 4, attention=attention).double().eval()
    x, emb = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 8, 4, 4), (2, 4)))
    x.requires_grad_()

    def second():
        out = block(block(x, emb), emb).square().sum()
        wanted = [x, *block.parameters()]
        once = [g for _ in range(2) for g in torch.autograd.grad(out, wanted, retain_graph=True)]
        gradients = torch.autograd.grad(out, wanted, create_graph=True)
        return [*once, *torch.autograd.grad(sum(g.square().sum() for g in gradients), wanted)]

    expected = second()
    assert lf.accelerate(block).rows[0].swapped
    for actual, value in zip(second(), expected, strict=True):
        assert relative(actual, value) < 1e-6


@pytest.mark.parametrize("x", [None, np.zeros((3, 4), np.float32), [[0.0] * 4]])
def test_what_is_no_tensor_is_a_type_error_of_zukos_flows_too(x: object) -> None:
    zuko = require("zuko")
    flow = zuko.flows.RealNVP(4, 0, transforms=2, hidden_features=(8,))
    with pytest.raises(TypeError):
        flow().log_prob(x)
    lf.accelerate(flow)
    with pytest.raises(TypeError, match="x must be a tensor"):
        flow().log_prob(x)


def test_no_rows_of_any_rank():
    """An empty batch, which each original accepts."""
    for context in (0, 3):
        flow, x = _zuko(context), torch.randn(3, 0, FEATURES)
        c = torch.randn(0, context) if context else None
        assert flow(c).transform(x).shape == x.shape
        assert flow(c).transform.inv.call_and_ladj(x)[1].shape == (3, 0)
    layer, block = stand_in.TimeDependentLoRALinearLayer(64, 2), stand_in.UNetBlock(8, 8, 4, attention=True)
    lf.accelerate(layer), lf.accelerate(block)
    assert layer(torch.randn(0, 1, 8, 8), t=torch.zeros(0)).shape == (0, 1, 8, 8)
    assert block(torch.randn(0, 8, 4, 4), torch.randn(0, 4)).shape == (0, 8, 4, 4)
    all_in_one = require("FrEIA.modules").AllInOneBlock([(4,)], subnet_constructor=net)
    lf.accelerate(all_in_one)
    (y,), log_det = all_in_one((torch.randn(0, 4),))
    assert (y.shape, log_det.shape) == ((0, 4), (0,))


class _Net(nn.Module):
    """A conditioner that computes in float32, whatever the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.net = net(n_in, n_out)

    def forward(self, x):
        return self.net(x.float())


def _blocks():
    flows, mask = require("normflows").flows, torch.tensor([1.0, 0.0, 1.0, 0.0])
    return {
        "masked": flows.MaskedAffineFlow(mask, net(4, 4), net(4, 4)),
        "masked additive": flows.MaskedAffineFlow(mask, net(4, 4)),
        "masked, its own dtype": flows.MaskedAffineFlow(mask, _Net(4, 4), _Net(4, 4)),
        "block": flows.AffineCouplingBlock(_Net(2, 4)),
        "Glow's block": flows.AffineCouplingBlock(_Net(2, 4), scale_map="sigmoid"),
        "additive block": flows.AffineCouplingBlock(_Net(2, 2), scale=False),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.int64])
@pytest.mark.parametrize("name", _blocks())
def test_inputs_of_other_dtypes_give_the_dtypes_and_values_of_the_original(name, dtype, autocast):
    torch.manual_seed(0)
    block = _blocks()[name]
    fast, x = copy.deepcopy(block), torch.randint(0, 2, (5, 4)).to(dtype)
    assert lf.accelerate(fast).swapped
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for way in ("forward", "inverse"):
            try:
                expected = getattr(block, way)(x)
            except RuntimeError:
                continue  # the original cannot either
            for actual, value in zip(getattr(fast, way)(x), expected, strict=True):
                assert actual.dtype == value.dtype
                assert (actual - value).abs().max() < (0.05 if autocast or dtype.itemsize == 2 else 1e-5)


class _First(nn.Module):
    """The output of a block whose input FrEIA wraps in a tuple."""

    def __init__(self, block, wrapped):
        super().__init__()
        self.block, self.wrapped = block, wrapped

    def forward(self, x):
        y = self.block((x,) if self.wrapped else x)
        y = y[0] if isinstance(y, tuple) else y
        return y[0] if self.wrapped else y


FREIA = ("GLOWCouplingBlock", "RNVPCouplingBlock", "NICECouplingBlock", "AffineCouplingOneSided")


@pytest.mark.parametrize("name", ["additive", "masked", *FREIA])
def test_torch_fx_traces_the_librarys_own_operations(name):
    if name == "additive":
        block = require("memcnn").AdditiveCoupling(net(2, 2), net(2, 2))
    elif name == "masked":
        block = _blocks()[name]
    else:
        block = getattr(require("FrEIA.modules"), name)([(4,)], subnet_constructor=net)
    model, x = _First(block, name in FREIA), torch.randn(3, 4)
    expected = torch.fx.symbolic_trace(model)(x)
    assert lf.accelerate(model).swapped
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["normflows exp channel", "normflows masked gather", "reference"])
def test_a_global_hook_sees_the_modules_that_it_saw(name):
    kind = KINDS[name]
    original, (x, c) = make(kind, 0), inputs(kind, torch.float32)
    fast = copy.deepcopy(original)
    assert lf.accelerate(fast).swapped

    def seen(model):
        names, paths = [], {id(module): path for path, module in model.named_modules()}
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(paths[id(module)]))
        try:
            kind.run(model, x, c)
            left = lf.accelerate(copy.deepcopy(model)).left
        finally:
            hook.remove()
        assert any("a global module hook is registered" in row.note for row in left)
        return names

    assert seen(fast) == seen(original)


@pytest.mark.parametrize("memory", ["store", "invert"])
@pytest.mark.parametrize("name", sweep(sorted(USED), USED))
def test_a_model_accelerated_in_inference_mode_is_trained_later(name, memory):
    kind = KINDS[name]
    model, (x, c) = make(kind, 0), inputs(kind, torch.float32)
    expected = [row.path for row in lf.accelerate(copy.deepcopy(model), memory=memory).swapped]
    with torch.inference_mode():
        assert [row.path for row in lf.accelerate(model, memory=memory).swapped] == expected
        kind.run(model, x, c)
    sum(value.sum() for value in kind.run(model, x, c)).backward()


def test_masks_that_are_copied_in_inference_mode_serve_training():
    split = split_of(torch.tensor([True, True, False, True]))
    with torch.inference_mode():
        split.parts(4, torch.device("meta"))
    x = torch.ones(2, 4, device="meta", requires_grad=True)
    assert x[:, split.parts(4, x.device)[0]].requires_grad
