"""memory="invert" gives the same losses and gradients as storing, and keeps little memory."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.flows.drift import DriftWarning
from tests.kept import kept_bytes

from . import stand_in
from .test_libraries import assert_accurate, outputs, relative
from .zoo import KINDS, TRAINED, make, reference, sweep

CHAINS = [
    "reference",
    "nflows Affine alternate",
    "nflows Additive gather",
    "nflows image",
    "glasflow",
    "glasflow log2 lu",
    "nflows spline alternate",
    "nflows spline of all features",
    "glasflow NSF",
]
_STORED = (" soft", "spline")
CHAINS += [
    name for name in KINDS if name.startswith(("normflows", "FrEIA")) and not any(each in name for each in _STORED)
]


# Two blocks: the input of the first is rebuilt from the input of the second.
MODELS = {**KINDS, "reference": dataclasses.replace(KINDS["reference"], build=reference(2))}


def _rebuilt(report):
    return [row for row in report.swapped if row.runs.endswith("rebuilt in the backward")]


@pytest.fixture(autouse=True)
def drift_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        yield


@pytest.mark.parametrize("name", sweep(CHAINS))
def test_chains_give_the_same_results(name):
    kind = MODELS[name]
    model = make(kind, 0)
    before = outputs(kind, model, torch.float32)
    exact = outputs(kind, copy.deepcopy(model).double(), torch.float64)
    report = lf.accelerate(model, memory="invert")
    assert not report.left, str(report)
    assert len(_rebuilt(report)) == 1, str(report)
    assert_accurate(outputs(kind, model, torch.float32), exact, units=256)
    for a, truth in zip(outputs(kind, model.double(), torch.float64), exact, strict=True):
        # normflows sums its log-determinants in float32: one rounding per flow.
        assert relative(a, truth) <= (len(report.rows) * 2**-24 if kind.library == "normflows" else 1e-12)
    lf.restore(model.float())
    for a, b in zip(outputs(kind, model, torch.float32), before, strict=True):
        assert torch.equal(a, b)


def _losses(memory, train, steps):
    """The losses of Adam steps of the repository's own training; None stands for the original."""
    torch.manual_seed(0)
    matcher = stand_in.FlowMatcher(stand_in.build(1).train(train))
    if memory:
        assert not lf.accelerate(matcher, memory=memory).left
    return stand_in.train(matcher, torch.optim.Adam(matcher.linearizer.parameters(), 1e-4), steps)


@pytest.mark.parametrize(("train", "steps"), TRAINED)
def test_adam_steps_have_the_losses_of_the_stored_run(train, steps):
    """The first step initialises ActNorm."""
    inverted = _losses("invert", train, steps)
    torch.testing.assert_close(inverted, _losses("store", train, steps), rtol=1e-5, atol=0)
    torch.testing.assert_close(inverted, _losses(None, train, steps), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["reference", "nflows Affine alternate", "normflows exp channel"])
def test_little_is_kept(name):
    kind = MODELS[name]
    model = make(kind, 0)
    x, c = torch.randn(64, *kind.shape), torch.rand(64, 3)
    if name == "reference":
        model, run = model.net_gx, lambda: model(x, mode="gx")
    elif kind.library == "nflows":
        run = lambda: model(x, c)  # noqa: E731
    else:
        run = lambda: model.log_prob(x)  # noqa: E731
    lf.accelerate(model)
    stored = kept_bytes(run)
    lf.accelerate(model, memory="invert")
    assert kept_bytes(run) < 0.25 * stored


def _chain(depth=3, n_in=3, dropout=0.0):
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 6))

    flows = [f for _ in range(depth) for f in (nf.flows.AffineCouplingBlock(net()), nf.flows.Permute(6))]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(6), flows)


def _grads(model, x):
    model.zero_grad()
    torch.manual_seed(2)
    model.forward_kld(x).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_each_conditioner_runs_once_more():
    model, calls = _chain(), []
    nets = [flow.flows[1].param_map for flow in model.flows if hasattr(flow, "flows")]
    for net in nets:
        net.register_forward_hook(lambda module, args, out: calls.append(module))
    x = torch.randn(4, 6)
    expected = _grads(model, x)
    calls.clear()
    assert _rebuilt(lf.accelerate(model, memory="invert"))
    assert relative(_grads(model, x), expected) < 2e-6
    assert sorted(map(id, calls)) == sorted(map(id, [*nets, *nets]))


def test_dropout_masks_are_replayed():
    model = _chain(dropout=0.5).train()
    x = torch.randn(4, 6)
    expected = _grads(model, x)
    lf.accelerate(model, memory="invert")
    assert relative(_grads(model, x), expected) < 2e-6


def test_dropout_in_both_nets_of_a_two_sided_coupling_stores():
    frames, modules = pytest.importorskip("FrEIA.framework"), pytest.importorskip("FrEIA.modules")
    inn = frames.SequenceINN(6)
    inn.append(
        modules.GLOWCouplingBlock, subnet_constructor=lambda i, o: nn.Sequential(nn.Dropout(), nn.Linear(i, o))
    )
    (row,) = lf.accelerate(inn, memory="invert").left
    assert row.note.startswith("stored: the conditioners of its module_list[0] (GLOWCouplingBlock) have dropout")


def test_drift_is_guarded():
    """With scales of e^30 the rebuilt inputs are noise, but the gradients are right."""
    model = _chain()
    x = torch.randn(4, 6)
    lf.accelerate(model, memory="invert")
    with torch.no_grad():
        for flow in model.flows[::2]:
            flow.flows[1].param_map[3].bias[1::2] += torch.tensor([30.0, -30.0, 5.0])
    warnings.simplefilter("always", DriftWarning)
    with pytest.warns(DriftWarning, match=r"rebuilding activations strayed at flows\[\d\] "):
        actual = _grads(model, x)
    lf.restore(model)
    assert relative(actual, _grads(model, x)) < 1e-5


def test_what_strays_in_the_check_is_stored():
    model = _chain()
    with torch.no_grad():
        for flow in model.flows[::2]:
            flow.flows[1].param_map[3].bias[1::2] += torch.tensor([30.0, -30.0, 5.0])
    (row,) = lf.accelerate(model, memory="invert").left
    assert "rebuilding activations strayed" in row.note


def test_an_unknown_flow_stores_and_is_named():
    nf = pytest.importorskip("normflows")
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(6), [*_chain(1).flows, nf.flows.Planar((6,))])
    report = lf.accelerate(model, memory="invert")
    assert [row.note for row in report.left] == ["stored: its Planar is not known to be invertible"]
    assert report.swapped[0].note == "stored: it is in no chain of a known class"


def test_a_flow_with_two_separate_nets_is_recognised():
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    masks = torch.tensor([[1.0, 0] * 3, [0, 1.0] * 3])
    flows = [nf.flows.MaskedAffineFlow(b, nf.nets.MLP([6, 8, 6]), nf.nets.MLP([6, 8, 6])) for b in masks]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(6), flows)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(4, 6)
    expected = _grads(model, x)
    assert _rebuilt(lf.accelerate(model, memory="invert"))
    assert relative(_grads(model, x), expected) < 2e-6


def test_a_hook_on_a_step_keeps_the_original_running():
    model, seen, x = _chain(), [], torch.randn(4, 6)
    assert _rebuilt(lf.accelerate(model, memory="invert"))
    kept = kept_bytes(lambda: model.log_prob(x))
    handle = model.flows[0].register_forward_hook(lambda module, args, out: seen.append(module))
    expected = _grads(model, x)
    assert kept_bytes(lambda: model.log_prob(x)) > kept
    model(x)
    assert len(seen) == 1
    handle.remove()
    assert kept_bytes(lambda: model.log_prob(x)) == kept
    assert relative(_grads(model, x), expected) < 2e-6


def test_a_block_alone_inverts_itself():
    torch.manual_seed(0)
    block = stand_in.InvUnetBlock(4)
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    block(x, t)
    results = []
    for memory in ("store", "invert"):
        report = lf.accelerate(block, memory=memory)
        assert not report.left
        assert not any("stored" in row.note for row in report.rows)
        for method in (block.forward, block.inverse):
            torch.manual_seed(1)
            method(x, t).square().sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
        block.zero_grad()
    assert relative(*reversed(results)) < 2e-6
    assert kept_bytes(lambda: block(x, t)) < 4 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_is_replayed(dtype):
    model, x = _chain(), torch.randn(16, 6)
    grads = []
    for memory in ("store", "invert"):
        lf.accelerate(model, memory=memory)
        with torch.autocast("cpu", dtype=dtype):
            grads.append(_grads(model, x))
    exact = _grads(lf.restore(model) or model.double(), x.double())
    assert max(relative(grad, exact) for grad in grads) <= 10 * 2**-9  # roundings of bf16


def test_functional_call_no_grad_compile_and_copies():
    model, x = _chain(), torch.randn(4, 6)
    expected, grads = model.log_prob(x).detach(), _grads(model, x)
    lf.accelerate(model, memory="invert")
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = model

        def forward(self, x):
            return self.flow.forward_kld(x)

    loss = torch.func.functional_call(Loss(), {f"flow.{name}": value for name, value in state.items()}, (x,))
    loss.backward()
    assert relative(torch.cat([state[name].grad.flatten() for name, _ in model.named_parameters()]), grads) < 2e-6
    with torch.no_grad():
        assert relative(model.log_prob(x), expected) < 1e-6
    copied = copy.deepcopy(model)
    assert relative(_grads(copied, x), grads) < 2e-6
    assert kept_bytes(lambda: copied.log_prob(x)) == kept_bytes(lambda: model.log_prob(x))
    assert copied._linfast_plan.guard is not model._linfast_plan.guard
    torch._dynamo.reset()
    compiled = torch.compile(model.log_prob, backend="eager")
    assert relative(compiled(x), expected) < 1e-6


def test_gradients_of_gradients():
    model, x = _chain(), torch.randn(4, 6, requires_grad=True)

    def penalty():
        (g,) = torch.autograd.grad(model.log_prob(x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), list(model.flows[0].parameters()))

    expected = penalty()
    lf.accelerate(model, memory="invert")
    for a, b in zip(penalty(), expected, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize(
    ("name", "why"),
    [("zuko", "zuko makes a new Transform, not a module, at every call"),
     ("memcnn sigmoid", "memcnn's InvertibleModuleWrapper rebuilds inputs itself")],
)  # fmt: skip
def test_what_is_not_rebuilt_says_why(name, why):
    report = lf.accelerate(make(KINDS[name], 0), memory="invert")
    assert {row.note for row in report.swapped} == {f"stored: {why}"}
    assert why in str(report)


def test_storing_swaps_no_chain():
    model = _chain()
    report = lf.accelerate(model)
    assert type(model).__mro__[0].__name__ == "NormalizingFlow"
    assert type(model) is type(_chain())
    assert not any("stored" in row.note for row in report.rows)
