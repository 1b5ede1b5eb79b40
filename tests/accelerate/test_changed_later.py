"""Changes after accelerate take effect: masks, settings, methods and parametrizations."""

from __future__ import annotations

import copy
import functools
import sys

import numpy as np
import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate.libraries import freia
from tests.laws.zoo import relative

from . import stand_in
from .test_usable import Run
from .zoo import FEATURES, KINDS, inputs, make, net, require


def _other_masks(model, write):
    """Invert every mask, and reverse half of each fixed permutation, which is then no longer a permutation."""
    for module in model.modules():
        for name, tensor in (*module._buffers.items(), *module._parameters.items()):
            if "w_perm" in name:
                write(module, name, tensor.lerp(tensor.flip(0), 0.5))
            elif tensor is not None and tensor.dtype == torch.long:
                write(module, name, (FEATURES - 1 - tensor).flip(0))
            elif tensor is not None and name in ("mask", "b"):
                write(module, name, tensor.flip(-1))


def _in_place(module, name, value):
    """As nn.parallel.DistributedDataParallel copies the masks of the first process to all others."""
    with torch.no_grad():
        getattr(module, name).copy_(value)


def _by_data(module, name, value):
    """As weight averages are often written; torch's version counters do not change."""
    getattr(module, name).data.copy_(value)


def _replaced(module, name, value):
    own = module._buffers if name in module._buffers else module._parameters
    own[name] = nn.Parameter(value, False) if own is module._parameters else value


WRITES = (_in_place, _by_data, _replaced)
MASKED = ("zuko random masks", "nflows Affine MLP gather", "normflows masked gather", "FrEIA all in one")


def _eager(run, x, c):
    return run


def _compiled_once(run, x, c):
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager")
    compiled(x, c)
    return compiled


# Every model and every way to write, each of which torch.compile guards in one way.
COMPILED = zip(MASKED, (_by_data, _replaced, _in_place, _by_data), strict=True)


@pytest.mark.parametrize(
    ("name", "write", "once"),
    [
        *((name, write, _eager) for name in MASKED for write in WRITES),
        *((name, write, _compiled_once) for name, write in COMPILED),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__[1:],
)
def test_a_mask_that_is_written_to_is_followed(name, write, once):
    kind = KINDS[name]
    original, (x, c) = Run(kind, make(kind, 0)), inputs(kind, torch.float32)
    fast = copy.deepcopy(original)
    assert lf.accelerate(fast).swapped
    run, before = once(fast, x, c), original(x, c)
    for model in (original, fast):
        _other_masks(model, write)
    expected = original(x, c)
    assert all(relative(a, b) > 1e-2 for a, b in zip(before[:1], expected[:1], strict=True))
    for actual, value in zip(run(x, c), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5)


def test_what_was_traced_reads_the_masks_it_is_given():
    nf = require("normflows")
    torch.manual_seed(0)
    one, two = (
        nf.flows.MaskedAffineFlow(torch.tensor(mask), nf.nets.MLP([4, 8, 4]), nf.nets.MLP([4, 8, 4]))
        for mask in ([1.0, 0, 0, 1], [0.0, 1, 1, 0])
    )
    x = torch.randn(5, 4)
    expected = two(x)[0]
    lf.accelerate(one)
    traced = torch.jit.trace(one, x, check_trace=False)
    traced.load_state_dict(two.state_dict())
    torch.testing.assert_close(traced(x)[0], expected)


def test_an_ensemble_has_each_models_own_masks():
    nf = require("normflows")
    torch.manual_seed(0)
    masks = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
    models = [nf.flows.MaskedAffineFlow(b, nf.nets.MLP([4, 8, 4]), nf.nets.MLP([4, 8, 4])) for b in masks]
    x = torch.randn(5, 4)
    expected = torch.stack([model(x)[0] for model in models])
    for model in models:
        lf.accelerate(model)
    state = torch.func.stack_module_state(models)
    found = torch.func.vmap(lambda *state: torch.func.functional_call(models[0], state, (x,))[0])(*state)
    torch.testing.assert_close(found, expected)


def test_a_distribution_made_before_is_zukos_to_the_end():
    """It keeps the features of its mask, as zuko's own does, even if its model is restored later."""
    flow = require("zuko").flows.RealNVP(FEATURES, 3, transforms=2, hidden_features=(16,))
    lf.accelerate(flow)
    x, c = torch.randn(5, FEATURES), torch.randn(3)
    distribution = flow(c)
    expected = distribution.log_prob(x)
    for layer in flow.transform.transforms:
        layer.mask.data.logical_not_()
    flow(c)
    torch.testing.assert_close(distribution.log_prob(x), expected)
    lf.restore(flow)
    torch.testing.assert_close(distribution.log_prob(x), expected)


SETTINGS = {
    "FrEIA GLOWCouplingBlock ATAN": ("clamp", lambda: 0.3),
    "FrEIA RNVPCouplingBlock TANH": ("f_clamp", lambda: lambda raw: 0.636 * torch.atan(raw)),
    "glasflow": ("scale_activation", lambda: torch.exp),
    "zuko": (
        "univariate",
        lambda: functools.partial(sys.modules["zuko.transforms"].MonotonicAffineTransform, slope=0.1),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_changed_later_is_followed(name):
    kind, (attribute, value) = KINDS[name], SETTINGS[name]
    original, x = make(kind, 0), inputs(kind, torch.float32)
    fast = copy.deepcopy(original)
    lf.accelerate(fast)
    for model in (original, fast):
        changed = [module for module in model.modules() if hasattr(module, attribute)]
        assert changed
        for module in changed:
            setattr(module, attribute, value())
    for actual, expected in zip(kind.run(fast, *x), kind.run(original, *x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if "FrEIA" in name:
        followed = [c.side.tail.scale_map for c in fast._linfast_plan.fused.couplings]
        lf.accelerate(fast)  # what kernels, which run on a GPU, are given
        assert followed == [c.side.tail.scale_map for c in fast._linfast_plan.fused.couplings]


def test_a_setting_changed_since_a_compilation_is_followed(monkeypatch):
    kind = KINDS["FrEIA GLOWCouplingBlock ATAN"]
    original, x = Run(kind, make(kind, 0)), inputs(kind, torch.float32)
    fast = copy.deepcopy(original)
    lf.accelerate(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    compiled(*x)
    for model in (original, fast):
        for module in model.modules():
            if hasattr(module, "clamp"):
                module.clamp = 0.3
    monkeypatch.setattr(freia, "couple", lambda *given, **named: pytest.fail("runs by a plan of before"))
    for actual, expected in zip(compiled(*x), original(*x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_raise_the_librarys_own_error():
    transforms, nets, nf = require("nflows.transforms"), require("nflows.nn.nets"), require("normflows")
    affine = transforms.AffineCouplingTransform([1, 0] * 3, lambda i, o: nets.ResidualNet(i, o, 8))
    spline = transforms.PiecewiseRationalQuadraticCouplingTransform(
        [1, 0] * 3, lambda i, o: nets.ResidualNet(i, o, 8), tails="linear"
    )
    chain = transforms.CompositeTransform([spline, spline])
    for model in (affine, spline, chain, nf.flows.AffineCouplingBlock(net(3, 6))):
        fast = copy.deepcopy(model)
        assert lf.accelerate(fast).swapped
        for arguments in ((), (torch.randn(4, FEATURES), None, None, None, None)):
            with pytest.raises(TypeError) as wanted:
                model(*arguments)
            with pytest.raises(TypeError) as found:
                fast(*arguments)
            assert str(found.value) == str(wanted.value)


def test_arguments_by_keyword_and_methods_replaced_later():
    nflows, nets = require("nflows.transforms"), require("nflows.nn.nets")
    layer = nflows.AffineCouplingTransform([1, 0] * 3, lambda i, o: nets.ResidualNet(i, o, 8))
    x = torch.randn(3, FEATURES)
    expected = layer(inputs=x, context=None)[0]
    lf.accelerate(layer)
    torch.testing.assert_close(layer(inputs=x, context=None)[0], expected)
    layer._scale_and_shift = lambda params: (params[:, :3].exp(), params[:, 3:])
    torch.testing.assert_close(layer(x)[0], type(layer)._linfast_original.forward(layer, x)[0])
    nf = require("normflows")
    block = nf.flows.AffineCouplingBlock(net(3, 6))
    expected = block(z=x)[0]
    lf.accelerate(block)
    torch.testing.assert_close(block(z=x)[0], expected)
    block.flows[1].forward = lambda z: (z, 0)
    torch.testing.assert_close(block(x)[0], x)


def test_a_layer_that_was_parametrized_later_is_copied():
    mix, x = stand_in.Inv1x1Conv(3), torch.randn(2, 3, 4, 4)
    lf.accelerate(mix)
    nn.utils.parametrizations.orthogonal(mix, "W")
    copied = copy.deepcopy(mix)
    torch.testing.assert_close(copied(x), mix(x))
    torch.testing.assert_close(copied.inverse(copied(x)), x)
    nn.utils.parametrize.remove_parametrizations(mix, "W")
    lf.restore(mix)
    assert type(mix) is stand_in.Inv1x1Conv


PATCHES = {
    "_permute": lambda x, rev=False: (x, 0.0),
    "_pre_permute": lambda x, rev=False: x,
    "_affine": lambda x, a, rev=False: (x, torch.zeros(3)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_method_that_the_original_calls_is_put_on_the_block_later(name):
    blocks = require("FrEIA.modules")
    np.random.seed(0)  # noqa: NPY002  # which the library draws its permutation from
    block, x = blocks.AllInOneBlock([(4,)], subnet_constructor=net, reverse_permutation=True), torch.randn(3, 4)
    fast = copy.deepcopy(block)
    assert lf.accelerate(fast).swapped
    for patched in (block, fast):
        setattr(patched, name, PATCHES[name])
    torch.testing.assert_close(fast((x,))[0][0], block((x,))[0][0])
    assert lf.accelerate(fast).left
