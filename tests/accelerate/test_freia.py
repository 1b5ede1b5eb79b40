"""FrEIA's matrices between couplings, learned reflections and volume-preserving couplings."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast import rows

from .launches import Launches
from .zoo import require

D = 6
SOFT, FRONT, GIN = {"permute_soft": True}, {"reverse_permutation": True}, {"gin_block": True}
LEARNED = {"learned_householder_permutation": 3}
MODELS = {
    "soft": [("AllInOneBlock", SOFT)] * 3,
    "soft, in front too": [("AllInOneBlock", SOFT | FRONT)] * 3,
    "learned": [("AllInOneBlock", SOFT | LEARNED)] * 3,
    "learned, in front too": [("AllInOneBlock", LEARNED | FRONT | {"global_affine_type": "SIGMOID"})] * 3,
    "GIN": [("AllInOneBlock", SOFT | GIN)] * 3,
    "learned GIN": [("AllInOneBlock", LEARNED | FRONT | GIN)] * 3,
    "two-sided GIN": [("GINCouplingBlock", {"clamp_activation": "TANH"})] * 2,
    "mixed": [
        ("AllInOneBlock", SOFT),
        ("GINCouplingBlock", {}),
        ("AllInOneBlock", {}),
        ("PermuteRandom", {"seed": 1}),
        ("GLOWCouplingBlock", {}),
        ("AllInOneBlock", LEARNED | FRONT),
        ("ActNorm", {}),
        ("AllInOneBlock", SOFT | GIN),
    ],
}
ONE_LAUNCH = {"soft", "soft, in front too", "learned", "learned, in front too"}


def subnet(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 16), nn.SiLU(), nn.Linear(16, n_out))


def build(name, seed=0, features=D):
    """The chain in float32, with every trained parameter moved."""
    frames, blocks = require("FrEIA.framework"), require("FrEIA.modules")
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # from which the library draws its permutations
    model = frames.SequenceINN(features)
    for block, options in MODELS[name]:
        nets = {"subnet_constructor": subnet} if "Block" in block else {}
        model.append(getattr(blocks, block), **nets, **options)
    model(torch.randn(32, features))  # initialises ActNorm
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    forget(model)
    return model


def forget(model):
    """Clear what the library stores at each call: tensors with a graph, which deepcopy refuses."""
    for block in model.modules():
        if getattr(block, "householder", 0):
            block.w_perm = block.w_perm_inv = None


def values(model, x):
    """(both directions, the gradients of x and of every trained parameter)."""
    x = x.clone().requires_grad_()
    outputs = [torch.as_tensor(o, dtype=x.dtype) for o in (*model(x), *model(x, rev=True))]
    forget(model)
    total = sum((o * torch.arange(o.numel(), dtype=o.dtype).cos().view_as(o)).sum() for o in outputs)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return outputs, [
        torch.zeros(()) if g is None else g for g in torch.autograd.grad(total, wanted, allow_unused=True)
    ]


def error(actual, expected):
    """The largest L2 error relative to the expected norm, absolute below one; of the gradients as one vector."""
    (outputs, gradients), (outputs_of, gradients_of) = actual, expected
    assert [g.shape for g in gradients] == [g.shape for g in gradients_of]
    together = [torch.cat([g.flatten().double() for g in each]) for each in (gradients, gradients_of)]
    pairs = [*zip(outputs, outputs_of, strict=True), together]
    return max(
        float(((a.double() - b.double()).norm() / b.double().norm().clamp(min=1)).detach()) for a, b in pairs
    )


def accelerated(model):
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast)
    assert not report.left, str(report)
    assert "couplings in one loop" in report.rows[0].runs, str(report)
    return fast


@pytest.mark.parametrize("batch", [1, 6, 1200])
@pytest.mark.parametrize("name", MODELS)
def test_the_loop_gives_the_librarys_results_and_gradients(name, batch):
    """The longest batch is cut into parts."""
    for seed, features in enumerate((6, 5, 6, 7)):
        model = build(name, seed, features)
        fast, x = accelerated(model), torch.randn(batch, features, dtype=torch.float64)
        exact = values(copy.deepcopy(model).double(), x)
        assert error(values(copy.deepcopy(fast).double(), x), exact) < 1e-12
        allowed = 2e-6 + 4 * error(values(model, x.float()), exact)
        assert error(values(fast, x.float()), exact) < allowed


@pytest.mark.parametrize("name", sorted(ONE_LAUNCH))
def test_a_chain_is_one_launch_where_kernels_run(name):
    model = build(name)
    fast, x = accelerated(model), torch.randn(6, D)
    expected = values(model, x)
    with lf.backend("triton"), Launches() as launches:
        actual = values(fast, x)
    assert launches.counts["coupling_stack"] == 2, launches.counts
    assert error(actual, expected) < 1e-4


@pytest.mark.parametrize("name", sorted(MODELS.keys() - ONE_LAUNCH))
def test_a_chain_with_a_volume_preserving_coupling_is_no_launch(name):
    """Its s depends on all raw values of a sample. The library's own chain runs, and the report says so."""
    model = build(name)
    fast, x = accelerated(model), torch.randn(6, D)
    assert "on a GPU: the original's own code" in lf.accelerate(fast).rows[0].runs
    expected = values(model, x)
    with lf.backend("triton"):
        assert lf.accelerate(fast).rows[0].runs == "the original's own code"
        assert error(values(fast, x), expected) < 1e-4


@pytest.mark.parametrize("write", ["in place", "through data", "replaced", "state_dict"])
def test_matrices_written_later_are_used(write):
    """Also where they are not orthogonal, and where one is not the other's inverse."""
    model, other = build("soft, in front too"), build("soft, in front too", 1)
    fast = accelerated(model)
    x = torch.randn(6, D)
    values(fast, x)
    for each in (model, fast):
        for block, donor in zip(each, other, strict=True):
            for name in ("w_perm", "w_perm_inv"):
                new = 1.1 * getattr(donor, name).detach() + (name == "w_perm")
                if write == "in place":
                    with torch.no_grad():
                        getattr(block, name).copy_(new)
                elif write == "through data":
                    getattr(block, name).data.copy_(new)
                elif write == "replaced":
                    setattr(block, name, nn.Parameter(new, requires_grad=False))
        if write == "state_dict":
            each.load_state_dict(other.state_dict())
    expected = values(model, x)
    assert error(values(fast, x), expected) < 2e-6
    with lf.backend("triton"):
        assert error(values(fast, x), expected) < 1e-4


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize(("first", "second"), [(SOFT, {}), ({}, SOFT)])
def test_a_permutation_becomes_a_matrix_and_back(first, second, through_data, monkeypatch):
    monkeypatch.setitem(MODELS, "first", [("AllInOneBlock", first | FRONT)] * 3)
    monkeypatch.setitem(MODELS, "second", [("AllInOneBlock", second | FRONT)] * 3)
    fast, other, x = accelerated(build("first")), build("second", 1), torch.randn(6, D)
    values(fast, x)
    if through_data:  # which torch does not count
        for tensor, new in zip(fast.parameters(), other.parameters(), strict=True):
            tensor.data.copy_(new)
    else:
        fast.load_state_dict(other.state_dict())
    assert error(values(fast, x), values(other, x)) < 2e-6
    how = "index" if second == {} else "a matrix"
    assert all(f"permutation by {how}" in row.runs for row in lf.accelerate(fast).rows[1:])


def test_a_step_of_training_moves_the_reflections_alike():
    model = build("learned, in front too").double()
    fast, x = accelerated(model), torch.randn(64, D, dtype=torch.float64)
    for each in (model, fast):
        optimiser = torch.optim.Adam(each.parameters(), lr=1e-2)
        for _ in range(5):
            z, log_det = each(x)
            optimiser.zero_grad()
            (z.square().sum(1) / 2 - log_det).mean().backward()
            optimiser.step()
    for (name, a), b in zip(fast.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_nothing_is_stored_at_a_call_and_the_restored_block_is_right():
    model = build("learned")
    fast, x = accelerated(model), torch.randn(6, D)
    fast(x)[1].sum().backward()
    assert all(block.w_perm is None for block in fast)
    copied = copy.deepcopy(fast)  # the library's own cannot be copied after a call with gradients
    lf.restore(fast)
    with torch.no_grad():
        for each in (copied, fast):
            assert torch.allclose(each(x)[0], model(x)[0], atol=1e-6)
    assert all(isinstance(block.w_perm, Tensor) for block in fast)


@pytest.mark.parametrize("options", [SOFT | FRONT, LEARNED | FRONT, SOFT | GIN], ids=str)
@pytest.mark.parametrize("shape", [(D,), (4, 2, 3)], ids=str)
def test_blocks_with_conditions_in_a_graph(options, shape):
    """They run the library's own code on a CPU, and on a GPU the fused tail where there is one."""
    frames, blocks = require("FrEIA.framework"), require("FrEIA.modules")
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    layer = nn.Linear if len(shape) == 1 else functools.partial(nn.Conv2d, kernel_size=1)
    condition = frames.ConditionNode(2, *shape[1:])
    nodes = [frames.InputNode(*shape)]
    for _ in range(2):
        nodes.append(
            frames.Node(
                nodes[-1], blocks.AllInOneBlock, {"subnet_constructor": layer, **options}, conditions=condition
            )
        )
    model = frames.GraphINN([*nodes, condition, frames.OutputNode(nodes[-1])])
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast)
    assert (len(report.swapped), len(report.left)) == (2, 0), str(report)
    x, c = torch.randn(4, *shape), torch.randn(4, 2, *shape[1:])
    for rev in (False, True):
        expected = model(x, c=c, rev=rev)
        for backend in ("auto", "triton"):
            with lf.backend(backend):
                actual = fast(x, c=c, rev=rev)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_long_batch_of_a_lone_block_builds_its_reflections_once(monkeypatch):
    """Where a batch is cut, the library's own code would build them for every part."""
    blocks = require("FrEIA.modules")
    monkeypatch.setattr(rows, "_SIZES", rows._Sizes(bytes=1, fewest=1))
    monkeypatch.setattr(rows._asked, "all_lengths", False)
    block, calls = blocks.AllInOneBlock([(D,)], subnet_constructor=subnet, **LEARNED), []
    lf.accelerate(block)
    construct = blocks.AllInOneBlock._construct_householder_permutation

    @functools.wraps(construct)
    def counted(self):
        calls.append(1)
        return construct(self)

    monkeypatch.setattr(blocks.AllInOneBlock, "_construct_householder_permutation", counted)
    block((torch.randn(64, D),))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["soft", "GIN"])
def test_a_matrix_whose_inverse_is_rounded_is_not_rebuilt(name):
    """memory="invert" stores the activations: w_perm_inv is w_perm's inverse to float32's precision alone."""
    report = lf.accelerate(build(name), memory="invert")
    assert "rebuilding activations strayed" in report.left[0].note, str(report)
    assert not lf.accelerate(build("learned, in front too"), memory="invert").left
