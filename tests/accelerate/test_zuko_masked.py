"""The inverse of zuko's masked autoregressive transforms, by one walk over the degrees."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate import masked
from linfast.accelerate.libraries import zuko_masked
from linfast.rows import _asked

from .test_changed_later import WRITES
from .test_libraries import assert_accurate, assert_close, relative
from .test_usable import OPERATIONS, Run, _attempt
from .zoo import CONTEXT, FEATURES, Kind, require

ADJACENCY = torch.eye(FEATURES, dtype=torch.bool) | (torch.rand(FEATURES, FEATURES) < 0.4).tril(-1)
BOTH = torch.cat((ADJACENCY, torch.arange(CONTEXT) < torch.arange(FEATURES)[:, None]), 1)
KINDS = {
    "MAF": ("MAF", {}),
    "no context": ("MAF", {"context": 0, "features": 5}),
    "random order": ("MAF", {"randperm": True, "activation": nn.ELU, "features": 7}),
    "two passes": ("MAF", {"passes": 2}),
    "three passes": ("MAF", {"passes": 3, "features": 7, "context": 0}),
    "graph": ("MAF", {"adjacency": ADJACENCY, "context": 0, "activation": nn.Tanh}),
    "graph of the context": ("MAF", {"adjacency": BOTH}),
    "residual": ("MAF", {"residual": True, "hidden_features": (16, 16, 8)}),
    "one hidden unit": ("MAF", {"hidden_features": (1,)}),
    "leaky relu": ("MAF", {"activation": functools.partial(nn.LeakyReLU, 0.2)}),
    "slope": ("MAF", {"univariate": "MonotonicAffineTransform", "slope": 0.1}),
    "NSF": ("NSF", {"bins": 4, "passes": 3}),
    "NCSF": ("NCSF", {"bins": 4}),
    "SOSPF": ("SOSPF", {"features": 3}),
}
BISECTED = {"SOSPF"}  # to within 1e-6


@pytest.fixture(autouse=True)
def _on_a_cpu() -> Iterator[None]:
    """The interpreted kernel of the op would run here; tests/ops compares it."""
    with lf.backend("auto"):
        yield


@pytest.fixture
def walks(monkeypatch):
    """A list with one entry for each walk."""
    found = []
    walk = masked.MaskedInverse._by_walk

    def counted(self, *arguments):
        found.append(self)
        return walk(self, *arguments)

    monkeypatch.setattr(masked.MaskedInverse, "_by_walk", counted)
    return found


def build(name="MAF", seed=0):
    """A flow of two transforms, with weights of useful size."""
    torch.manual_seed(seed)
    zuko = require("zuko")
    kind, options = KINDS[name]
    options = {"features": FEATURES, "context": CONTEXT, "hidden_features": (16, 16), "transforms": 2} | options
    if "univariate" in options:
        transform = getattr(zuko.transforms, options["univariate"])
        options["univariate"] = functools.partial(transform, slope=options.pop("slope"))
    return getattr(zuko.flows, kind)(**options)


def two(name="MAF"):
    """The original and a copy that is accelerated, in float64."""
    model = build(name)
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast)
    assert len([row for row in report.swapped if "MaskedAutoregressive" in row.was]) == 2, str(report)
    return model.double(), fast.double()


def noise(model, *batch, context=()):
    """(z, c) in float64; c None where the flow takes none."""
    first = model.transform.transforms[0]
    features = first.hyper.out_features // first.total
    width = first.hyper.in_features - features
    c = torch.randn(*context, width, dtype=torch.float64) if width else None
    return torch.randn(*batch, features, dtype=torch.float64), c


def inverse(model, z, c):
    transform = model(c).transform.inv
    return [*transform.call_and_ladj(z), transform(z)]


def same(fast, model, z, c, tolerance=1e-12):
    with torch.no_grad():
        for actual, expected in zip(inverse(fast, z, c), inverse(model, z, c), strict=True):
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", KINDS)
def test_values_are_kept(name, walks):
    """With and without gradients, in both dtypes, for several shapes, and after restore."""
    model, fast = two(name)
    walks.clear()
    for batch, context in (((5,), ()), ((), ()), ((2, 3), (3,)), ((4, 1), (1,)), ((), (4,))):
        z, c = noise(model, *batch, context=context)
        same(fast, model, z, c)
    assert len(walks) == 5 * 2 * 2
    z, c = noise(model, 5, context=(5,))
    single = [None if t is None else t.float() for t in (z, c)]
    with torch.no_grad():
        truth = inverse(model, z.float().double(), None if c is None else c.float().double())
        found = inverse(copy.deepcopy(fast).float(), *single)
        if name not in BISECTED:
            assert_accurate([t.double() for t in found], truth)
    lf.restore(fast)
    with torch.no_grad():
        for actual, expected in zip(inverse(fast, z, c), inverse(model, z, c), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["MAF", "random order", "graph", "residual", "slope", "NSF", "leaky relu"])
def test_gradients_of_samples_are_kept(name, walks):
    """By the op where it is affine; a spline runs zuko's own code."""
    model, fast = two(name)
    walks.clear()
    z, c = noise(model, 4, context=(4,))
    found = []
    for each in (fast, model):
        given = [t.clone().requires_grad_() for t in (z, c) if t is not None]
        x, log_det, _ = inverse(each, given[0], given[1] if len(given) > 1 else None)
        total = (x * torch.arange(x.numel()).cos().view_as(x)).sum() + log_det.square().sum()
        found.append([x, log_det, *torch.autograd.grad(total, [*given, *each.parameters()])])
    assert_close(*found, 1e-11)
    assert not walks
    torch.manual_seed(0)
    assert fast(None if c is None else c[0]).rsample((3,)).requires_grad


@pytest.mark.parametrize("name", ["MAF", "SOSPF"])
def test_forward_and_training_have_the_librarys_bits(name):
    """A spline's are computed by the op: test_zuko_splines.py."""
    model, fast = two(name)
    x, c = noise(model, 6, context=(6,))
    for each in (model, fast):
        each.float()
    found = []
    for each in (fast, model):
        loss = -each(c.float()).log_prob(x.float()).mean()
        found.append([loss, *torch.autograd.grad(loss, each.parameters())])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_network_is_evaluated_once_for_value_and_log_determinant(monkeypatch, walks):
    model, fast = two()
    z, c = noise(model, 5)
    expected = inverse(model, z, c)[1]
    walks.clear()
    monkeypatch.setattr(
        require("zuko").nn.MaskedMLP, "__call__", lambda *_: pytest.fail("zuko's network is evaluated")
    )
    with torch.no_grad():
        torch.testing.assert_close(fast(c).transform.inv.call_and_ladj(z)[1], expected.detach())
    assert len(walks) == 2


def test_a_context_of_one_row_is_evaluated_once(walks):
    model, fast = two()
    for context, rows in (((), 1), ((1,), 1), ((5,), 5)):
        z, c = noise(model, 5, context=context)
        walks.clear()
        same(fast, model, z, c)
        (term, _), *_ = walks[0].extras(zuko_masked._Given(c, z.shape[:-1], True), 5)
        assert term.shape == (rows, 16)


@pytest.mark.parametrize("name", ["MAF", "NSF", "two passes"])
def test_short_batches(name, monkeypatch, walks):
    """zuko's own code for values where it makes two passes, and for a spline's log-determinant."""
    model, fast = two(name)
    monkeypatch.setattr(zuko_masked, "checks_all_lengths", lambda: False)
    z, c = noise(model, 5)
    walks.clear()
    same(fast, model, z, c)
    numbers = {
        "MAF": (4, 4),
        "NSF": (4, 2),
        "two passes": (2, 2),
    }  # a walk computes the log-determinant or does not
    assert (len(walks), len(set(map(id, walks)))) == numbers[name]
    walks.clear()
    same(fast, model, *noise(model, zuko_masked._FEWEST_LOG_DET))
    assert len(set(map(id, walks))) == len(walks) == 4


def test_the_error_is_no_larger_than_the_librarys():
    model, fast = two("no context")
    z, _ = noise(model, 20000)
    with torch.no_grad():
        truth = inverse(model, z.float().double(), None)
        found = [inverse(each.float(), z.float(), None) for each in (fast, model)]
    for ours, theirs, exact in zip(*found, truth, strict=True):
        assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()  # 20,000 roundings at least


@pytest.mark.parametrize("name", ["MAF", "NSF"])
def test_no_rows(name, walks):
    """zuko's own log-determinant raises an error."""
    _, fast = two(name)
    walks.clear()
    z, c = noise(fast, 3, 0)
    with torch.no_grad():
        assert [t.shape for t in inverse(fast, z, c)] == [z.shape, (3, 0), z.shape]
    assert len(walks) == 4


def test_samples_and_log_probs():
    """From the same random numbers, in sbi's shapes too."""
    model, fast = two()
    for batch, context in (((5,), ()), ((7,), (1,)), ((2,), (3,))):
        c = torch.randn(*context, CONTEXT, dtype=torch.float64)
        found = []
        for each in (fast, model):
            torch.manual_seed(0)
            with torch.no_grad():
                found.append([each(c).sample(batch), *each(c).rsample_and_log_prob(batch)])
        assert found[0][0].shape == (*batch, *context, FEATURES)
        assert_close(*found, 1e-6)  # zuko's noise is in the default dtype
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    torch.testing.assert_close(fast(c[:1]).log_prob(x), model(c[:1]).log_prob(x), rtol=0, atol=0)


def test_weights_are_loaded_cast_copied_and_pickled(tmp_path, walks):
    _, fast = two()
    other = build(seed=1).double()
    fast.load_state_dict(other.state_dict())
    assert list(fast.state_dict()) == list(other.state_dict())
    z, c = noise(other, 5)
    walks.clear()
    same(fast, other, z, c)
    same(copy.deepcopy(fast), other, z, c)
    assert len(walks) == 8
    text = pickle.dumps((fast, fast(c).transform, fast(c).transform.inv))
    assert b"linfast" not in text
    with torch.no_grad():
        torch.save((fast, fast(c).transform.transforms[0].inv, z, c), tmp_path / "flow.pt")
        expected = fast(c).transform.transforms[0].inv(z)
    torch.save(expected, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.modules['linfast'] = None; torch.set_grad_enabled(False);"
        f"flow, inverse, z, c = torch.load({str(tmp_path / 'flow.pt')!r}, weights_only=False);"
        f"x = torch.load({str(tmp_path / 'x.pt')!r});"
        "torch.testing.assert_close(inverse(z), x);"
        "torch.testing.assert_close(flow(c).transform.transforms[0].inv(z), x)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_transform_is_zukos():
    zuko = require("zuko")
    model, fast = two()
    z, c = noise(model, 5)
    for each in (model, fast):
        transform = each.transform.transforms[0](c)
        assert isinstance(transform, zuko.transforms.AutoregressiveTransform)
        assert repr(transform) == "AutoregressiveTransform()"
        assert transform.inv.inv is transform
        assert isinstance(each.transform.transforms[0], zuko.flows.MaskedAutoregressiveTransform)
    torch.testing.assert_close(transform(transform.inv(z)), z)


def _reversed(linear, of_rows):
    """The masks of the other order of the features."""
    if of_rows:
        return linear.mask.unflatten(0, (FEATURES, 2)).flip(0).flatten(0, 1)
    return torch.cat((linear.mask[:, :FEATURES].flip(1), linear.mask[:, FEATURES:]), 1)


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__[1:])
def test_masks_that_are_edited_later_are_followed(write, walks):
    model, fast = two()
    z, c = noise(model, 5)
    walks.clear()
    same(fast, model, z, c)
    for each in (model, fast):
        net = each.transform.transforms[0].hyper
        for i, of_rows in ((0, False), (-1, True)):
            write(net[i], "mask", _reversed(net[i], of_rows).clone())
    same(fast, model, z, c)
    assert len(walks) == 8
    assert walks[1].masks.order == walks[-1].masks.order[::-1]
    for each in (model, fast):  # no order: zuko's own code, whatever it computes
        linear = each.transform.transforms[0].hyper[0]
        write(linear, "mask", torch.ones_like(linear.mask))
    same(fast, model, z, c)
    assert len(walks) == 8 + 2


def test_masks_that_were_edited_before():
    model, _ = two()
    net = model.transform.transforms[0].hyper
    net[2].mask[3] = False
    fast = copy.deepcopy(model)
    assert len(lf.accelerate(fast).swapped) == 2
    same(fast, model, *noise(model, 5))
    net[0].mask.fill_(True)
    (row,) = lf.accelerate(model).left
    assert "masks are not autoregressive" in row.note
    model = build("two passes")
    for lazy in model.transform.transforms:
        lazy.passes = 1
    assert {row.note for row in lf.accelerate(model).left} == {
        "its inverse takes 2 passes and it makes 1: it is not exact"
    }


def _hook(lazy):
    lazy.hyper[0].register_forward_hook(lambda module, given, y: y * 0.9)


def _global_hook(lazy):
    return nn.modules.module.register_module_forward_hook(lambda module, given, y: None)


def _patch(lazy):
    meta = type(lazy).meta
    lazy.meta = lambda c, x: meta(lazy, c, 0.5 * x)


def _replace(lazy):
    lazy.hyper[1] = nn.Softmax(-1)


def _univariate(lazy):
    lazy.univariate = lambda shift, scale: require("zuko").transforms.AdditiveTransform(shift)


@pytest.mark.parametrize("change", [_hook, _global_hook, _patch, _replace, _univariate], ids=lambda f: f.__name__)
def test_what_is_changed_later_runs_zukos_own_code(change, walks):
    model, fast = two()
    z, c = noise(model, 5)
    same(fast, model, z, c)
    walks.clear()
    hooks = [change(lazy) for each in (model, fast) for lazy in each.transform.transforms]
    try:
        same(fast, model, z, c)
    finally:
        [hook.remove() for hook in hooks if hook is not None]
    assert not walks


def test_a_method_of_a_class_that_is_replaced_later(monkeypatch, walks):
    model, fast = two()
    z, c = noise(model, 5)
    same(fast, model, z, c)
    transform = require("zuko").transforms.MonotonicAffineTransform
    monkeypatch.setattr(transform, "_inverse", lambda self, y: y / self.scale)
    walks.clear()
    same(fast, model, z, c)
    assert not walks


def test_another_univariate_of_zuko_was_not_compared(walks):
    model, fast = two("NSF")
    z, c = noise(model, 5)
    walks.clear()
    for each in (model, fast):
        for lazy in each.transform.transforms:
            lazy.univariate = functools.partial(_spline_twice, require("zuko").transforms)
    same(fast, model, z, c)
    assert not walks


def _spline_twice(transforms, *phi):
    spline = transforms.MonotonicRQSTransform(*phi)
    return transforms.ComposedTransform(spline, spline)


def test_settings_that_are_changed_later_are_followed(walks):
    model, fast = two()
    z, c = noise(model, 5)
    walks.clear()
    for each in (model, fast):
        for lazy in each.transform.transforms:
            lazy.univariate = functools.partial(lazy.univariate, slope=0.1)
    same(fast, model, z, c)
    assert len(walks) == 4


def _networks():
    zuko = require("zuko")
    yield zuko.flows.NAF(3, transforms=1, hidden_features=(8,)), "univariate MNN: only zuko's own"
    yield zuko.flows.MAF(3, transforms=1, hidden_features=(8,), activation=nn.Softmax), "has a Softmax"
    flow = zuko.flows.MAF(3, transforms=1, hidden_features=(8,))
    flow.transform.transforms[0].hyper[1].register_forward_hook(lambda *_: None)
    yield flow, "has a hook"
    flow = zuko.flows.MAF(3, transforms=1, hidden_features=(8,))
    flow.transform.transforms[0].hyper[0].mask = flow.transform.transforms[0].hyper[0].mask / 2
    yield flow, "its masks have other values than 0 and 1"
    leaky = functools.partial(nn.LeakyReLU, 0.1, inplace=True)
    yield zuko.flows.MAF(3, transforms=1, hidden_features=(8,), activation=leaky), "writes to its input"
    flow = zuko.flows.MAF(3, transforms=1, hidden_features=(8, 8))
    flow.transform.transforms[0].hyper[1] = nn.ELU()
    yield flow, "several activations"
    yield zuko.flows.MAF(3, transforms=1, hidden_features=()), "masks must have at least two layers"


def test_what_is_left_alone_and_why():
    for flow, why in _networks():
        (row,) = lf.accelerate(flow).left
        assert why in row.note


def test_other_contexts_raise_zukos_errors():
    model, fast = two()
    bare, fast_bare = two("no context")
    z, c = noise(model, 5, context=(5,))
    for each, given in (
        (model, None),
        (fast, None),
        (model, c[:2]),
        (fast, c[:2]),
        (model, c[:, :2]),
        (fast, c[:, :2]),
    ):
        with pytest.raises(RuntimeError):
            each(given).transform.inv(z)
    for each in (bare, fast_bare):
        with pytest.raises(RuntimeError):
            each(c).transform.inv(z[:, :5])
        with pytest.raises((TypeError, AttributeError)):
            each().transform.inv(None)
    torch.testing.assert_close(fast(c.float()).transform.inv(z), model(c.float()).transform.inv(z), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "operation"),
    [(name, run) for name in ("MAF", "NSF") for run in OPERATIONS if (name, run.__name__) != ("NSF", "_exported")],
)
def test_it_can_do_what_the_original_can(name, operation):
    kind = Kind("zuko", build, lambda model, x, c: inverse(model, x, c), 2)
    original, fast = (Run(kind, model.float()) for model in two(name))
    x, c = (t.float().requires_grad_() for t in noise(original.model, 5, context=(5,)))
    expected = _attempt(operation, original, x, c)
    if isinstance(expected, Exception):
        return  # the original cannot either
    for actual, value in zip(operation(fast, x, c), expected, strict=True):
        assert actual.shape == value.shape
        assert relative(actual, value) < 1e-4


def test_the_report_says_what_runs():
    rows = lf.accelerate(build()).rows + lf.accelerate(build("NSF")).rows
    assert rows[0].runs == "inverse in one walk over 6 degrees, affine, smooth; MaskedMLP 6-16-16-12 relu"
    assert rows[0].was == "zuko MaskedAutoregressiveTransform"
    assert rows[2].runs.startswith("inverse in one walk over 3 degrees, MonotonicRQSTransform; MaskedMLP 6-16-16")
    assert rows[2].note == "where a gradient is required, its own code runs"


def test_a_caller_may_write_to_what_it_gave_and_got():
    model, fast = two("no context")
    found = []
    for each in (fast, model):
        z = torch.ones(5, 5, dtype=torch.float64)
        x = each(None).transform.inv(z)
        z.mul_(2)
        found.append(torch.autograd.grad(x.mul_(2).sin().sum(), [*each.parameters()]))
    assert_close(*found, 1e-11)


def test_short_batches_of_few_features_run_zukos_code(monkeypatch, walks):
    """Where a gradient is required; without one a walk is faster."""
    model = require("zuko").flows.MAF(3, transforms=2, hidden_features=(8,)).double()
    fast = copy.deepcopy(model)
    assert lf.accelerate(fast).swapped
    monkeypatch.setattr(zuko_masked, "checks_all_lengths", lambda: False)
    monkeypatch.setattr(_asked, "all_lengths", False)
    op, ours = masked.MaskedInverse._by_op, []
    monkeypatch.setattr(masked.MaskedInverse, "_by_op", lambda *a: ours.append(1) or op(*a))
    for batch, count in ((63, 0), (64, 2)):
        ours.clear()
        z = torch.randn(batch * torch.get_num_threads(), 3).double()
        assert_close([fast().transform.inv(z)], [model().transform.inv(z)], 1e-12)
        assert len(ours) == count
        walks.clear()
        same(fast, model, z, None)
        assert len(walks) == 4


def test_a_slope_that_is_a_tensor_is_left_alone():
    model = build()
    learned = nn.Parameter(torch.tensor(0.1))
    for lazy in model.transform.transforms:
        lazy.univariate = functools.partial(lazy.univariate, slope=learned)
    left = lf.accelerate(model).left
    assert {row.note for row in left} == {"its slope is a Parameter: only a number"}


@pytest.mark.parametrize("name", ["MAF", "NSF"])
def test_a_model_is_freed_without_the_collector(name):
    _, fast = two(name)
    alive = weakref.ref(fast.transform.transforms[0])
    gc.collect()
    gc.disable()
    try:
        del fast
        assert alive() is None
    finally:
        gc.enable()
