"""The check runs copies, so that accelerate changes nothing in a conditioner, whatever it contains."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import linfast as lf

from .test_invert_changed import LIBRARIES, forward, nflows, normflows
from .test_libraries import relative
from .zoo import require


class Net(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, n_out))

    def forward(self, x, context=None):
        return self.net(x)


class HandsOn(Net):
    """Attributes set on it are set on the module inside, as in the modules of torch.compile."""

    def __setattr__(self, name, value):
        inside = vars(self).get("_modules", {}).get("net")
        super().__setattr__(name, value) if inside is None else setattr(inside, name, value)


class Remembers(Net):
    """Writes to all kinds of objects that a shallow copy would share."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.seen, self.counts, self.last = [], {"calls": 0}, SimpleNamespace(x=None)
        self.total, self.generator = torch.zeros(()), torch.Generator().manual_seed(0)
        self.itself = [self, self.net]

    def forward(self, x, context=None):
        self.seen.append(x.detach())
        self.counts["calls"] += 1
        self.last.x = x.detach()
        self.total += 1
        torch.rand(1, generator=self.generator)
        return self.itself[1](x)

    def memory(self):
        drawn = self.generator.get_state().tolist()
        return len(self.seen), dict(self.counts), id(self.last.x), float(self.total), drawn


def _in_place(n_in, n_out):
    net = Net(n_in, n_out)
    net.net.compile(backend="eager")
    return net


def _rewritten(n_in, n_out):
    net = Net(n_in, n_out)
    nn.utils.parametrizations.spectral_norm(net.net[0])
    return net


def _compiled(n_in, n_out):
    return torch.compile(Net(n_in, n_out), backend="eager")


MAKES = {
    "compiled": _compiled,
    "compiled in place": _in_place,
    "not to be compiled": lambda n_in, n_out: torch.compiler.disable(Net(n_in, n_out)),
    "scripted": lambda n_in, n_out: torch.jit.script(Net(n_in, n_out)),
    "traced": lambda n_in, n_out: torch.jit.trace(Net(n_in, n_out), torch.randn(3, n_in)),
    "symbolic": lambda n_in, n_out: torch.fx.symbolic_trace(Net(n_in, n_out)),
    "parametrized": _rewritten,
    "hands on": HandsOn,
    "remembers": Remembers,
}


def learn(model, x):
    """The value and gradients of one step."""
    model.zero_grad()
    z, log_det = forward(model, x)
    (0.5 * z.square().sum(1) - log_det).mean().backward()
    return torch.cat([z.detach().flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def held(model):
    return [(id(p), p.dtype, p._version) for p in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("memory", ["store", "invert"])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_whatever_a_conditioner_is_it_stays_as_it_was(library, make, memory):
    torch.manual_seed(0)
    model, x = LIBRARIES[library](MAKES[make]).eval(), torch.randn(16, 4)
    expected, before = learn(model, x), held(model)
    remember = [(m, m.memory()) for m in model.modules() if isinstance(m, Remembers)]
    lf.accelerate(model, memory=memory)
    assert held(model) == before
    for module, memories in remember:
        assert module.memory() == memories
    assert relative(learn(model, x), expected) < 1e-4
    assert held(model) == before


def test_a_coupling_with_a_compiled_conditioner_is_swapped():
    report = lf.accelerate(normflows(_compiled), memory="invert")
    assert not report.left


def test_a_traced_conditioner_is_copied_with_its_parameters():
    net = lambda n_in, n_out: torch.jit.trace(Net(n_in, n_out), torch.randn(3, n_in))  # noqa: E731
    (row,) = (row for row in lf.accelerate(normflows(net), memory="invert").rows if row.path == "")
    assert row.swapped


class Locked(Net):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.lock = threading.Lock()


def test_a_module_that_cannot_be_copied_is_left_alone_with_the_reason():
    report = lf.accelerate(normflows(Locked), memory="invert")
    (note,) = (row.note for row in report.left)
    assert note.startswith("lock of its Locked cannot be copied for the check: cannot pickle")


def test_weights_that_a_layer_caches_keep_their_gradients():
    transforms = require("nflows.transforms")
    torch.manual_seed(0)
    steps = [step for i in range(2) for step in (transforms.LULinear(4, using_cache=True), nflows(Net, i + 1))]
    model, x = transforms.CompositeTransform(steps).eval(), torch.randn(8, 4)
    original = copy.deepcopy(model)
    lf.accelerate(model, memory="invert")
    assert relative(learn(model, x), learn(original, x)) < 1e-4
