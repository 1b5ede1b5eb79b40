"""memory="invert" on chains with shared or rewritten parts or outside reads: unchanged results, or a reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import linfast as lf
from linfast.accelerate.evaluate_once import recalling

from .test_libraries import relative
from .zoo import require


def net(n_in, n_out, between=None):
    return nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), between or nn.Identity(), nn.Linear(8, n_out))


def spectral(n_in, n_out):
    return net(n_in, n_out, parametrizations.spectral_norm(nn.Linear(8, 8)))


def spectral_by_hooks(n_in, n_out):
    return net(n_in, n_out, torch.nn.utils.spectral_norm(nn.Linear(8, 8)))


def batch_normed(n_in, n_out):
    return net(n_in, n_out, nn.BatchNorm1d(8))


class Twice(nn.Module):
    """One net in two places, called with keywords, whose attributes are read."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.net, self.n_in = net(n_in, n_out), n_in

    def forward(self, x, context=None):
        return self.net(input=x) + self.net(-x / self.n_in)


class InContext(nn.Module):
    """nflows' nets are given a context; reads an embedding's output besides where there is one."""

    def __init__(self, net, box=None):
        super().__init__()
        self.net, self.box = net, box

    def forward(self, x, context=None):
        return self.net(x) if self.box is None else self.net(x) * self.box["scale"]


def freia(make, block="GLOWCouplingBlock", depth=3):
    frames, modules = require("FrEIA.framework"), require("FrEIA.modules")
    inn = frames.SequenceINN(4)
    for i in range(depth):
        inn.append(getattr(modules, block), subnet_constructor=make)
        inn.append(modules.PermuteRandom, seed=i)
    return inn


def nflows(make, depth=3):
    transforms = require("nflows.transforms")
    masks = torch.tensor([[1, -1, 1, -1], [-1, 1, -1, 1]])
    steps = [
        transforms.AffineCouplingTransform(masks[i % 2], lambda a, b: InContext(make(a, b))) for i in range(depth)
    ]
    return transforms.CompositeTransform(steps)


def normflows(make, depth=3):
    nf = require("normflows")
    flows = [
        f for _ in range(depth) for f in (nf.flows.AffineCouplingBlock(make(2, 4)), nf.flows.Permute(4, "swap"))
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows)


def _one_for_all():
    one = net(2, 4)
    return lambda n_in, n_out: one


LIBRARIES = {"FrEIA": freia, "nflows": nflows, "normflows": normflows}
MAKES = {
    "spectral norm": lambda: spectral,
    "spectral norm, by hooks": lambda: spectral_by_hooks,
    "batch norm": lambda: batch_normed,
    "twice": lambda: Twice,
    "one for all": _one_for_all,
}


def forward(model, x):
    z, log_det = model.forward_and_log_det(x) if hasattr(model, "forward_and_log_det") else model(x)
    return z, log_det


def step(model, x):
    """The value, gradients and buffers of two training steps."""
    found = []
    for _ in range(2):
        model.zero_grad()
        x = x.detach().requires_grad_()
        z, log_det = forward(model, x)
        (0.5 * z.square().sum(1) - log_det).mean().backward()
        found += [z, *(p.grad for p in model.parameters() if p.grad is not None), x.grad, *model.buffers()]
    return torch.cat([t.detach().double().flatten() for t in found])


def check(model, change=lambda model: None):
    """The report and the warnings for a model that is changed after accelerate; its training must be as before."""
    torch.manual_seed(0)
    model.double()
    original, x = copy.deepcopy(model), torch.randn(32, 4, dtype=torch.float64)
    report = lf.accelerate(model, memory="invert")
    for each in (original, model):
        torch.manual_seed(1)
        change(each)
        each.double()
    expected = step(original, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert relative(step(model, x), expected) < 1e-10
    return report, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("make", MAKES)
def test_nets_that_share_and_rewrite(library, make):
    torch.manual_seed(0)
    report, caught = check(LIBRARIES[library](MAKES[make]()))
    assert not caught
    chains = [row for row in report.rows if row.path == ""]
    assert all(row.runs or row.note for row in chains)


def test_an_embedding_read_from_outside_is_refused():
    box = {"scale": torch.ones(())}
    model = normflows(lambda a, b: InContext(net(a, b), box))
    lf.accelerate(model, memory="invert")
    model.forward_kld(torch.randn(8, 4)).backward()
    box["scale"] = torch.ones((), requires_grad=True).exp()
    with pytest.raises(RuntimeError, match=r"flows\[\d\] \(AffineCouplingBlock\) reads .* from outside"):
        model.forward_kld(torch.randn(8, 4))


def _append_unknown(inn):
    inn.append(require("FrEIA.modules").LearnedElementwiseScaling)


def _append_known(inn):
    inn.append(require("FrEIA.modules").RNVPCouplingBlock, subnet_constructor=net)


def _shorten(inn):
    inn.module_list = inn.module_list[:-1]


def _replace_a_net(inn):
    inn.module_list[0].subnet1 = net(2, 4)


def _share_a_block(inn):
    inn.module_list[0] = inn.module_list[2]


def _hook_a_net(inn):
    inn.module_list[0].subnet1.register_forward_hook(lambda module, args, out: 1.1 * out)


def _norm_a_net(inn):
    parametrizations.spectral_norm(inn.module_list[0].subnet1[0])


def _patch(inn):
    block = inn.module_list[2]
    run = block.forward
    block.forward = lambda *args, **named: run(*args, **named)


STORED = {
    _append_unknown: "LearnedElementwiseScaling is not known to be invertible",
    _patch: "GLOWCouplingBlock has a hook or a method of its own",
}
CHANGES = (
    *STORED,
    _append_known,
    _shorten,
    _replace_a_net,
    _share_a_block,
    _hook_a_net,
    _norm_a_net,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_chain_changed_since_is_rebuilt_or_says_once_why_not(change):
    inn = freia(net)
    _, caught = check(inn, change)
    if change not in STORED:
        assert not caught
        return
    (message,) = caught
    assert message == f"SequenceINN was changed after accelerate; stored: its {STORED[change]}"
    copied, x = copy.deepcopy(inn), torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(copied(x), inn(x))


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("FrEIA", lambda model, x: model(x_or_z=[x], rev=True)),
        ("nflows", lambda model, x: model.inverse(inputs=x, context=None)),
        ("normflows", lambda model, x: model.forward_and_log_det(z=x)),
        ("normflows", lambda model, x: (model.forward(z=x), model.log_prob(x=x))),
    ],
)
def test_calls_by_name(library, call):
    torch.manual_seed(0)
    model, x = LIBRARIES[library](net), torch.randn(5, 4)
    expected = call(model, x)
    lf.accelerate(model, memory="invert")
    torch.testing.assert_close(call(model, x), expected)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_what_is_no_floating_point_has_the_librarys_own_error(library, dtype):
    model, x = LIBRARIES[library](net), torch.ones(3, 4, dtype=dtype)
    with pytest.raises(RuntimeError) as expected:
        forward(model, x)
    lf.accelerate(model, memory="invert")
    with pytest.raises(RuntimeError) as found:
        forward(model, x)
    assert str(found.value) == str(expected.value)


def test_a_recalled_net_is_that_net():
    module = nn.ModuleDict({"net": Twice(2, 4)})
    seen = recalling(module, [module["net"]], [])["net"]
    assert isinstance(seen, Twice)
    assert seen.n_in == 2
    assert list(seen.parameters()) == list(module["net"].parameters())
    assert seen.net is module["net"].net
    with pytest.raises(AttributeError, match="'Twice' object has no attribute 'absent'"):
        seen.absent  # noqa: B018


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_recalled_call_matches_its_arguments(order):
    module = nn.ModuleDict({"net": Twice(2, 4)})
    parameters = list(module.parameters())
    view = recalling(module, [module["net"]], parameters)["net"]
    xs = [torch.randn(3, 2) for _ in range(2)]
    with torch.no_grad():
        made = [view(x) for x in xs]
    inputs = [x.clone().requires_grad_() for x in xs]
    outputs = [(i, view.forward(x=inputs[i]) if i else view(inputs[i])) for i in order]
    for i, out in outputs:
        assert torch.equal(out, made[i])
    found = torch.autograd.grad(sum((i + 1) * out.sum() for i, out in outputs), [*inputs, *parameters])
    expected_out = sum((i + 1) * module["net"](x).sum() for i, x in enumerate(inputs))
    for a, b in zip(found, torch.autograd.grad(expected_out, [*inputs, *parameters]), strict=True):
        torch.testing.assert_close(a, b)


class Registered(type):
    """Its class registers its subclasses, which need a key."""

    def __init__(cls, name, bases, body, **options):
        super().__init__(name, bases, body)
        REGISTRY.append(cls)


REGISTRY = []


class Keyed(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.net = net(n_in, n_out)

    def __init_subclass__(cls, *, key, **options):
        super().__init_subclass__(**options)
        REGISTRY.append(cls)

    def forward(self, x, context=None):
        assert type(self) is not Keyed
        return self.net(x)


class OfAKey(Keyed, key="one"):
    pass


class OfAMetaclass(Twice, metaclass=Registered):
    pass


class CallsItself(Twice):
    def __call__(self, x, context=None):
        return 2 * super().__call__(x)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("make", [OfAKey, OfAMetaclass, CallsItself])
def test_nets_of_any_class_and_no_class_is_derived(library, make):
    before = list(REGISTRY)
    report, caught = check(LIBRARIES[library](make))
    assert not caught
    assert any(row.runs and row.runs.endswith("rebuilt in the backward") for row in report.swapped)
    assert before == REGISTRY
    assert not make.__subclasses__()
