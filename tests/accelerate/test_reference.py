"""Training and sampling of the research repository on an accelerated model; its defects, fixed or kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.precision import full_precision

from . import stand_in
from .test_libraries import relative
from .zoo import TRAINED


def _model(train=True, depth=1):
    torch.manual_seed(0)
    return stand_in.build(depth).train(train)


def _losses(accelerated: bool, train: bool, steps: int):
    """The losses of training steps on fixed images, from one seed."""
    matcher = stand_in.FlowMatcher(_model(train=train))
    if accelerated:
        assert not lf.accelerate(matcher).left
    return stand_in.train(matcher, torch.optim.SGD(matcher.linearizer.parameters(), 1e-2), steps)


@pytest.mark.parametrize(("train", "steps"), TRAINED)
def test_training_steps_have_the_same_losses(train, steps):
    before = _losses(False, train, steps)
    torch.testing.assert_close(_losses(True, train, steps), before, rtol=1e-5, atol=0)
    assert before[-(steps // 3) :].mean() < 0.97 * before[: steps // 3].mean()  # it learns


def _sampler(keep=()):
    model = _model(train=False, depth=2)
    with torch.no_grad():
        model.gx(torch.randn(16, 1, 8, 8))
    matcher = stand_in.FlowMatcher(model)
    original = copy.deepcopy(matcher)
    report = lf.accelerate(matcher, keep_defects=keep)
    return matcher, original, report


def _exact_steps(matcher, x, method):
    """The many steps of the original, in float64."""
    exact = stand_in.FlowMatcher(copy.deepcopy(matcher.linearizer).double())
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of the times that it makes
    try:
        return exact.sample(x.double(), "cpu", 12, method)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("method", ["euler", "rk"])
def test_one_step_is_all_steps(method):
    matcher, original, report = _sampler()
    x = torch.randn(3, 1, 8, 8)
    steps = _exact_steps(original, x, method)
    assert relative(matcher.sample(x, "cpu", 12, method).double(), steps) < 2e-6
    assert relative(matcher.sample_one_step(x, "cpu", method, 12).double(), steps) < 5e-6
    B = matcher.get_sampling_terms("cpu", 12, method)
    assert B.is_contiguous()
    assert relative(matcher.sample_one_step(x, "cpu", method, 12, B=B).double(), steps) < 5e-6
    theirs = original.sample_one_step(x, "cpu", method, 12).double()
    assert (relative(theirs, steps) < 5e-6) == (method == "euler")
    assert report.rows[0].note == "fixed: the one step of rk is its many steps"


def test_the_collapse_can_be_kept_as_it_was():
    matcher, original, report = _sampler(keep=["rk_collapse"])
    x = torch.randn(3, 1, 8, 8)
    for method in ("rk", "euler"):
        B = original.get_sampling_terms("cpu", 12, method)
        assert relative(matcher.get_sampling_terms("cpu", 12, method), B) < 2e-6
        theirs = original.sample_one_step(x, "cpu", method, 12)
        assert relative(matcher.sample_one_step(x, "cpu", method, 12), theirs) < 1e-5
    assert report.rows[0].note.startswith("kept:")


def test_a_matcher_is_restored_whole():
    matcher, original, _ = _sampler()
    lf.restore(matcher)
    assert type(matcher) is stand_in.FlowMatcher
    assert vars(matcher).keys() == vars(original).keys()
    kinds = [type(m) for m in original.linearizer.modules()]
    assert [type(m) for m in matcher.linearizer.modules()] == kinds


def test_a_matcher_of_another_linear_network_is_left_alone():
    model = _model()
    model.linear_network = nn.Identity()
    report = lf.accelerate(stand_in.FlowMatcher(model))
    assert "its linear network is a Identity" in report.left[0].note


def _loaded(accelerate_first: bool, keep=()):
    """The result of a fresh ActNorm, into which the state of an initialised one was loaded."""
    source = stand_in.ActNorm2d(3)
    first, other = 3 + 2 * torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    source(first)
    fresh = stand_in.ActNorm2d(3)
    if accelerate_first:
        report = lf.accelerate(fresh, keep_defects=keep)
    fresh.load_state_dict(source.state_dict())
    if not accelerate_first:
        report = lf.accelerate(fresh, keep_defects=keep)
    return report.rows[0], fresh(other), source(other), source.inverse(other), fresh.inverse(other)


@pytest.mark.parametrize("accelerate_first", [True, False])
def test_a_loaded_actnorm_is_not_initialised_again(accelerate_first):
    row, actual, expected, inverse, actual_inverse = _loaded(accelerate_first)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_inverse, inverse)
    assert row.note.startswith("fixed:") is not accelerate_first


@pytest.mark.parametrize("accelerate_first", [True, False])
def test_a_loaded_actnorm_can_be_kept_as_it_was(accelerate_first):
    row, actual, expected, _, _ = _loaded(accelerate_first, keep=["actnorm_reinit"])
    assert not torch.allclose(actual, expected)
    torch.testing.assert_close(actual.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert row.note.startswith("kept:")


def test_a_fresh_actnorm_is_initialised_by_its_first_batch():
    fresh, other = stand_in.ActNorm2d(3), stand_in.ActNorm2d(3)
    lf.accelerate(fresh)
    fresh.load_state_dict(other.state_dict())
    x = 3 + 2 * torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(fresh(x), other(x))
    assert fresh.initialized


def test_one_time_for_the_batch_is_embedded_once():
    model, seen = _model(train=False), []
    lf.accelerate(model)
    model.net_gx.g.blocks[0].F.cond.net.map_noise.register_forward_hook(
        lambda m, args, out: seen.append(len(args[0]))
    )
    model.gx(torch.randn(5, 1, 8, 8))
    model.net_gx.g(torch.randn(5, 1, 8, 8), torch.linspace(0, 1, 5))
    assert seen == [1, 5]


def test_an_accelerated_unet_compiles_whole():
    unet = stand_in.SongUNetWrapper(stand_in.SongUNet(2, 4)).eval()
    x, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    expected = unet(x, t)
    assert not lf.accelerate(unet).left
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x, t), expected) < 2e-6


def test_an_unknown_mode_still_raises():
    model = _model()
    lf.accelerate(model)
    with pytest.raises(NotImplementedError):
        model.net_gx(torch.randn(2, 1, 8, 8), mode="gz")


@pytest.mark.parametrize("resample", [{}, {"down": True}, {"up": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unet_blocks(resample, dtype):
    torch.manual_seed(0)
    block = stand_in.UNetBlock(8, 16, 4, attention=True, **resample).to(dtype)
    x, emb = torch.randn(3, 8, 6, 6, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    torch.manual_seed(1)
    expected = block(x, emb)
    assert lf.accelerate(block).rows[0].swapped
    torch.manual_seed(1)  # the same dropout
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert relative(block(x, emb), expected) < tolerance


def test_an_adaptive_block_is_left_alone():
    block = stand_in.UNetBlock(8, 16, 4, adaptive=True)
    assert "adaptive scale" in lf.accelerate(block).left[0].note


def test_a_setting_that_is_changed_later_is_followed():
    block, x, emb = stand_in.UNetBlock(8, 8, 4, attention=True), torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    original = copy.deepcopy(block)
    lf.accelerate(block)
    for name, value in (("dropout", 0.5), ("skip_scale", 1.0)):  # of which the second cannot be run
        results = []
        for b in (block, original):
            setattr(b, name, value)
            torch.manual_seed(1)
            results.append(b(x, emb))
        assert relative(*results) < 2e-6
    assert type(block) is stand_in.UNetBlock


def test_an_unusual_resampling_filter_is_left_alone():
    block = stand_in.UNetBlock(4, 4, 4, down=True)
    block.conv0.resample_filter[0, 0, 0, 0] = 0.5
    assert "a resampling filter that is not [1, 1]" in lf.accelerate(block).left[0].note


def test_the_style_kernel_is_a_depthwise_convolution():
    torch.manual_seed(0)
    layer = stand_in.LinearKernel()
    x, t = torch.randn(2, 3, 9, 8), torch.rand(2)
    expected = layer(x, t=t)
    assert lf.accelerate(layer).rows[0].runs == "depthwise convolution"
    torch.testing.assert_close(layer(x, t=t), expected)


def test_a_block_runs_on_the_kernels():
    torch.manual_seed(0)
    block = stand_in.InvUnetBlock(4).eval()
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    expected = block(x, t)
    assert not lf.accelerate(block).left
    with lf.backend("triton"), full_precision():
        assert relative(block(x, t), expected) < 2e-6
        assert relative(block.inverse(expected[:1], t[:1]), x[:1]) < 1e-5


def _frozen_model():
    model = _model(train=False)
    with torch.no_grad():
        model.gx(torch.randn(16, 1, 8, 8))
    original = copy.deepcopy(model)
    assert not lf.accelerate(model).left
    return model, original


def test_known_times_and_inverse_mixes_are_computed_once_inside_freeze(monkeypatch):
    model, original = _frozen_model()
    block = model.net_gx.g.blocks[0]
    net, calls, inverses, inv = block.F.cond.net, [], [], torch.linalg.inv_ex
    net.map_layer0.register_forward_hook(lambda *a: calls.append("embedding"))
    net.enc["4x4_block0"].affine.register_forward_hook(lambda *a: calls.append("affine"))
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda W: inverses.append(W) or inv(W))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), lf.freeze(model):
        for _ in range(2):
            for method in ("gx", "gy", "gx_inverse"):
                assert relative(getattr(model, method)(x), getattr(original, method)(x)) < 2e-6
    assert sorted(calls) == 2 * ["affine"] + 2 * ["embedding"]  # at 0 and at 1
    assert len([W for W in inverses if W is block.mix.W]) == 1


def test_nothing_is_kept_outside_of_freeze_or_of_gradients():
    model, original = _frozen_model()
    x, calls = torch.randn(2, 1, 8, 8), []
    model.net_gx.g.blocks[0].F.cond.net.map_layer0.register_forward_hook(lambda *a: calls.append("embedding"))
    with lf.freeze(model):
        model.gx(x).square().sum().backward()
    original.gx(x).square().sum().backward()
    for own, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert (own.grad is None) == (theirs.grad is None)
    embedding = [m.net_gx.g.blocks[0].F.cond.net.map_layer0.weight.grad for m in (model, original)]
    assert relative(*embedding) < 1e-4
    calls.clear()
    with torch.no_grad():
        for _ in range(2):
            for m in (model, original):
                for parameter in m.parameters():
                    parameter.data.mul_(1.1)
            assert relative(model.gx_inverse(x), original.gx_inverse(x)) < 2e-6
    assert len(calls) == 2


def test_freezing_a_part_keeps_no_weights_of_another():
    """Only the U-Net block is frozen: the weights of its embedding may change."""
    model, original = _frozen_model()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), lf.freeze(model.net_gx.g.blocks[0].F.cond.net.enc):
        for _ in range(2):
            for m in (model, original):
                m.net_gx.g.blocks[0].F.cond.net.map_layer0.weight.data.mul_(1.5)
            assert relative(model.gx(x), original.gx(x)) < 2e-6


def test_autocast_keeps_a_separate_embedding():
    model, original = _frozen_model()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), lf.freeze(model):
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(model.gx(x), original.gx(x)) < 2e-2
        assert relative(model.gx(x), original.gx(x)) < 2e-6
