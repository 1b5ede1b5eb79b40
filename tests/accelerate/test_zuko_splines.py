"""zuko's rational-quadratic splines by ``lf.ops.rq_spline``: NSF and NCSF, in both directions and in training."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch

import linfast as lf
from linfast.accelerate.libraries import zuko_spline
from linfast.rows import all_lengths

from .zoo import require

KINDS = {
    "NSF": ("NSF", {}),
    "two passes": ("NSF", {"passes": 2}),
    "slope": ("NSF", {"slope": 1e-2, "bins": 3}),
    "NCSF": ("NCSF", {"bins": 4}),
}
FEATURES, CONTEXT = 4, 3


@pytest.fixture(autouse=True)
def _on_a_cpu():
    """Every batch counts as long; the interpreted kernel would run here, which tests/ops compares."""
    with lf.backend("auto"), all_lengths():
        yield


@pytest.fixture
def by_op(monkeypatch):
    """A list with one entry for each call of the op."""
    calls, transform = [], zuko_spline.spline_transform
    monkeypatch.setattr(
        zuko_spline, "spline_transform", lambda *arguments: calls.append(1) or transform(*arguments)
    )
    return calls


def build(name, seed=0, context=CONTEXT):
    torch.manual_seed(seed)
    kind, options = KINDS[name]
    return getattr(require("zuko").flows, kind)(FEATURES, context, transforms=2, hidden_features=(16,), **options)


def two(name, seed=0, context=CONTEXT):
    """The original and an accelerated copy, in float64."""
    model = build(name, seed, context)
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast)
    assert len([row for row in report.swapped if "MaskedAutoregressive" in row.was]) == 2, str(report)
    return model.double(), fast.double()


def drawn(rows=7, dtype=torch.float64):
    """x beyond the ends of NSF's interval, inside NCSF's; and c."""
    return 3.1 * torch.tanh(torch.randn(rows, FEATURES, dtype=dtype)), torch.randn(rows, CONTEXT, dtype=dtype)


def outputs(model, x, c, differentiated=True):
    """Both directions, and the gradients of a loss."""
    transform = model(c).transform
    found = [*transform.call_and_ladj(x), transform(x), *transform.inv.call_and_ladj(x), transform.inv(x)]
    if not differentiated:
        return found
    loss = -model(c).log_prob(x).mean() + transform.inv(x).cos().sum()
    return [*found, loss, *torch.autograd.grad(loss, [x, c, *model.parameters()])]


def close(actual, expected, tolerance=1e-12):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * (1 + b.norm())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_values_and_gradients_are_kept(name, seed, by_op):
    """In float64, with and without a gradient; in float32 to its rounding."""
    model, fast = two(name, seed)
    by_op.clear()
    x, c = (t.requires_grad_() for t in drawn())
    close(outputs(fast, x, c), outputs(model, x, c))
    assert len(by_op) > 10
    with torch.no_grad():
        close(outputs(fast, x, c, False), outputs(model, x, c, False))
        single = drawn(dtype=torch.float32)
        found = outputs(fast.float(), *single, differentiated=False)
        close(found, outputs(model.float(), *single, differentiated=False), 2e-6 * 4)


def test_batches_of_other_shapes(by_op):
    model, fast = two("NSF")
    by_op.clear()
    for batch, context in (((), ()), ((2, 3), (3,)), ((4, 1), (1,)), ((5,), ())):
        x = torch.randn(*batch, FEATURES, dtype=torch.float64)
        c = torch.randn(*context, CONTEXT, dtype=torch.float64)
        with torch.no_grad():
            close(outputs(fast, x, c, False), outputs(model, x, c, False))
    assert by_op


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
@pytest.mark.parametrize("name", ["NSF", "NCSF"])
def test_values_of_another_dtype_give_zukos_dtype_and_values(name, dtype, by_op):
    """The op keeps the dtype of x: integers would be rounded, and lose their gradients."""
    model, fast = (each.float() for each in two(name))
    c = drawn()[1].float()[0]
    x = torch.arange(-6, 6).view(3, FEATURES).remainder(5).sub(2).to(dtype)
    for inverse in (False, True):
        found, wanted = (
            (t.inv if inverse else t).call_and_ladj(x) for t in (fast(c).transform, model(c).transform)
        )
        assert [(t.dtype, t.requires_grad) for t in found] == [(t.dtype, t.requires_grad) for t in wanted]
        close([t.double() for t in found], [t.double() for t in wanted], 1e-3 if dtype.is_floating_point else 1e-5)
    assert by_op


def test_a_copy_a_pickle_and_restore_keep_values(by_op):
    model, fast = two("NSF")
    x, c = drawn()
    with torch.no_grad():
        expected = outputs(model, x, c, False)
        close(outputs(copy.deepcopy(fast), x, c, False), expected)
        close(outputs(pickle.loads(pickle.dumps(fast)), x, c, False), expected)
        saved = io.BytesIO()
        torch.save(fast(c).transform, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        close(loaded.call_and_ladj(x), expected[:2])
        lf.restore(fast)
        by_op.clear()
        for actual, exact in zip(outputs(fast, x, c, False), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=0, atol=0)
    assert not by_op


@pytest.mark.parametrize("change", ["meta", "univariate", "method", "slope"])
def test_what_was_changed_since_runs_its_own_code(change, by_op, monkeypatch):
    zuko = require("zuko")
    model, fast = two("NSF")
    for each in (model, fast):
        for lazy in each.transform.transforms:
            if change == "meta":
                lazy.meta = functools.partial(lambda own, c, x: own(c, 2 * x), lazy.meta)
            elif change == "univariate":
                lazy.univariate = lambda *phi: zuko.transforms.MonotonicRQSTransform(*phi, bound=2.0)
            elif change == "slope":
                lazy.univariate = functools.partial(zuko.transforms.MonotonicRQSTransform, slope=0.3, bound=4.0)
    if change == "method":
        rqs = zuko.transforms.MonotonicRQSTransform
        own = rqs.call_and_ladj
        monkeypatch.setattr(rqs, "call_and_ladj", lambda self, x: tuple(2 * each for each in own(self, x)))
    x, c = drawn()
    by_op.clear()
    with torch.no_grad():
        close(outputs(fast, x, c, False), outputs(model, x, c, False))
    assert bool(by_op) == (change == "slope")


@pytest.mark.parametrize(
    "options", [{"slope": 1e-9}, {"bound": torch.tensor(3.0)}, {"bound": 2.0, "slope": 0.5}, {"unknown": 1}]
)
def test_only_options_that_the_op_takes(options):
    zuko = require("zuko")
    lazy = zuko.flows.MaskedAutoregressiveTransform(
        3, univariate=functools.partial(zuko.transforms.MonotonicRQSTransform, **options), shapes=[(4,), (4,), (3,)]
    )
    found = zuko_spline.find_spline(lazy)
    assert (found is not None) == ("bound" in options and "slope" in options)


def test_forward_mode_and_func_transforms_run_zukos_own_code(by_op):
    """The op has no forward-mode derivative; zuko's own code has one."""
    model, fast = two("NSF", context=0)
    x, _ = drawn(3)
    by_op.clear()
    for each in (torch.func.jacfwd, torch.func.jacrev):
        found, expected = (each(lambda x, m=m: m().transform(x))(x) for m in (fast, model))
        close([found], [expected])
    assert not by_op


def test_short_batches_run_zukos_own_code(by_op):
    _, fast = two("NSF")
    x, c = drawn()
    by_op.clear()
    from linfast.rows import _asked

    _asked.all_lengths = False
    with torch.no_grad():
        fast(c).log_prob(x)
        assert not by_op
        fast(c.repeat(40, 1)).log_prob(x.repeat(40, 1))
    assert by_op
