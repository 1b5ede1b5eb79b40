"""Every supported kind of module of each library's real release gives the same results after accelerate."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import linfast as lf
from linfast import rows

from .launches import Launches
from .zoo import KINDS, inputs, make, redraw, require, sweep

LIBRARIES = [name for name in KINDS if name != "reference"]  # whose U-Nets take minutes in the interpreter
# In a new model these differ from the first model's; test_draws_of_the_weights uses other weights.
RANDOM_STRUCTURE = {"zuko random masks", "FrEIA all in one", "glasflow log2 lu", "glasflow NSF"}
# Run by the kernels: every layer that takes several launches, and of each library one that takes one launch.
LAUNCHED = {name for name in LIBRARIES if not KINDS[name].whole} | {
    "normflows sigmoid channel_inv",
    "normflows masked gather",
    "nflows Additive MLP gather",
    "FrEIA AffineCouplingOneSided ATAN",
    "FrEIA all in one soft reverse",
    "FrEIA all in one learned",
    "zuko random masks",
    "memcnn additive",
}
# Run by the check of accelerate: every way in which nets become a layer of the op.
CHECKED = {
    "normflows sigmoid channel_inv",
    "normflows sigmoid_inv channel",
    "normflows additive",
    "normflows masked gather",
    "normflows masked without scale",
    "nflows Additive MLP gather",
    "glasflow MLP",
    "FrEIA RNVPCouplingBlock TANH",
    "FrEIA NICE",
    "FrEIA all in one",
    "FrEIA all in one soft",
    "FrEIA all in one learned reverse",
    "zuko NICE",
    "zuko random masks",
    "memcnn naive",
    "memcnn additive",
}


def outputs(kind, model, dtype, seed=0):
    """The results of both directions, and the gradients of a fixed weighted sum of them."""
    x, c = inputs(kind, dtype, seed)
    values = kind.run(model, x, c)
    total = sum((v.double() * torch.arange(v.numel()).cos().view_as(v)).sum() for v in values)
    wanted = [x, c, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    flat = torch.cat([g.double().flatten() for g in gradients if g is not None])
    return [v.detach().double() for v in values] + [flat]


def relative(actual, expected):
    """Relative L2 difference; absolute where the expected value is zero."""
    error, size = (actual - expected).norm(), expected.norm()
    return float(error / size if size > 0 else error)


def assert_close(actual, expected, tolerance):
    errors = [relative(a, b) for a, b in zip(actual, expected, strict=True)]
    assert max(errors) <= tolerance, errors


def assert_close_in_float64(kind, actual, expected):
    """normflows sums the log-determinants of a chain, the outputs 1 and 3, in float32 whatever the dtype."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert relative(a, b) <= (1e-6 if kind.library == "normflows" and i in (1, 3) else 1e-12), i


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_accurate(actual, truth, units=128):
    """Within this many roundings of float32; absolute below 1, for log-determinants that are zero."""
    errors = [
        float((a - exact).norm() / exact.norm().clamp(min=1.0)) for a, exact in zip(actual, truth, strict=True)
    ]
    assert max(errors) <= units * 2**-24, errors


@pytest.mark.parametrize(
    ("name", "seed"), [*((name, 0) for name in KINDS), *((name, 1) for name in sorted(RANDOM_STRUCTURE))]
)
def test_outputs_log_dets_inverses_and_gradients_are_kept(name, seed):
    """Of one model: before accelerate, accelerated, in float64 and restored."""
    kind = KINDS[name]
    model = make(kind, seed)
    before = outputs(kind, model, torch.float32, seed)
    exact = outputs(kind, copy.deepcopy(model).double(), torch.float64, seed)
    report = lf.accelerate(model)
    alone = [row for row in report.swapped if "couplings in one" not in row.runs]
    assert (len(alone), len(report.left)) == (kind.swapped, 0), str(report)
    assert_accurate(outputs(kind, model, torch.float32, seed), exact)
    assert_close_in_float64(kind, outputs(kind, model.double(), torch.float64, seed), exact)
    lf.restore(model.float())
    assert_same(outputs(kind, model, torch.float32, seed), before)


@pytest.mark.parametrize("name", sweep(LIBRARIES))
def test_one_row_at_a_time_gives_the_same(name, monkeypatch):
    """As for long batches on a CPU. normflows sums float64 log-determinants in float32; ours rounds the sum."""
    kind = KINDS[name]
    model = make(kind, 0).double()
    expected = outputs(kind, model, torch.float64)
    lf.accelerate(model)
    monkeypatch.setattr(rows, "_SIZES", rows._Sizes(bytes=1, weights=0, fewest=1))
    tolerance = 4 * torch.finfo(torch.float32).eps if name.startswith("normflows") else 1e-12
    assert_close(outputs(kind, model, torch.float64), expected, tolerance)


@pytest.mark.parametrize("name", sweep(LIBRARIES))
def test_draws_of_the_weights(name):
    """The accelerated model is loaded from another one with the same structure, copied and cast, in both modes."""
    kind = KINDS[name]
    model = make(kind, 0)
    start = copy.deepcopy(model.state_dict())
    fast = copy.deepcopy(model)
    lf.accelerate(fast)
    for seed in range(3):
        redraw(model, start, seed)
        fast.load_state_dict(model.state_dict())
        for each in (model, fast):
            each.train(seed % 2 == 0)
        exact = outputs(kind, copy.deepcopy(model).double(), torch.float64, seed)
        assert_accurate(outputs(kind, fast, torch.float32, seed), exact)
        assert_close_in_float64(kind, outputs(kind, copy.deepcopy(fast).double(), torch.float64, seed), exact)
    assert [type(m) for m in fast.modules()] != [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", sweep(LIBRARIES, LAUNCHED))
def test_the_kernels_give_the_same(name):
    """In Triton's interpreter, with the views of x and of the parameters that the ops receive."""
    kind = KINDS[name]
    model = make(kind, 0)
    before = outputs(kind, model, torch.float32)
    report = lf.accelerate(model)
    with lf.backend("triton"), Launches() as launches:
        assert_close(outputs(kind, model, torch.float32), before, 1e-5)
    together = any("in one launch" in row.runs for row in report.swapped)
    assert launches.counts["coupling_stack"] == (kind.calls if together else kind.whole), launches.counts
    assert any("one launch" in row.runs for row in report.swapped) == bool(kind.whole), str(report)


@pytest.mark.parametrize("name", sweep((name for name in LIBRARIES if KINDS[name].whole), CHECKED))
def test_the_check_covers_the_whole_layer(name):
    """Where kernels run, accelerate also compares the one launch and the gradients of the conditioner's weights."""
    kind = KINDS[name]
    model = make(kind, 0)
    with lf.backend("triton"), Launches() as launches:
        report = lf.accelerate(model)
    assert launches.counts["coupling_stack"] >= 2, launches.counts
    assert launches.counts["coupling_stack_backward"] >= 2, launches.counts
    assert not report.left, str(report)


@pytest.mark.parametrize("name", sweep(KINDS))
def test_the_model_stays_itself(name):
    kind = KINDS[name]
    model = make(kind, 0)
    classes = [type(m) for m in model.modules()]
    parameters, keys = list(model.parameters()), list(model.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    generator = torch.get_rng_state()
    lf.accelerate(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [type(m) for m in model.modules()] != classes
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert [repr(type(m)) for m in model.modules()] == [repr(c) for c in classes]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert_same(model.state_dict().values(), state.values())
    lf.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes


@pytest.mark.parametrize("name", sweep(KINDS))
def test_deep_copies_stay_swapped_and_independent(name):
    kind = KINDS[name]
    model = make(kind, 0)
    lf.accelerate(model)
    copied = copy.deepcopy(model)
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    expected = outputs(kind, model, torch.float32)
    assert_same(outputs(kind, copied, torch.float32), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert_same(outputs(kind, copied, torch.float32), expected)
    lf.restore(model)
    assert_same(outputs(kind, copied, torch.float32), expected)


@pytest.mark.parametrize("name", sweep(KINDS))
def test_state_dicts_and_whole_modules_load(name):
    kind = KINDS[name]
    model, other = make(kind, 0), make(kind, 1)
    lf.accelerate(model)
    lf.accelerate(other)
    expected = outputs(kind, model, torch.float32)
    other.load_state_dict(model.state_dict())
    assert_close(outputs(kind, other, torch.float32), expected, 1e-6)  # loaded masks may be cut otherwise
    if kind.library == "FrEIA":
        return  # holds lambdas: its own modules do not pickle
    stream = io.BytesIO()
    if kind.library == "glasflow":
        return
    torch.save(model, stream)
    assert b"linfast" not in stream.getvalue()
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    lf.restore(model)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert_same(outputs(kind, loaded, torch.float32), outputs(kind, model, torch.float32))


@pytest.mark.parametrize("masks", [("halves", "alternate"), ("alternate", "gather"), ("gather", "halves")], ids=str)
def test_masks_that_a_state_dict_brings_are_followed(masks):
    transforms, nets = require("nflows.transforms"), require("nflows.nn.nets")
    features = {"halves": [1, 1, 1, 0, 0, 0], "alternate": [1, 0, 1, 0, 1, 0], "gather": [1, 0, 0, 1, 1, 0]}

    def coupling(mask):
        return transforms.AffineCouplingTransform(features[mask], lambda i, o: nets.ResidualNet(i, o, 8))

    model, other = (coupling(mask) for mask in masks)
    assert masks[0] in lf.accelerate(model).rows[0].runs
    model.load_state_dict(other.state_dict())
    x = torch.randn(4, 6)
    for actual, expected in zip((*model(x), *model.inverse(x)), (*other(x), *other.inverse(x)), strict=True):
        torch.testing.assert_close(actual, expected)
