"""Tensors kept between calls, and parameters frozen in between, have the gradients of the stored graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import linfast as lf
from linfast.flows import reversible as memory
from tests.laws.test_reversible import same
from tests.laws.zoo import perturb
from tests.seeds import seeded


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "AUTO_BYTES", 0)


class Exponential(lf.Bijection):
    """y = exp(W) x, which keeps exp(W) on request, even if a call without a graph computed it."""

    def __init__(self, keeps: bool = True) -> None:
        super().__init__()
        self.features = 6
        self.W = nn.Parameter(0.3 * torch.randn(6, 6))
        self.keeps, self.kept = keeps, None

    def matrix(self) -> Tensor:
        matrix = torch.matrix_exp(self.W) if self.kept is None else self.kept
        if self.keeps:
            self.kept = matrix
        return matrix

    def _transform(self, x: Tensor, context: Any, inverse: bool, log_det: bool) -> tuple[Tensor, Tensor | None]:
        matrix, trace = self.matrix(), torch.trace(self.W).expand(len(x))
        y = torch.linalg.solve(matrix, x.mT).mT if inverse else x @ matrix.mT
        return y, (-trace if inverse else trace) if log_det else None


class KeptByTheInverse(Exponential):
    """Keeps a tensor that its inverse computed, like a cache of factors."""

    def _transform(self, x: Tensor, context: Any, inverse: bool, log_det: bool) -> tuple[Tensor, Tensor | None]:
        self.keeps = inverse
        return super()._transform(x, context, inverse, log_det)


def exponentials(kind: type[Exponential] = Exponential, depth: int = 3, **options: bool) -> lf.Flow:
    layers = [(kind(**options), lf.AffineCoupling(nn.Linear(3, 6), 6)) for _ in range(depth)]
    return lf.Flow([layer for pair in layers for layer in pair])


def cleared(g: lf.Flow) -> None:
    for layer in g.bijections:
        if isinstance(layer, Exponential):
            layer.kept = None


class Made(nn.Module):
    """A slice of weights that one network computes for all conditioners, once per step."""

    def __init__(self, make: nn.Module, box: dict[str, Tensor], i: int) -> None:
        super().__init__()
        self.make, self.box, self.i = make, box, i

    def forward(self, x: Tensor) -> Tensor:
        if "weights" not in self.box:
            self.box["weights"] = self.make(torch.ones(2, dtype=x.dtype))
        return (x @ self.box["weights"][18 * self.i :][:18].view(3, 6)).tanh()


def made_once() -> tuple[lf.Flow, dict[str, Tensor]]:
    make, box = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 72)), {}
    nets = [Made(make, box, i) for i in range(4)]
    return lf.Flow([lf.AffineCoupling(net, 6, ("first", "second")[i % 2]) for i, net in enumerate(nets)]), box


def orthogonal() -> lf.Flow:
    g = lf.coupling_flow(6, 3, (8,), mix="free")
    for layer in g.bijections:
        if isinstance(layer, lf.Mix):
            parametrizations.orthogonal(layer)
        else:
            parametrizations.weight_norm(layer.conditioner.layers[0])
    return g


def loss(g: lf.Flow, both: bool = False) -> Tensor:
    x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seeded(1)))
    z, log_det = g.forward_and_log_det(x)
    total = z.sin().square().sum() - log_det.cos().sum()
    return total + g.inverse(x).square().sum() if both else total


def learned(build: Callable[[], lf.Flow], mode: str, step: Callable[[lf.Flow], None]) -> list[Tensor | None]:
    """The gradients of two steps, with one backward each."""
    torch.manual_seed(seeded(2))
    g, found = build().double(), []
    g.memory = mode
    for _ in range(2):
        g.zero_grad()
        step(g)
        found += [None if p.grad is None else p.grad.clone() for p in g.parameters()]
    return found


def _cleared_before(g: lf.Flow) -> None:
    cleared(g)
    loss(g).backward()


def _cleared_around(g: lf.Flow) -> None:
    cleared(g)
    value = loss(g)
    cleared(g)
    value.backward()


@pytest.mark.parametrize("mode", ["auto", "invert"])
@pytest.mark.parametrize("kind", [Exponential, KeptByTheInverse])
@pytest.mark.parametrize("step", [_cleared_before, _cleared_around])
@pytest.mark.filterwarnings("ignore:.*reads a tensor that was computed before:RuntimeWarning")
def test_what_a_layer_keeps_has_its_gradient(
    mode: str, kind: type[Exponential], step: Callable[[lf.Flow], None]
) -> None:
    build = lambda: exponentials(kind)  # noqa: E731
    assert same(learned(build, mode, step), learned(build, "store", step))


def test_tensors_kept_only_in_the_backward_have_their_gradients() -> None:
    def step(g: lf.Flow) -> None:
        value = loss(g)
        with parametrize.cached():
            value.backward()

    for mode in ("auto", "invert"):
        assert same(learned(orthogonal, mode, step), learned(orthogonal, "store", step))


@pytest.mark.parametrize("mode", ["auto", "invert"])
def test_what_is_kept_only_in_a_later_backward_has_its_gradient(mode: str) -> None:
    def gradients(mode: str) -> list[Tensor | None]:
        torch.manual_seed(seeded(2))
        g = exponentials(keeps=False).double()
        g.memory = mode
        loss(g).backward()
        value = loss(g)
        for layer in g.bijections:
            layer.keeps = True
        value.backward()
        return [p.grad for p in g.parameters()]

    assert same(gradients(mode), gradients("store"))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("read_after", [False, True])
def test_auto_stores_weights_that_are_made_once_for_all_layers(both: bool, read_after: bool) -> None:
    """Stored at once and not inverted: they share one graph, which the first backward through it frees."""

    def gradients(mode: str) -> list[Tensor | None]:
        torch.manual_seed(seeded(2))
        g, box = made_once()
        g, found = perturb(g).double(), []
        g.memory = mode
        for _ in range(2):
            box.clear()
            g.zero_grad()
            value = loss(g, both)
            (value + box["weights"].square().sum() if read_after else value).backward()
            found += [p.grad.clone() for p in g.parameters()]
        return found

    with pytest.warns(RuntimeWarning, match=r"bijections\[0\].*computed before.*it is stored") as caught:
        assert same(gradients("auto"), gradients("store"))
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match=r"bijections\[1\].*computed before.*or use memory='store'"):
        gradients("invert")


@pytest.mark.parametrize("inside", [False, True])
def test_auto_and_torchs_cache_of_parametrizations(inside: bool) -> None:
    def step(g: lf.Flow) -> None:
        with parametrize.cached():
            value = loss(g, both=True)
            if inside:
                value.backward()
        if not inside:
            value.backward()

    with pytest.warns(RuntimeWarning, match="it is stored"):
        found = learned(orthogonal, "auto", step)
    assert same(found, learned(orthogonal, "store", step))


def test_an_attribute_that_each_call_rewrites_is_not_kept() -> None:
    """As weight norm by hooks does: the next call does not read what the last one left."""

    def build() -> lf.Flow:
        nets = [torch.nn.utils.weight_norm(nn.Linear(3, 6)) for _ in range(3)]
        return lf.Flow([lf.AffineCoupling(net, 6) for net in nets])

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", FutureWarning)
        found = learned(build, "auto", lambda g: loss(g).backward())
    assert same(found, learned(build, "store", lambda g: loss(g).backward()))


@pytest.mark.parametrize("mode", ["auto", "invert"])
@pytest.mark.parametrize("build", [orthogonal, lambda: exponentials(keeps=False)])
def test_what_is_frozen_after_the_forward_gets_no_gradient(mode: str, build: Callable[[], lf.Flow]) -> None:
    """In alternating training the modules before the flow still get gradients through it."""

    def gradients(mode: str, frozen: Callable[[lf.Flow], nn.Module]) -> list[Tensor | None]:
        torch.manual_seed(seeded(2))
        g, first = build().double(), nn.Linear(6, 6).double()
        g.memory = mode
        for module in (nn.Module(), frozen(g)):  # again, when it is known to keep nothing
            g.zero_grad()
            value = g(first(torch.linspace(-1, 1, 54, dtype=torch.float64).view(9, 6))).sin().square().sum()
            module.requires_grad_(False)
            value.backward()
        return [p.grad for p in (*first.parameters(), *g.parameters())]

    for frozen in (lambda g: g, lambda g: g.bijections[0], lambda g: g.bijections[1], lambda g: g.bijections[-1]):
        assert same(gradients(mode, frozen), gradients("store", frozen))


def test_a_gradient_inside_the_first_layer_is_not_from_outside() -> None:
    """A conditioner that is the gradient of an energy with respect to its input, or to a copy that needs none."""

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                at = x if x.requires_grad else x.detach().requires_grad_()
                (force,) = torch.autograd.grad(self.net(at).square().sum(), at, create_graph=True)
            return torch.cat((force, force.tanh()), 1)

    def build() -> lf.Flow:
        return lf.Flow([lf.AffineCoupling(Force(), 6, moves) for moves in ("first", "second")])

    expected = learned(build, "store", lambda g: loss(g).backward())
    assert same(learned(build, "invert", lambda g: loss(g).backward()), expected)
