"""The couplings of a chain run together, in one loop or in one launch with kernels, except where they must not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from linfast.bench.cases.libraries import mlp
from torch import nn

import linfast as lf
from linfast.accelerate import fused

from .launches import Launches
from .zoo import require

D = 6


class Conditioner(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.net = mlp(n_in, n_out, (16, 16))

    def forward(self, x, context=None):
        return self.net(x)


def nflows(masks=("alternate", "other", "gather", "halves")):
    """Couplings, permutations, an initialised ActNorm and an LU map."""
    t = require("nflows.transforms")
    masks = [
        {"alternate": [1, 0] * 3, "other": [0, 1] * 3, "gather": [1, 0, 0, 1, 1, 0], "halves": [1, 1, 1, 0, 0, 0]}[
            m
        ]
        for m in masks
    ]
    couplings = [t.AffineCouplingTransform(torch.tensor(mask), Conditioner) for mask in masks]
    between = [t.ReversePermutation(D), t.ActNorm(D), t.LULinear(D, identity_init=False), t.RandomPermutation(D)]
    model = t.CompositeTransform([step for pair in zip(couplings, between, strict=True) for step in pair])
    model(torch.randn(32, D))
    return model


def normflows(actnorm=True):
    nf, flows = require("normflows"), []
    for i in range(4):
        flows.append(nf.flows.AffineCouplingBlock(mlp(3, D, (16, 16)), scale_map="exp"))
        flows.append(nf.flows.Permute(D, mode="swap" if i % 2 else "shuffle"))
        flows += [nf.flows.ActNorm(D)] if actnorm else []
        flows.append(nf.flows.LULinearPermute(D, identity_init=False))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(D), flows)
    model.log_prob(torch.randn(32, D))
    return model


def freia():
    """A two-sided block, a permutation, and blocks that permute and scale: one with s less its mean."""
    frames, blocks = require("FrEIA.framework"), require("FrEIA.modules")
    model = frames.SequenceINN(D)

    def subnet(n_in, n_out):
        return mlp(n_in, n_out, (16, 16))

    model.append(blocks.GLOWCouplingBlock, subnet_constructor=subnet, clamp_activation="TANH")
    model.append(blocks.PermuteRandom, seed=1)
    model.append(blocks.AllInOneBlock, subnet_constructor=subnet, reverse_permutation=True)
    model.append(blocks.AllInOneBlock, subnet_constructor=subnet)
    return model


def freia_matrices():
    """Blocks with a rotation, a learned one, both also in front, and a permutation."""
    frames, blocks = require("FrEIA.framework"), require("FrEIA.modules")
    model = frames.SequenceINN(D)
    soft, learned, front = (
        {"permute_soft": True},
        {"learned_householder_permutation": 2},
        {"reverse_permutation": True},
    )
    for options in (soft | front, learned | front, {}, soft | learned):
        model.append(blocks.AllInOneBlock, subnet_constructor=lambda i, o: mlp(i, o, (16, 16)), **options)
    return model


def zuko():
    return require("zuko").flows.RealNVP(D, transforms=4, hidden_features=(16, 16), randmask=True)


def chain_of(model):
    """The module whose couplings run together."""
    return model.transform if hasattr(model, "base") else model


def members_of(model):
    lists = (getattr(chain_of(model), name, None) for name in ("flows", "_transforms", "module_list", "transforms"))
    return next(found for found in lists if found is not None)


def forward(model, x):
    if hasattr(model, "flows"):
        return model.forward_and_log_det(x)
    return model().transform.call_and_ladj(x) if hasattr(model, "base") else model(x)


def inverse(model, x):
    if hasattr(model, "flows"):
        return [*model.inverse_and_log_det(x), model.log_prob(x)]
    if hasattr(model, "base"):
        return [*model().transform.inv.call_and_ladj(x), model().log_prob(x)]
    return model(x, rev=True) if hasattr(model, "module_list") else model.inverse(x)


def values(model, x):
    """Both directions and the gradients of x and of every parameter."""
    outputs = [*forward(model, x), *inverse(model, x)]
    total = sum((o.double() * torch.arange(o.numel()).cos().view_as(o)).sum() for o in outputs)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*outputs, *(torch.zeros(()) if g is None else g for g in gradients)]


def batch(rows=5, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(rows, D, dtype=dtype, requires_grad=True)


def assert_alike(fast, model, x, tolerance=1e-5):
    for actual, expected in zip(values(fast, x), values(model, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def both(build, **options):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # from which FrEIA draws its permutations
    model = build()
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast, **options)
    assert report.rows[0].path == ("transform" if build is zuko else "")
    assert "4 couplings in one loop" in report.rows[0].runs, str(report)
    return model, fast


def runs_together(fast, x):
    """Whether this call runs our code and not the library's loop."""
    calls = []
    original = fused.Fused.__call__

    def spy(self, *arguments):
        calls.append(self)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused.Fused, "__call__", spy)
        values(fast, x)
    return bool(calls)


ROUNDED = {freia_matrices: 1e-4}  # gradients of reflections, in which large terms cancel
BUILDS = pytest.mark.parametrize("build", [nflows, normflows, freia, freia_matrices, zuko])


@BUILDS
@pytest.mark.parametrize("rows", [1, 5, 3000])
def test_values_and_gradients_are_the_originals(build, rows):
    model, fast = both(build)
    assert runs_together(fast, batch())
    assert_alike(fast.double(), model.double(), batch(rows, torch.float64), 1e-5 if build is normflows else 1e-9)


@BUILDS
def test_it_is_one_launch_where_kernels_run(build):
    model, fast = both(build)
    x = batch()
    with lf.backend("triton"), Launches() as launches, torch.no_grad():
        actual = forward(fast, x)
    assert launches.counts["coupling_stack"] == 1, launches.counts
    expected = forward(model, x)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with lf.backend("triton"):
        assert_alike(fast, model, x, 2e-3)


@BUILDS
def test_an_optimiser_step_and_a_write_through_data_are_seen(build):
    model, fast = both(build)
    for each in (model, fast):
        optimiser = torch.optim.SGD(each.parameters(), lr=1e-3)
        forward(each, batch())[1].mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        next(each.parameters()).data.mul_(1.5)
    assert runs_together(fast, batch())
    assert_alike(fast, model, batch(), ROUNDED.get(build, 1e-5))


@BUILDS
@pytest.mark.parametrize("where", ["coupling", "linear layer"])
def test_a_hook_put_in_later_is_called(build, where):
    _, fast = both(build)
    values(fast, batch())
    member = members_of(fast)[0]
    module = member if where == "coupling" else next(m for m in member.modules() if type(m).__name__ == "Linear")
    called = []
    handle = module.register_forward_hook(lambda *arguments: called.append(True))
    values(fast, batch())
    assert called
    handle.remove()
    called.clear()
    values(fast, batch())
    assert not called


@BUILDS
def test_modules_and_parameters_replaced_later_are_run(build):
    model, fast = both(build)
    for each in (model, fast):
        torch.manual_seed(5)
        members = members_of(each)
        linear = next(m for m in members[0].modules() if type(m).__name__ == "Linear")
        linear.weight = nn.Parameter(torch.randn_like(linear.weight))
        members.append(copy.deepcopy(members[0]))
        if build in (freia, freia_matrices):
            each.conditions.append(None)
    assert_alike(fast, model, batch(), 1e-4)


@BUILDS
def test_a_method_patched_later_is_run(build):
    _, fast = both(build)
    member, called = members_of(fast)[0], []
    own = member.forward
    member.forward = lambda *a, **k: (called.append(True), own(*a, **k))[1]
    values(fast, batch())
    assert called


def test_a_mask_and_a_permutation_written_through_data_are_followed():
    model, fast = both(nflows)
    values(fast, batch())
    for each in (model, fast):
        first = each._transforms[0]
        kept = first.identity_features.clone()
        first.identity_features.data.copy_(first.transform_features)
        first.transform_features.data.copy_(kept)
        each._transforms[7]._permutation.data.copy_(each._transforms[7]._permutation.flip(0))
    assert_alike(fast, model, batch())


def test_an_actnorm_that_waits_for_its_first_batch_is_initialised_by_it():
    model, fast = both(nflows)
    for each in (model, fast):
        each._transforms[3].initialized.fill_(False)
    assert_alike(fast, model, batch())
    assert fast._transforms[3].initialized


def test_a_context_autocast_and_other_shapes_run_the_originals():
    model, fast = both(nflows)
    x = batch()
    for actual, expected in zip(fast(x, torch.ones(5, 2)), model(x, torch.ones(5, 2)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_together(fast, x)
    with pytest.raises(Exception, match=r"\S") as theirs:
        model(torch.randn(2, D + 1))
    with pytest.raises(type(theirs.value)):
        fast(torch.randn(2, D + 1))


@BUILDS
def test_ensembles_and_functional_calls(build):
    model, fast = both(build)
    other = {name: p.detach() * 1.1 for name, p in model.named_parameters() if p.requires_grad}
    x = batch().detach()
    run = torch.func.functional_call
    if build is not zuko:  # whose call gives a distribution
        torch.testing.assert_close(run(fast, other, (x,)), run(model, other, (x,)), rtol=1e-4, atol=1e-4)
    assert_alike(fast, model, batch(), ROUNDED.get(build, 1e-5))


@BUILDS
def test_freeze_keeps_the_values(build):
    model, fast = both(build)
    with torch.no_grad(), lf.freeze(fast):
        for _ in range(2):
            x = batch().detach()
            for a, b in zip(forward(fast, x), forward(model, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@BUILDS
def test_restore_gives_the_originals_values(build):
    model, fast = both(build)
    lf.restore(fast)
    assert type(fast) is type(model)
    assert_alike(fast, model, batch(), 0)


def test_a_block_without_volume_change_is_in_the_loop_and_in_no_launch():
    """FrEIA's GIN block, whose s depends on all raw values; a condition runs the library's own chain."""
    frames, blocks = require("FrEIA.framework"), require("FrEIA.modules")
    model, other = frames.SequenceINN(D), frames.SequenceINN(D)
    for _ in range(4):
        model.append(blocks.AllInOneBlock, subnet_constructor=lambda i, o: mlp(i, o, (16, 16)), gin_block=True)
        other.append(
            blocks.AllInOneBlock, cond=0, cond_shape=(2,), subnet_constructor=lambda i, o: mlp(i, o, (16, 16))
        )
    fast = copy.deepcopy(model)
    (row, *_) = lf.accelerate(fast).rows
    assert row.runs == "4 couplings in one loop (on a GPU: the original's own code)"
    assert runs_together(fast, batch())
    assert_alike(fast, model, batch())
    assert all(row.path for row in lf.accelerate(other).rows)


def test_a_distribution_of_before_keeps_its_masks_and_runs_new_hooks():
    flow, x = zuko(), batch()
    lf.accelerate(flow)
    distribution, called = flow(), []
    expected = distribution.log_prob(x)
    handle = flow.transform.transforms[0].hyper[0].register_forward_hook(lambda *arguments: called.append(True))
    torch.testing.assert_close(distribution.log_prob(x), expected)
    assert called
    handle.remove()
    for lazy in flow.transform.transforms:
        lazy.mask.data.logical_not_()
    torch.testing.assert_close(distribution.log_prob(x), expected)
    lf.restore(flow)
    torch.testing.assert_close(distribution.log_prob(x), expected)


def test_a_scripted_module_beside_the_couplings_changes_nothing():
    """The dictionary of a ScriptModule's parts has no ``get`` and no ``update``."""
    model, x = normflows(), torch.randn(32, D)
    model.q0.scripted = torch.jit.script(nn.Linear(D, D))
    before = model.log_prob(x)
    report = lf.accelerate(model)
    assert "4 couplings in one" in str(report), str(report)
    torch.testing.assert_close(model.log_prob(x), before)


@pytest.mark.parametrize(("n_linear", "reached"), [(3, 3), (6, 0)])
def test_the_report_counts_a_precision_only_where_one_launch_can_run(n_linear, reached):
    """No tile takes conditioners of six linear layers, so that their chain never runs as one launch."""
    nf, widths = require("normflows"), (16,) * (n_linear - 1)
    flows = [nf.flows.AffineCouplingBlock(mlp(3, D, widths)) for _ in range(2)]
    report = lf.accelerate(nf.NormalizingFlow(nf.distributions.DiagGaussian(D), flows), precision="fast")
    assert f"precision 'fast' reaches {reached} of them" in str(report), str(report)
