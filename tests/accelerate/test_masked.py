"""The inverse of other libraries' masked autoregressive transforms, by one walk over the degrees."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate import masked, verify
from linfast.accelerate.swap import Swapped
from linfast.rows import _asked

from .test_changed_later import WRITES
from .test_libraries import assert_accurate, assert_close, outputs, relative
from .test_usable import OPERATIONS, Run, _attempt
from .zoo import AUTOREGRESSIVE, CONTEXT, FEATURES, inputs, make, require


# The interpreted kernel of the op would run here; tests/ops compares it.
@pytest.fixture(autouse=True)
def _on_a_cpu() -> Iterator[None]:
    with lf.backend("auto"):
        yield


DISTINCT = ("nflows", "nflows residual", "glasflow own scale", "normflows residual", "normflows circular spline")


class Walks(list):
    """The MaskedInverse of each walk, except of those in the check of accelerate."""

    checking = False


@pytest.fixture
def walks(monkeypatch):
    found, walk, check = Walks(), masked.MaskedInverse._by_walk, CHECK["difference"]

    def counted(self, *arguments):
        if not found.checking:
            found.append(self)
        return walk(self, *arguments)

    def uncounted(*arguments):
        found.checking = True
        try:
            return check(*arguments)
        finally:
            found.checking = False

    monkeypatch.setattr(masked.MaskedInverse, "_by_walk", counted)
    monkeypatch.setitem(CHECK, "difference", uncounted)
    return found


CHECK = lf.accelerate.__globals__


def two(name, seed=0):
    """The original and a copy that is accelerated."""
    model = make(AUTOREGRESSIVE[name], seed)
    fast = copy.deepcopy(model)
    assert len(lf.accelerate(fast).swapped) == 1
    return model, fast


def swapped_of(model):
    return next(module for module in model.modules() if isinstance(module, Swapped))


def affine(features=FEATURES, hidden=16, **options):
    """nflows' transform with weights of useful size, and a copy that is accelerated."""
    torch.manual_seed(0)
    transforms = require("nflows.transforms")
    options = {"use_residual_blocks": False, "activation": torch.tanh} | options
    model = transforms.MaskedAffineAutoregressiveTransform(features, hidden, **options).eval()
    masked.redraw(model)
    fast = copy.deepcopy(model)
    assert lf.accelerate(fast).swapped
    return model, fast


def same(fast, model, x, c=None, tolerance=1e-12):
    """Compare the inverses in float64; the copies are not changed."""
    with torch.no_grad():
        for actual, expected in zip(fast.inverse(x, c), model.inverse(x, c), strict=True):
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            assert (actual - expected).norm() <= tolerance * expected.norm()


def assert_as_accurate(actual, before, truth):
    """Within 128 roundings, or as far from the truth as the library's own result, which may be the same code."""
    for ours, theirs, exact in zip(actual, before, truth, strict=True):
        size, units = exact.norm().clamp(min=1.0), 128 * 2**-24
        error, allowed = (float((value - exact).norm() / size) for value in (ours, theirs))
        assert error <= max(allowed, units)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_values_and_gradients_are_kept(name, walks):
    """Of one model: before accelerate, accelerated, in float64, without a gradient, and restored."""
    kind = AUTOREGRESSIVE[name]
    model, fast = two(name)
    exact = copy.deepcopy(model).double()
    truth = outputs(kind, exact, torch.float64)
    before = outputs(kind, model, torch.float32)
    assert_as_accurate(outputs(kind, fast, torch.float32), before, truth)
    assert_close(outputs(kind, copy.deepcopy(fast).double(), torch.float64), truth, 1e-12)
    assert not [walk for walk in walks if walk is vars(swapped_of(fast))["_linfast_plan"].layout]
    with torch.no_grad():
        assert_accurate([v.double() for v in kind.run(fast, *inputs(kind, torch.float32))], truth[:-1])
        wide = kind.run(copy.deepcopy(fast).double(), *inputs(kind, torch.float64))
        assert_close(wide, truth[:-1], 1e-12)
    assert walks[-2] is vars(swapped_of(fast))["_linfast_plan"].layout
    lf.restore(fast)
    for actual, expected in zip(outputs(kind, fast, torch.float32), before, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", DISTINCT)
def test_weights_are_loaded_cast_copied_and_pickled(name, walks):
    kind = AUTOREGRESSIVE[name]
    _, fast = two(name)
    other = make(kind, 1)
    fast.load_state_dict(other.state_dict())
    x, c = (t.detach() for t in inputs(kind, torch.float64))
    fast, other = fast.double(), other.double()
    walks.clear()
    same(fast, other, x, c)
    same(copy.deepcopy(fast), other, x, c)
    assert len(walks) == 2
    if name != "glasflow own scale":  # a lambda is not pickled
        text = pickle.dumps(fast)
        assert b"linfast" not in text
        same(pickle.loads(text), other, x, c)
    same(fast.float(), other.float(), x.float(), c.float(), 1e-5)
    assert len(walks) == 3


@pytest.mark.parametrize("batch", [0, 1, 7, 1500])
@pytest.mark.parametrize(("features", "hidden"), [(2, 50), (5, 16), (12, 4)])
def test_sizes(features, hidden, batch, walks):
    model, fast = affine(features, hidden, context_features=CONTEXT)
    x, c = torch.randn(batch, features).double(), torch.randn(batch, CONTEXT).double()
    fast, model = fast.double(), model.double()
    with torch.no_grad():
        outputs = fast.inverse(x, c)
    assert [*map(list, (o.shape for o in outputs))] == [[batch, features], [batch]]
    assert outputs[0].is_contiguous()
    if batch:  # nflows' own raises an error for none
        same(fast, model, x, c)
        same(fast, model, x)
    assert len(walks) == (3 if batch else 1)


def test_one_feature_is_left_alone():
    """The library's own inverse is one evaluation of the network."""
    transform = require("nflows.transforms").MaskedAffineAutoregressiveTransform(1, 4)
    (row,) = lf.accelerate(transform).left
    assert row.note == "it has one feature: its own inverse is one evaluation of the network"


def test_the_error_is_no_larger_than_the_librarys():
    for features, hidden in ((8, 50), (32, 64)):
        model, fast = affine(features, hidden)
        y = torch.randn(2000, features)
        with torch.no_grad():
            truth = copy.deepcopy(model).double().inverse(y.double())
            for ours, theirs, exact in zip(fast.inverse(y), model.inverse(y), truth, strict=True):
                ratio = float((ours - exact).norm() / (theirs - exact).norm())
                assert ratio < 1.1  # the mean of 64,000 roundings varies by less


def test_a_context_of_equal_rows_is_evaluated_once(walks):
    model, fast = (each.double() for each in affine(context_features=CONTEXT))
    x, c = torch.randn(9, FEATURES).double(), torch.randn(1, CONTEXT).double()
    for given in (c.expand(9, -1), c.repeat(9, 1)):
        same(fast, model, x, given)
    assert [walk.extras(given, 9)[0][0].shape[0] for walk in walks for given in (c.expand(9, -1),)] == [1, 1]
    assert walks[0].extras(c.repeat(9, 1), 9)[0][0].shape[0] == 9
    for each in (fast, model):
        each.requires_grad_(True)
    found = [torch.autograd.grad(m.inverse(x, c.expand(9, -1))[0].sum(), m.parameters()) for m in (fast, model)]
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_other_contexts_are_the_originals(walks):
    model, fast = affine(context_features=CONTEXT)
    bare, fast_bare = affine()
    x = torch.randn(4, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(fast.inverse(x, torch.ones(CONTEXT)), model.inverse(x, torch.ones(CONTEXT)))
        for each in (model, fast):
            with pytest.raises(RuntimeError):
                each.inverse(x, torch.ones(4, CONTEXT + 1))
        for each in (bare, fast_bare):
            with pytest.raises(AttributeError):
                each.inverse(x, torch.ones(4, CONTEXT))
    assert not walks


def _shuffled(module, mask):
    """The masks of another order of the features."""
    linears = [m for m in module.modules() if hasattr(m, "mask")]
    order = torch.arange(FEATURES).flip(0)
    rows = (2 * order[:, None] + torch.arange(2)).flatten()
    return {linears[0]: linears[0].mask[:, order].clone(), linears[-1]: linears[-1].mask[rows].clone()}


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__[1:])
def test_masks_that_are_edited_later_are_followed(write, walks):
    model, fast = (each.double() for each in affine())
    x = torch.randn(5, FEATURES).double()
    same(fast, model, x)
    for each in (model, fast):
        for linear, mask in _shuffled(each, None).items():
            write(linear, "mask", mask)
    same(fast, model, x)
    assert len(walks) == 2
    assert walks[0].masks.order == tuple(range(FEATURES)) == walks[1].masks.order[::-1]
    for each in (model, fast):  # one weight within the order
        write(each.autoregressive_net.initial_layer, "mask", 0 * each.autoregressive_net.initial_layer.mask)
    same(fast, model, x)
    assert len(walks) == 3
    for each in (model, fast):  # half a weight
        linear = each.autoregressive_net.final_layer
        write(linear, "mask", linear.mask / 2)
    same(fast, model, x)
    assert len(walks) == 3
    for each in (model, fast):  # no order
        linear = each.autoregressive_net.initial_layer
        write(linear, "mask", linear.mask + 1)
    same(fast, model, x)
    assert len(walks) == 3


def test_masks_that_were_edited_before_are_compared_or_left():
    model, _ = affine()
    net = model.autoregressive_net
    net.final_layer.mask[3] = 0
    fast = copy.deepcopy(model)
    assert lf.accelerate(fast).swapped
    same(fast.double(), copy.deepcopy(model).double(), torch.randn(5, FEATURES).double())
    net.initial_layer.mask.fill_(1)
    (row,) = lf.accelerate(model).left
    assert "masks are not autoregressive: the parameters of feature" in row.note


def test_two_of_one_class_with_other_masks_are_both_compared(monkeypatch):
    compared = []
    check = CHECK["difference"]
    monkeypatch.setitem(CHECK, "difference", lambda *a: compared.append(1) or check(*a))
    (one, _), (two, _), (three, _) = affine(), affine(), affine()
    three.autoregressive_net.final_layer.mask[3] = 0
    compared.clear()
    assert len(lf.accelerate(nn.ModuleList([one, two, three])).swapped) == 3
    assert len(compared) == 2


def _hook(module):
    module.register_forward_hook(lambda *_: None)


def _parametrize(module):
    nn.utils.parametrizations.weight_norm(module)


def _replace_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) + 1


@pytest.mark.parametrize("change", [_hook, _parametrize, _replace_forward], ids=lambda f: f.__name__[1:])
def test_a_layer_that_was_changed_later_runs_as_the_original_does(change, walks):
    model, fast = (each.double() for each in affine())
    x = torch.randn(5, FEATURES).double()
    for each in (model, fast):
        change(each.autoregressive_net.blocks[0].linear)
    same(fast, model, x)
    assert not walks
    assert not lf.accelerate(fast).swapped


def test_a_hook_that_is_removed_and_one_on_the_transform_itself(walks):
    model, fast = (each.double() for each in affine())
    x = torch.randn(5, FEATURES).double()
    hook = fast.autoregressive_net.register_forward_hook(lambda *_: None)
    same(fast, model, x)
    assert not walks
    hook.remove()
    fast.register_forward_hook(lambda *_: None)  # it does not run around the inverse
    same(fast, model, x)
    same(fast, model, x)
    assert len(walks) == 2
    assert walks[0] is walks[1]


def _activations(net):
    return [net, *net.blocks]


def test_activations_that_are_changed_later(walks):
    """A known one is followed; a function that was not compared runs the original."""
    model, fast = (each.double() for each in affine())
    x = torch.randn(5, FEATURES).double()
    for activation, walked in ((torch.relu, 1), (lambda h: h.softmax(-1), 1), (nn.ELU(), 2)):
        for each in (model, fast):
            for owner in _activations(each.autoregressive_net):
                vars(owner).pop("activation", None)
                owner.activation = activation
        same(fast, model, x)
        assert len(walks) == walked
    for each in (model, fast):
        del each.autoregressive_net.blocks[0].activation
        each.autoregressive_net.blocks[0].activation = torch.tanh  # several activations
    same(fast, model, x)
    assert len(walks) == 2


def test_methods_and_settings_that_are_changed_later(monkeypatch, walks):
    model, fast = (each.double() for each in affine())
    x = torch.randn(5, FEATURES).double()
    for each in (model, fast):
        each._epsilon = 0.5
    same(fast, model, x)
    assert len(walks) == 1
    monkeypatch.setattr(type(model), "_elementwise_inverse", lambda self, x, params: (2 * x, x.sum(1)))
    same(fast, model, x)
    assert len(walks) == 1


@pytest.mark.parametrize("options", [{"dropout_probability": 0.5}, {"use_batch_norm": True}])
def test_what_is_random_in_training_mode_runs_as_the_original_does(options, walks):
    model, fast = (each.double() for each in affine(**options))
    x = torch.randn(5, FEATURES).double()
    for training in (True, False):
        for each in (model, fast):
            each.train(training)
        for each in (model, fast):
            torch.manual_seed(0)
            with torch.no_grad():
                each.inverse(x)  # a batch norm's statistics
        with torch.random.fork_rng():
            torch.manual_seed(1)
            expected = model.inverse(x)
            torch.manual_seed(1)
            torch.testing.assert_close(fast.inverse(x), expected)
    assert len(walks) == 1
    model.train()
    assert lf.accelerate(model).swapped


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (lambda h: h.softmax(-1), "differs from the original"),
        (nn.PReLU(), "its activation PReLU is random or has tensors"),
        (nn.RReLU(), "its activation RReLU is random or has tensors"),
    ],
)
def test_activations_that_a_walk_cannot_run_are_left_alone(activation, reason):
    transform = require("nflows.transforms").MaskedAffineAutoregressiveTransform
    (row,) = lf.accelerate(transform(FEATURES, 16, activation=activation)).left
    assert reason in row.note


def test_other_networks_are_left_alone():
    flows = require("normflows").flows
    circular = flows.CircularAutoregressiveRationalQuadraticSpline(4, 1, 8, ind_circ=[1])
    (row,) = lf.accelerate(circular).left
    assert row.note == "it preprocesses its inputs, by a PeriodicFeaturesElementwise"
    model, _ = affine()
    model.autoregressive_net.final_layer.mask.mul_(0.5)
    (row,) = lf.accelerate(model).left
    assert row.note == "its masks have other values than 0 and 1"
    model.autoregressive_net.blocks[0].dropout = nn.AlphaDropout(0.5)
    (row,) = lf.accelerate(model).left
    assert row.note == "its MADE has a AlphaDropout"


def test_a_gradient_that_the_check_cannot_afford_is_the_originals(monkeypatch, walks):
    monkeypatch.setattr(masked, "_MOST_COMPARED", 0)
    model, fast = (each.double() for each in affine())
    x = torch.randn(5, FEATURES).double()
    torch.testing.assert_close(fast.inverse(x), model.inverse(x), rtol=0, atol=0)
    assert "where a gradient is required, its own code runs" in lf.accelerate(fast).swapped[0].note


def test_forward_and_training_are_untouched():
    model, fast = affine()
    assert type(fast).forward is type(model).forward
    assert "inverse" in vars(type(fast))
    assert isinstance(fast, type(model))


def test_the_report_says_what_runs():
    _, fast = affine()
    (row,) = lf.accelerate(fast).rows
    assert row.runs == "inverse in one walk over 6 degrees, affine, softplus; MADE 6-16-16-16-12 tanh"
    assert row.was == "nflows MaskedAffineAutoregressiveTransform"
    assert 0 < row.error < 1e-5


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_in_a_chain(memory, walks):
    """Beside couplings, whose loop calls it; with memory="invert" its chain stores, as before."""
    nflows, nets = require("nflows.transforms"), require("nflows.nn.nets")
    torch.manual_seed(0)

    def coupling(mask):
        return nflows.AffineCouplingTransform(
            mask, lambda i, o: nets.ResidualNet(i, o, hidden_features=8, context_features=CONTEXT)
        )

    model = nflows.CompositeTransform(
        [
            coupling([1, -1] * 3),
            nflows.MaskedAffineAutoregressiveTransform(FEATURES, 16, context_features=CONTEXT),
            nflows.RandomPermutation(FEATURES),
            coupling([-1, 1] * 3),
        ]
    ).double()
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast, memory=memory)
    assert "_transforms.1" in [row.path for row in report.swapped]
    x, c = torch.randn(5, FEATURES).double(), torch.randn(5, CONTEXT).double()
    same(fast, model, x, c)
    assert len(walks) == 1
    found = [torch.autograd.grad(m(x, c)[0].sum(), m.parameters(), allow_unused=True) for m in (fast, model)]
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("name", ["nflows", "normflows batch norm", "normflows spline"])
def test_it_can_do_what_the_original_can(name, operation):
    kind = AUTOREGRESSIVE[name]
    original, fast = (Run(kind, model) for model in two(name))
    x, c = inputs(kind, torch.float32)
    expected = _attempt(operation, original, x, c)
    if isinstance(expected, Exception):
        return  # the original cannot either
    for actual, value in zip(operation(fast, x, c), expected, strict=True):
        assert actual.shape == value.shape
        assert relative(actual, value) < 1e-4
    lf.restore(fast)
    assert not any(isinstance(m, Swapped) or "_linfast_plan" in vars(m) for m in fast.modules())


def test_transforms_of_torch_func_run_the_librarys_code(walks):
    model, fast = (each.double().requires_grad_(False) for each in affine())
    x = torch.randn(5, FEATURES).double()
    same(fast, model, x)
    walks.clear()
    tangents = [torch.func.jvp(m.inverse, (x,), (torch.ones_like(x),))[1] for m in (fast, model)]
    torch.testing.assert_close(*tangents)
    rows = [torch.func.vmap(lambda y, m=m: m.inverse(y[None])[0])(x) for m in (fast, model)]
    torch.testing.assert_close(*rows)
    assert not walks


def test_the_kernel_runs_it(walks):
    model, fast = affine(3, 8, context_features=CONTEXT)
    y, c = torch.randn(5, 3), torch.randn(1, CONTEXT).expand(5, -1)
    with lf.backend("triton"), torch.no_grad():
        found = fast.inverse(y, c)
    for actual, expected in zip(found, model.inverse(y, c), strict=True):
        torch.testing.assert_close(actual, expected)
    assert not walks


def test_an_activation_that_writes_to_its_input_is_left_alone_in_residual_blocks():
    transform = require("normflows").flows.MaskedAffineAutoregressive
    activation = nn.ReLU(inplace=True)
    (row,) = lf.accelerate(transform(FEATURES, 16, activation=activation)).left
    assert row.note == "its activation writes to the input of its residual blocks"
    model = transform(FEATURES, 16, activation=activation, use_residual_blocks=False).double()
    fast = copy.deepcopy(model)
    assert lf.accelerate(fast).swapped
    same(fast, model, torch.randn(5, FEATURES).double())


def grads(run, *wanted):
    """The gradients of a sum of the outputs, zeros where there are none."""
    found = torch.autograd.grad(sum(each.sin().sum() for each in run()), wanted, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def test_a_caller_may_write_to_what_it_gave_and_got():
    model, fast = (each.double() for each in affine())
    found = []
    for each in (fast, model):
        y = torch.ones(5, FEATURES).double()
        x, log_det = each.inverse(y)
        y.mul_(2)
        x.mul_(2)
        log_det.mul_(2)
        found.append(grads(lambda x=x, log_det=log_det: (x, log_det), *each.parameters()))
    assert_close(*found, 1e-11)


def test_the_gradient_of_a_context_that_is_a_view_of_one_row():
    model, fast = (each.double() for each in affine(context_features=CONTEXT))
    x, found = torch.randn(5, FEATURES).double(), []
    c = torch.randn(1, CONTEXT).double().requires_grad_()
    for each in (fast, model):
        rows = c.expand(5, -1)
        found.append(grads(lambda each=each, rows=rows: each.inverse(x, rows), rows, c))
    assert_close(*found, 1e-11)


def _learned(alpha):
    yield affine(activation=lambda h: torch.tanh(alpha * h))
    transforms = pytest.importorskip("glasflow.nflows.transforms.autoregressive")
    for scale in (lambda raw: alpha * raw.sigmoid() + 1e-3, lambda raw: (raw * alpha + 2).sigmoid() + 1e-3):
        model = transforms.MaskedAffineAutoregressiveTransform(FEATURES, 8, scale_activation=scale)
        fast = copy.deepcopy(model)
        assert lf.accelerate(fast).swapped
        yield model, fast


def test_a_tensor_that_a_function_holds_keeps_its_gradient(walks):
    """Also where its values are now those of a map that linfast knows by name, as of the last one."""
    x, alpha = torch.randn(5, FEATURES).double(), nn.Parameter(torch.ones(()).double())
    for model, fast in _learned(alpha):
        found = []
        for each in (fast.double(), model.double()):
            each.requires_grad_(False)
            found.append(grads(lambda each=each: each.inverse(x), alpha))
        assert_close(*found, 1e-12)
        with torch.no_grad():
            alpha.mul_(0.9)
        walks.clear()
        same(fast, model, x)
        assert len(walks) == 1
        with torch.no_grad():
            alpha.fill_(1)


@pytest.mark.parametrize(("features", "least"), [(2, (256, 2048)), (3, (64, 1024)), (9, (0, 0))])
def test_short_batches_run_the_original(features, least, walks, monkeypatch):
    model, fast = affine(features)
    monkeypatch.setattr(_asked, "all_lengths", False)
    op, ours = masked.MaskedInverse._by_op, []
    monkeypatch.setattr(masked.MaskedInverse, "_by_op", lambda *a: ours.append(1) or op(*a))
    threads = torch.get_num_threads()
    for i, graph in enumerate((False, True)):
        for batch in {1, max(1, least[i] * threads - 1), max(1, least[i] * threads)}:
            x = torch.randn(batch, features)
            walks.clear(), ours.clear()
            with torch.set_grad_enabled(graph):
                found, expected = fast.inverse(x), model.inverse(x)
            is_ours = batch >= least[i] * threads
            assert (len(walks), len(ours)) == (is_ours * (not graph), is_ours * graph)
            if not is_ours:
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


def _another_shape(net):
    net.initial_layer.weight.data = torch.randn(
        16, 1
    ).double()  # the original's product with the mask broadcasts it


def _another_dtype(net):
    net.final_layer.float()


def _another_bias(net):
    net.final_layer.bias.data = torch.randn(1).double()


def _unhashable(net):
    for owner in (net, *net.blocks):
        owner.activation = _Unhashable()


def _third_layer(net):
    net.blocks[0].linear_layers.append(copy.deepcopy(net.blocks[0].linear_layers[0]))


class _Unhashable:
    __hash__ = None

    def __call__(self, h):
        return torch.tanh(h)


@pytest.mark.parametrize("change", [_another_shape, _another_bias, _another_dtype, _unhashable, _third_layer])
def test_a_network_that_no_longer_fits_runs_the_original(change, walks):
    model, fast = (each.double() for each in affine(use_residual_blocks=change is _third_layer))
    x = torch.randn(5, FEATURES).double()
    found = []
    for each in (model, fast):
        torch.manual_seed(0)
        for owner in _activations(each.autoregressive_net):
            vars(owner).pop("activation", None)
            owner.activation = torch.tanh
        change(each.autoregressive_net)
        try:
            with torch.no_grad():
                found.append(each.inverse(x))
        except Exception as error:
            found.append((type(error), str(error)))
    assert not walks
    if isinstance(found[0][0], torch.Tensor):
        assert_close(*found, 0)
    assert isinstance(found[0][0], torch.Tensor) or found[0] == found[1]


def test_the_precision_that_was_asked_for(monkeypatch):
    model, _ = affine()
    assert "precision 'high' reaches 1 of them" in str(lf.accelerate(model, precision="high"))
    asked, op = [], masked.masked_autoregressive
    monkeypatch.setattr(
        masked, "masked_autoregressive", lambda *a, **k: asked.append(k["precision"]) or op(*a, **k)
    )
    model.inverse(torch.randn(5, FEATURES))
    assert asked == ["high"]
    spline = make(AUTOREGRESSIVE["normflows spline"], 0)
    assert "precision 'high' reaches 0 of them" in str(lf.accelerate(spline, precision="high"))


@pytest.mark.parametrize("name", ["nflows", "normflows spline"])
def test_a_model_is_freed_without_the_collector(name):
    _, fast = two(name)
    alive = weakref.ref(swapped_of(fast))
    gc.collect()
    gc.disable()
    try:
        del fast
        assert alive() is None
    finally:
        gc.enable()


def test_the_check_allows_the_precision_that_was_asked_for(monkeypatch):
    model, _ = affine(3, 8)
    monkeypatch.setitem(verify._TOLERANCES, torch.float32, 1e-6)
    with lf.backend("triton"):
        (row,) = lf.accelerate(model, precision="fast").rows
    assert row.swapped, row.note
    assert row.error > 10 * 1e-6  # what is allowed in full precision
