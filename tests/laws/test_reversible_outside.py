"""A conditioner reads or writes outside tensors: "auto" trains like "store", and "invert" does too or raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import linfast as lf
from linfast.flows import reversible as memory
from tests.kept import kept_and_most, kept_bytes
from tests.laws.test_reversible import METHODS, same
from tests.laws.zoo import perturb
from tests.seeds import seeded

Change = Callable[[Tensor], Tensor]
"""What a conditioner does to its hidden units."""


class Net(nn.Module):
    """Two layers, with a given function between them."""

    def __init__(self, between: Change | None = None) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(3, 16), nn.Linear(16, 6), between

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(hidden if self.between is None else self.between(hidden))


def flow(between: Callable[[], Change | None], depth: int = 4) -> lf.Flow:
    nets = [Net(between()) for _ in range(depth)]
    return lf.Flow([lf.AffineCoupling(net, 6, ("first", "second")[i % 2]) for i, net in enumerate(nets)])


class Model:
    """A flow of six features, the tensors it reads from outside, and the work before each call.

    Args:
        extra: tensors whose gradients are compared too.
        before: called on x; makes the tensors that are read.
        loss: of the tensors that a call leaves behind.
    """

    def __init__(
        self,
        g: lf.Flow,
        extra: tuple[Tensor, ...] = (),
        before: Callable[[Tensor], None] = lambda x: None,
        loss: Callable[[], Tensor | float] = lambda: 0.0,
    ) -> None:
        self.g, self.extra, self.before, self.loss = perturb(g).double(), extra, before, loss


def _embedding() -> Model:
    box: dict[str, Tensor] = {}
    weight = torch.randn(16, 2, dtype=torch.float64, requires_grad=True)
    return Model(flow(lambda: lambda h: h * box["c"]), (weight,), lambda x: box.update(c=weight.sum(1).sin()))


def _of_each_row() -> Model:
    box: dict[str, Tensor] = {}
    weight = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    return Model(flow(lambda: lambda h: h + box["c"]), (weight,), lambda x: box.update(c=x @ weight))


def _prompt() -> Model:
    prompt = torch.randn(16, dtype=torch.float64, requires_grad=True)
    return Model(flow(lambda: lambda h: h + prompt), (prompt,))


def _module_in_a_list() -> Model:
    tied = [nn.Linear(16, 16).double()]
    return Model(flow(lambda: lambda h: tied[0](h)), tuple(tied[0].parameters()))


def _attribute() -> Model:
    g = flow(lambda: None)
    scales = [torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in g.bijections]
    for layer, scale in zip(g.bijections, scales, strict=True):
        layer.conditioner.between = lambda h, scale=scale: h * scale
    return Model(g, tuple(scales))


def _a_parameter_of_another_step() -> Model:
    g = flow(lambda: None)
    weight = g.bijections[1].conditioner.first
    g.bijections[3].conditioner.between = lambda h: h + weight.bias
    return Model(g)


def _computed_from_its_own_parameter() -> Model:
    g, box = flow(lambda: None), {}
    net = g.bijections[2].conditioner
    net.between = lambda h: h + box["c"]
    return Model(g, before=lambda x: box.update(c=net.first.bias.exp()))


def _the_last_step_only() -> Model:
    g, prompt = flow(lambda: None), torch.randn(16, dtype=torch.float64, requires_grad=True)
    g.bijections[3].conditioner.between = lambda h: h + prompt
    return Model(g, (prompt,))


def _in_a_checkpoint() -> Model:
    prompt = torch.randn(16, dtype=torch.float64, requires_grad=True)
    return Model(flow(lambda: lambda h: checkpoint(lambda h: h + prompt, h, use_reentrant=False)), (prompt,))


def _only_once_it_needs_a_gradient() -> Model:
    prompt = torch.randn(16, dtype=torch.float64)
    calls = []

    def before(x: Tensor) -> None:
        prompt.requires_grad_(len(calls) > 0)
        calls.append(1)

    return Model(flow(lambda: lambda h: h + prompt), (prompt,), before)


READS = {
    "an embedding": _embedding,
    "a value per row, of x": _of_each_row,
    "a prompt": _prompt,
    "a module in a list": _module_in_a_list,
    "attributes": _attribute,
    "another step's parameter": _a_parameter_of_another_step,
    "computed from its own parameter": _computed_from_its_own_parameter,
    "the last step only": _the_last_step_only,
    "inside a checkpoint": _in_a_checkpoint,
    "once it needs a gradient": _only_once_it_needs_a_gradient,
}


class Renorm(nn.Module):
    """Subtracts a running mean that the same call has updated."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, h: Tensor) -> Tensor:
        self.mean.lerp_(h.detach().mean(0), 0.5)
        return h - self.mean


class Replaced(Renorm):
    """The same, but every call replaces the tensor."""

    def forward(self, h: Tensor) -> Tensor:
        self.mean = self.mean.lerp(h.detach().mean(0), 0.5)
        return h - self.mean


class ScaledOnce(nn.Module):
    """Divides by the first batch's standard deviations."""

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.tensor(False))
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, h: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                self.scale.copy_(1 / h.std(0))
                self.done.fill_(True)
        return h * self.scale


def _normed(norm: Callable[..., nn.Module]) -> Callable[[], Model]:
    def build() -> Model:
        g = flow(lambda: None)
        for layer in g.bijections:
            norm(layer.conditioner.first)
        return Model(g)

    return build


def _shared_net() -> Model:
    net = Net(parametrizations.spectral_norm(nn.Linear(16, 16)))
    return Model(lf.Flow([lf.AffineCoupling(net, 6, ("first", "second")[i % 2]) for i in range(4)]))


def _hooked_layers() -> Model:
    """Layers with hooks are inverted as a whole, by their inverse and their forward."""
    model = _normed(parametrizations.spectral_norm)()
    for layer in model.g.bijections:
        layer.register_forward_hook(lambda module, args, out: None)
    return model


def _leaves_a_penalty_behind() -> Model:
    left: list[Tensor] = []

    def between(h: Tensor) -> Tensor:
        if len(left) < 4:  # the backward runs it again
            left.append(h.square().mean())
        return h

    return Model(flow(lambda: between), before=lambda x: left.clear(), loss=lambda: sum(left))


REPEATS = {
    "spectral norm": _normed(parametrizations.spectral_norm),
    "spectral norm, by hooks": _normed(torch.nn.utils.spectral_norm),
    "spectral norm, hooked layers": _hooked_layers,
    "weight norm": _normed(parametrizations.weight_norm),
    "one net in every step": _shared_net,
    "batch norm": lambda: Model(flow(lambda: nn.BatchNorm1d(16))),
    "a running mean": lambda: Model(flow(Renorm)),
    "a running mean that is replaced": lambda: Model(flow(Replaced)),
    "scaled by its first batch": lambda: Model(flow(ScaledOnce)),
    "a checkpoint": lambda: Model(flow(lambda: lambda h: checkpoint(torch.sin, h, use_reentrant=False))),
    "a penalty left behind": _leaves_a_penalty_behind,
}


def learned(build: Callable[[], Model], mode: str, method: str) -> list[Tensor | None]:
    """The gradients of two calls with respect to everything, and the buffers afterwards."""
    torch.manual_seed(seeded(2))
    model = build()
    model.g.memory = mode
    found: list[Tensor | None] = []
    for _ in range(2):
        x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
        model.before(x)
        z, log_det = getattr(model.g, method)(x)
        loss = (z * z.detach().cos()).sum() + log_det.sum() + model.loss()
        extra = [t for t in model.extra if t.requires_grad]
        found += torch.autograd.grad(loss, [x, *model.g.parameters(), *extra], allow_unused=True)
        found += [buffer.clone() for buffer in model.g.buffers()]
    return found


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "AUTO_BYTES", 0)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("method", METHODS)
def test_auto_stores_what_reads_from_outside_and_says_so_once(name: str, method: str) -> None:
    expected = learned(READS[name], "store", method)
    with pytest.warns(RuntimeWarning, match=r"bijections\[\d\] \(AffineCoupling\) reads .* from outside") as caught:
        found = learned(READS[name], "auto", method)
    assert same(found, expected)
    assert len(caught) == 1


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("method", METHODS)
def test_invert_refuses_what_reads_from_outside(name: str, method: str) -> None:
    with pytest.raises(RuntimeError, match=r"bijections\[\d\].*pass it as context.*or use memory='store'"):
        learned(READS[name], "invert", method)


@pytest.mark.parametrize("name", REPEATS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["auto", "invert"])
def test_what_is_written_and_rewritten_is_as_it_was(name: str, method: str, mode: str) -> None:
    expected = learned(REPEATS[name], "store", method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no drift, and nothing is stored
        assert same(learned(REPEATS[name], mode, method), expected)


def test_a_reentrant_checkpoint_is_stored() -> None:
    """Its backward cannot run inside another's."""

    def gradients(mode: str) -> list[Tensor | None]:
        torch.manual_seed(seeded(2))
        g = perturb(flow(lambda: lambda h: checkpoint(torch.sin, h, use_reentrant=True))).double()
        g.memory = mode
        x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
        g(x).square().sum().backward()
        return [x.grad, *(p.grad for p in g.parameters())]

    with pytest.warns(RuntimeWarning, match="use_reentrant=True"):
        assert same(gradients("auto"), gradients("store"))
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        gradients("invert")


def test_what_one_step_leaves_for_another_is_differentiated() -> None:
    def gradients(mode: str) -> list[Tensor | None]:
        torch.manual_seed(seeded(2))
        g, box = flow(lambda: None), {}

        def leave(h: Tensor) -> Tensor:
            box["h"] = h
            return h

        g.bijections[1].conditioner.between = leave
        g.bijections[2].conditioner.between = lambda h: h + box["h"]
        g = perturb(g).double()
        g.memory = mode
        x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
        return list(torch.autograd.grad(g(x).square().sum(), [x, *g.parameters()], allow_unused=True))

    with pytest.warns(RuntimeWarning, match=r"bijections\[2\]"):
        assert same(gradients("auto"), gradients("store"))


def test_steps_before_it_are_rebuilt_all_the_same() -> None:
    prompt, x = torch.randn(16, requires_grad=True), torch.randn(99, 6)
    g = flow(lambda: None, depth=9)
    g.bijections[8].conditioner.between = lambda h: h + prompt
    kept = {}
    for mode in ("store", "auto"):
        g.memory = mode
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept[mode] = kept_bytes(lambda: g(x))
    assert kept["auto"] < kept["store"] / 4


def test_one_steps_graph_at_a_time_is_kept() -> None:
    most = {}
    for depth in (1, 8):
        g, x = flow(lambda: None, depth), torch.randn(99, 6)
        g.memory = "invert"
        _, most[depth] = kept_and_most(lambda g=g, x=x: g(x))
    assert most[8] < 1.5 * most[1]


def test_a_context_may_be_made_of_anything() -> None:
    g = perturb(lf.coupling_flow(6, 3, (8,), time_features=4)).double()
    seen: list[bool] = []
    g.bijections[1].conditioner.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    t, found = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), {}
    x = torch.randn(9, 6, dtype=torch.float64)
    for mode in ("store", "auto", "invert"):
        g.memory = mode
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[mode] = list(torch.autograd.grad(g(x, t=2 * t.sin()).square().sum(), (t, *g.parameters())))
        assert len(seen) == (1 if mode == "store" else 2)
    assert same(found["auto"], found["store"])
    assert same(found["invert"], found["store"])


def test_a_lazy_conditioner_gets_its_shapes_in_a_stored_call() -> None:
    g = lf.Flow([lf.AffineCoupling(nn.LazyLinear(6), 6, moves) for moves in ("first", "second")], memory="invert")
    x = torch.randn(9, 6)
    for _ in range(2):
        g.zero_grad()
        g(x).square().sum().backward()
    found = [p.grad.clone() for p in g.parameters()]
    g.memory = "store"
    g.zero_grad()
    g(x).square().sum().backward()
    assert same(found, [p.grad for p in g.parameters()], 1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize("mode", memory.MEMORY_MODES)
def test_what_is_no_floating_point_has_the_layers_own_error(dtype: torch.dtype, mode: str) -> None:
    g = lf.coupling_flow(6, 2, (8,), memory=mode)
    with pytest.raises((ValueError, RuntimeError), match=r"floating point|dtype"):
        g(torch.ones(3, 6, dtype=dtype))


def test_parameters_written_in_place_are_named() -> None:
    g = perturb(lf.coupling_flow(4, 2, (6,), memory="invert"))
    z = g(torch.randn(3, 4))
    with torch.no_grad():
        g.bijections[1].conditioner.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"bijections\[1\].*modified by an inplace operation"):
        z.sum().backward()
