"""Classes with the research repository's names: swapped where they compute the same, else left with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import linfast as lf
from tests.laws.zoo import relative

from . import stand_in


def _matcher(cls):
    torch.manual_seed(0)
    model = stand_in.build(1)
    with torch.no_grad():
        model.gx(torch.randn(4, 1, 8, 8))
    return cls(model.eval())


def _fork(**methods):
    for name, method in methods.items():
        method.__qualname__ = f"FlowMatcher.{name}"
    return type("FlowMatcher", (stand_in.FlowMatcher,), methods)


def _terms(self, device, T=100, sampling_method="euler"):
    """Ralston's "rk"."""
    if sampling_method == "euler":
        return stand_in.FlowMatcher.get_sampling_terms(self, device, T, sampling_method)
    B = eye = torch.eye(self.linearizer.net_gy.dim)
    for t in (i / T for i in range(T - 1)):
        first, second = (
            (self.linearizer.linear_network.get_lin_t(torch.full((1,), at))[0] - eye) / (1 - at) / T
            for at in (t, t + 2 / 3 / T)
        )
        B = B @ (eye + 0.25 * first + 0.75 * (eye + 2 / 3 * first) @ second)
    return B.detach()


def _of_latent_size(self, device, T=100, sampling_method="euler"):
    self.linearizer.net_gy.dim = self.latent_size
    return stand_in.FlowMatcher.get_sampling_terms(self, device, T, sampling_method)


def _defaults(self, x, device, sampling_method="euler", T=7, B=None):
    return stand_in.FlowMatcher.sample_one_step(self, x, device, sampling_method, T, B)


def _another_argument(self, x, device, sampling_method="rk", T=100, B=None, scale=1.0):
    return scale * stand_in.FlowMatcher.sample_one_step(self, x, device, sampling_method, T, B)


def _many_steps(self, x, device, sampling_method="rk", T=100, B=None):
    if sampling_method == "rk":
        return self.sample(x, device, T, "rk")
    return stand_in.FlowMatcher.sample_one_step(self, x, device, sampling_method, T, B)


def _in_its_mode(self, x, device, sampling_method="rk", T=100, B=None):
    with torch.no_grad():
        B = self.get_sampling_terms(device, T, sampling_method) if B is None else B
        z = self.linearizer.gy(x)
        return self.linearizer.gx_inverse((z.flatten(1) @ B.to(z)).view_as(z))


def _back_to_its_mode(self, x, device, sampling_method="rk", T=100, B=None):
    training = self.linearizer.training
    y = stand_in.FlowMatcher.sample_one_step(self, x, device, sampling_method, T, B)
    self.linearizer.train(training)
    return y


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (_fork(get_sampling_terms=_terms), 'its "rk" is a scheme of its own'),
        (_fork(sample_one_step=_defaults), "takes other arguments"),
        (_fork(sample_one_step=_another_argument), "takes other arguments"),
        (_fork(sample_one_step=_many_steps), "another class called FlowMatcher"),
        (_fork(sample_one_step=_in_its_mode), "its one step leaves its model in train mode"),
        (_fork(sample_one_step=_back_to_its_mode), "its one step leaves its model in train mode"),
        (type("FlowMatcher", (), {"__init__": stand_in.FlowMatcher.__init__}), "its get_sampling_terms is missing"),
    ],
    ids=["scheme", "defaults", "argument", "many steps", "mode", "mode put back", "missing"],
)
def test_another_flow_matcher_is_left_alone_with_a_reason(cls, why):
    matcher, x = _matcher(cls), torch.randn(2, 1, 8, 8)
    before = matcher.sample_one_step(x, "cpu") if hasattr(cls, "sample_one_step") else None
    row = lf.accelerate(matcher).rows[0]
    assert row.runs is None
    assert why in row.note
    assert "Error" not in row.note
    if before is not None:
        torch.testing.assert_close(matcher.sample_one_step(x, "cpu"), before, rtol=1e-4, atol=1e-4)


def test_a_fork_with_another_matrix_width_is_swapped():
    matcher, x = _matcher(_fork(get_sampling_terms=_of_latent_size)), torch.randn(2, 1, 8, 8)
    matcher.latent_size = 64
    expected = matcher.sample_one_step(x, "cpu", "euler", 9)
    assert lf.accelerate(matcher).rows[0].swapped
    assert relative(matcher.sample_one_step(x, "cpu", "euler", 9), expected) < 1e-5


def test_a_copied_class_is_compared_in_both_modes():
    class TimeDependentLoRALinearLayer(stand_in.TimeDependentLoRALinearLayer):
        def forward(self, x, **kwargs):
            return nn.functional.dropout(super().forward(x, **kwargs), 0.5, self.training)

    TimeDependentLoRALinearLayer.__qualname__ = "TimeDependentLoRALinearLayer"
    TimeDependentLoRALinearLayer.forward.__qualname__ = "TimeDependentLoRALinearLayer.forward"
    (row,) = lf.accelerate(TimeDependentLoRALinearLayer(6, 2).eval()).rows
    assert "it differs from the original" in row.note


def test_a_flag_that_is_a_buffer_is_left_to_its_class():
    class ActNorm2d(stand_in.ActNorm2d):
        def __init__(self, C):
            super().__init__(C)
            del self.initialized
            self.register_buffer("initialized", torch.tensor(False))

        def _init(self, x):
            with torch.no_grad():
                self.bias.copy_(-x.mean((0, 2, 3), keepdim=True))
            self.initialized.fill_(True)

    ActNorm2d.__qualname__ = "ActNorm2d"
    fork, x = ActNorm2d(3), 3 + torch.randn(4, 3, 5, 5)
    assert lf.accelerate(fork).rows[0].swapped
    assert fork(x).mean().abs() < 1e-5
    assert fork.state_dict()["initialized"]


def _raises(*_):
    raise RuntimeError("call fit() first")


ATTRIBUTES = {
    "Inv1x1Conv": ("W",),
    "ActNorm2d": ("bias", "log_scale", "initialized", "_init"),
    "LinearKernel": ("lin1", "k", "get_matrix"),
    "InverseUnet": ("g", "dim"),
}


@pytest.mark.parametrize("memory", ["store", "invert"])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_module_that_raises_when_examined_is_left_alone_with_a_reason(name, memory):
    """The rest of the model is accelerated."""
    attributes = dict.fromkeys(ATTRIBUTES[name], property(_raises))
    methods = {"forward": lambda self, x: x, "inverse": lambda self, y: y}
    for method, function in methods.items():
        function.__qualname__ = f"{name}.{method}"
    another = type(name, (nn.Module,), {**attributes, **methods})()
    mix = stand_in.Inv1x1Conv(3)
    report = lf.accelerate(nn.Sequential(another, mix), memory=memory)
    assert [row.path for row in report.swapped] == ["1"]
    assert [row.path for row in report.left] == ["0"]
    assert report.left[0].note


def test_a_method_put_on_the_object_later_is_called():
    matcher, x = _matcher(stand_in.FlowMatcher), torch.randn(2, 1, 8, 8)
    lf.accelerate(matcher)
    matcher.get_sampling_terms = lambda device, T=100, sampling_method="euler": 2 * torch.eye(64)
    with torch.no_grad():
        expected = matcher.linearizer.gx_inverse(2 * matcher.linearizer.gy(x))
    assert relative(matcher.sample_one_step(x, "cpu"), expected) < 1e-5


def test_an_object_of_slots_is_named():
    class FlowMatcher:
        __slots__ = ("linearizer",)

    FlowMatcher.__qualname__ = "FlowMatcher"
    matcher = FlowMatcher()
    matcher.linearizer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="model must keep its attributes in a __dict__; FlowMatcher has __slots__"):
        lf.accelerate(matcher)
