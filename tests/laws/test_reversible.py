"""Backward by inversion gives the gradients of the stored graph, whatever the state in which the steps ran."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.flows import reversible as memory
from linfast.flows.drift import Checksum, drift
from linfast.flows.reversible import Step, reversible
from tests.kept import kept_bytes
from tests.laws.zoo import BIJECTIONS, build, perturb, relative
from tests.seeds import seeded

METHODS = ("forward_and_log_det", "inverse_and_log_det")


class Dropped(nn.Module):
    """A conditioner that drops half of its hidden units, in any mode."""

    def __init__(self, n_in: int, n_out: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, width), nn.SiLU(), nn.Dropout(0.5), nn.Linear(width, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def dropping_flow(depth: int = 4) -> lf.Flow:
    return lf.Flow([lf.AffineCoupling(Dropped(3, 6), 6, ("first", "second")[i % 2]) for i in range(depth)])


def _unet_flow() -> lf.Flow:
    options = {"blocks": 1, "attention_resolutions": (4,), "dropout": 0.5}
    return lf.image_flow(2, 4, 4, 4, conditioner="unet", unet_options=options)


def gradients(
    g: lf.Bijection, x: Tensor, method: str = METHODS[0], mode: str = "store", wanted: list[Tensor] | None = None
) -> list[Tensor | None]:
    """Gradients of a fixed sum of z and log_det with respect to x and every parameter (or to ``wanted``)."""
    g.memory = mode
    x = x.detach().requires_grad_()
    z, log_det = getattr(g, method)(x)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(seeded(1)), dtype=torch.float64).to(z)
    loss = (z * weights).sum() + (log_det * weights.flatten(1)[:, 0]).sum()
    return list(torch.autograd.grad(loss, [x, *g.parameters()] if wanted is None else wanted, allow_unused=True))


def all_of(tensors: list[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors if t is not None])


def same(a: list[Tensor | None], b: list[Tensor | None], tolerance: float = 1e-12) -> bool:
    assert [t is None for t in a] == [t is None for t in b]
    return relative(all_of(a), all_of(b)) < tolerance


@pytest.mark.parametrize("name", BIJECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_stored_graph(name: str, method: str) -> None:
    layer, shape = build(name)
    g = lf.Flow([layer])
    x = torch.randn(5, *shape, dtype=torch.float64)
    x = x if method == METHODS[0] else g(x).detach()
    assert same(gradients(g, x, method, "invert"), gradients(g, x, method))


def test_only_what_needs_a_gradient_gets_one() -> None:
    g = perturb(lf.coupling_flow(6, 4, (8,), mix="lu", memory="invert")).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    for frozen in (g.bijections[0], g.bijections[2], g.bijections[5], g):
        for module in (g, frozen):
            module.requires_grad_(module is g)
        wanted = [p for p in g.parameters() if p.requires_grad]
        z = g(x.requires_grad_(not wanted))
        assert z.requires_grad
        z.square().sum().backward()
        for parameter in g.parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
        assert (x.grad is not None) == x.requires_grad
        g.zero_grad()
    g.requires_grad_(False)
    assert not g(x.detach()).requires_grad
    with torch.no_grad():
        assert not g.requires_grad_()(x).requires_grad


def test_steps_before_the_first_that_needs_a_gradient_are_not_undone() -> None:
    g = perturb(lf.coupling_flow(6, 4, (8,), memory="invert"))
    calls = []
    g.bijections[1].conditioner.register_forward_hook(lambda *_: calls.append(1))
    g.requires_grad_(False)
    g.bijections[2].requires_grad_()
    g(torch.randn(5, 6)).sum().backward()
    assert calls == [1]


def test_context_gets_gradients() -> None:
    g = perturb(lf.coupling_flow(6, 3, (8,), time_features=4, context_features=2)).double()
    x, found = torch.randn(5, 6, dtype=torch.float64), {}
    for mode in ("store", "invert"):
        g.memory = mode
        t = torch.linspace(0, 1, 5, dtype=torch.float64, requires_grad=True)
        context = torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
        found[mode] = list(torch.autograd.grad(g(x, t=2 * t, context=context).square().sum(), (t, context)))
    assert same(found["invert"], found["store"])


def test_a_fixed_context_that_needs_a_gradient_gets_one() -> None:
    inner = perturb(lf.coupling_flow(6, 2, (8,), time_features=4)).double()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x, found = torch.randn(5, 6, dtype=torch.float64), {}
    for mode in ("store", "invert"):
        g = lf.Flow([layer.at(t=t) for layer in inner.bijections], memory=mode)
        found[mode] = list(torch.autograd.grad(g(x).square().sum(), (t, *inner.parameters())))
    assert same(found["invert"], found["store"])


def test_shared_layers_add_their_gradients() -> None:
    layer = perturb(lf.AffineCoupling(lf.MLP(3, 6, (8,)), 6)).double()
    g = lf.Flow([layer, lf.Permute(6, "reverse"), layer, lf.Permute(6, "reverse"), lf.Inverse(layer)])
    x = torch.randn(5, 6, dtype=torch.float64)
    assert same(gradients(g, x, mode="invert"), gradients(g, x))


@pytest.mark.parametrize("kind", ["vectors", "UNets"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_replayed_and_the_generator_left_alone(method: str, kind: str) -> None:
    shape, flow = ((6,), dropping_flow()) if kind == "vectors" else ((2, 4, 4), _unet_flow())
    g, x, found, after = perturb(flow).double(), torch.randn(5, *shape, dtype=torch.float64), {}, {}
    for mode in ("store", "invert"):
        torch.manual_seed(seeded(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a mask that is not replayed gives other values
            found[mode] = gradients(g, x, method, mode)
        after[mode] = torch.rand(3)
    assert same(found["invert"], found["store"])
    assert not same(gradients(g, x, method), found["store"])
    assert torch.equal(after["invert"], after["store"])


def test_autocast_is_replayed() -> None:
    g, found, dtypes = perturb(lf.coupling_flow(6, 3, (8,))), {}, set()
    g.bijections[1].conditioner.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    x = torch.randn(64, 6)
    for mode in ("store", "invert"):
        g.memory = mode
        g.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = g(x).square().mean()
            g.memory = "store"  # weights cast without a graph must not serve one that is stored
            loss = loss + g(x + 1).square().mean()
        loss.backward()
        found[mode] = [p.grad.clone() for p in g.parameters()]
    assert dtypes == {torch.bfloat16}
    assert same(found["invert"], found["store"], torch.finfo(torch.bfloat16).eps)


def test_buffers_are_written_once() -> None:
    g = lf.Flow([lf.AffineCoupling(nn.Sequential(nn.BatchNorm1d(3), lf.MLP(3, 6, (8,))), 6)])
    x, found = torch.randn(16, 6), {}
    for mode in ("store", "invert"):
        other = copy.deepcopy(perturb(g))
        gradients(other, x, mode=mode)
        found[mode] = list(other.buffers())
    for a, b in zip(found["invert"], found["store"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_actnorm_is_initialised_by_a_forward_and_never_by_a_replay(method: str) -> None:
    x, found = 3 + 2 * torch.randn(16, 6, dtype=torch.float64), {}
    start = perturb(lf.coupling_flow(6, 3, (8,), actnorm=True)).double()
    for mode in ("store", "invert"):
        g = copy.deepcopy(start)
        found[mode] = [*gradients(g, x, method, mode), *g.parameters()]
        assert [bool(layer.initialized) for layer in g.bijections if isinstance(layer, lf.ActNorm)] == [
            method == METHODS[0]
        ] * 3
    assert same(found["invert"], found["store"], 1e-10)


def test_gradient_hooks_run_once() -> None:
    g = perturb(lf.coupling_flow(6, 2, (8,))).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    next(g.parameters()).register_hook(lambda grad: 2 * grad)
    assert same(gradients(g, x, mode="invert"), gradients(g, x))


def test_layers_with_hooks_and_subclasses_are_run_as_a_whole() -> None:
    class Doubled(lf.AffineCoupling):
        def _transform(self, x, context, inverse, log_det):
            y, total = super()._transform(x / 2 if inverse else x, context, inverse, log_det)
            return (y if inverse else 2 * y), total

    g = perturb(lf.Flow([Doubled(lf.MLP(3, 6, (8,)), 6), lf.coupling_flow(6, 2, (8,))])).double()
    seen = []
    g.bijections[1].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(5, 6, dtype=torch.float64)
    assert same(gradients(g, x, mode="invert"), gradients(g, x))
    g.memory = "invert"
    g(x).sum().backward()
    assert len(seen) == 2


def test_second_derivatives() -> None:
    g = perturb(lf.coupling_flow(4, 2, (6,), mix="lu", memory="invert")).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: g.forward_and_log_det(x), (x, *g.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: g(x), (x, *list(g.parameters())[:2]), fast_mode=True)


def test_a_second_backward_through_a_kept_graph() -> None:
    g = perturb(lf.coupling_flow(6, 2, (8,), memory="invert"))
    loss = g(torch.randn(5, 6)).square().sum()
    first = torch.autograd.grad(loss, list(g.parameters()), retain_graph=True)
    assert same(list(torch.autograd.grad(loss, list(g.parameters()))), list(first), 1e-7)


def test_transforms_and_functional_call_run_stored() -> None:
    g = perturb(lf.coupling_flow(4, 2, (6,), memory="invert")).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: g(row[None])[0]))(x)
    value, tangent = torch.func.jvp(g, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(jacobian.sum(-1), tangent)
    torch.testing.assert_close(value, g(x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(g(dual)).tangent, tangent)
    scaled = {name: (2 * p.detach()).requires_grad_() for name, p in g.named_parameters()}
    torch.func.functional_call(g, scaled, (x,)).sum().backward()
    expected = copy.deepcopy(g)
    expected.load_state_dict(scaled, strict=False)
    expected(x).sum().backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(scaled[name].grad, parameter.grad)


def test_a_replaced_parameter_is_an_error() -> None:
    g = perturb(lf.coupling_flow(4, 2, (6,), memory="invert"))
    others = {name: nn.Parameter(p.detach().clone()) for name, p in g.named_parameters()}
    with pytest.raises(RuntimeError, match=r"bijections\[0\].*replaced"):
        torch.func.functional_call(g, others, (torch.randn(3, 4),)).sum().backward()


def test_parameters_written_to_since_are_an_error() -> None:
    g = perturb(lf.coupling_flow(4, 2, (6,), memory="invert"))
    z = g(torch.randn(3, 4))
    for parameter in g.parameters():
        parameter.data.mul_(1.5)  # no version is bumped
    with pytest.warns(RuntimeWarning, match="strayed"), pytest.raises(RuntimeError, match="written to since"):
        z.sum().backward()


@pytest.mark.parametrize("mode", memory.MEMORY_MODES)
def test_compiles_without_a_graph_break(mode: str) -> None:
    g = perturb(lf.coupling_flow(6, 2, (8,), mix="lu", memory=mode))
    x = torch.randn(5, 6)
    torch.compiler.reset()  # the limit on compilations of one function counts other tests' too
    compiled = torch.compile(g, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    found = [p.grad.clone() for p in g.parameters()]
    g.zero_grad()
    g(x).square().sum().backward()
    assert same(found, [p.grad for p in g.parameters()], 1e-5)


def test_no_rows() -> None:
    g = perturb(lf.coupling_flow(6, 2, (8,), memory="invert"))
    g(torch.empty(0, 6)).sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in g.parameters())


def test_auto_inverts_what_is_too_large_to_store(monkeypatch: pytest.MonkeyPatch) -> None:
    g, x = lf.coupling_flow(64, 4), torch.randn(256, 64)

    def kept(mode: str) -> int:
        g.memory = mode
        return kept_bytes(lambda: g(x))

    stored, inverted = kept("store"), kept("invert")
    assert 0.5 < g._stored[0] * x.nbytes / stored < 2
    monkeypatch.setattr(memory, "AUTO_BYTES", 2 * stored)
    assert kept("auto") == stored
    monkeypatch.setattr(memory, "AUTO_BYTES", stored // 2)
    assert kept("auto") == inverted < stored / 8


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="memory must be one of store, invert, auto; got 'no'"):
        lf.image_flow(1, 4, memory="no")
    assert lf.coupling_flow(6, memory="invert").memory == "invert"
    assert lf.image_flow(2, 4).memory == "auto"


def test_steps_of_any_modules() -> None:
    """Steps in the form of the research repository's blocks: a module, its forward and its inverse."""
    blocks = [lf.AffineCoupling(Dropped(3, 6), 6) for _ in range(3)]
    steps = [
        Step.of(
            str(i),
            b,
            forward=lambda x, context, b=b: b.forward_and_log_det(context["scale"] * x),
            inverse=lambda y, context, b=b: b.inverse(y) / context["scale"],
        )
        for i, b in enumerate(blocks)
    ]
    x = torch.randn(5, 6)
    found = []
    for run in (reversible, _plain):
        torch.manual_seed(seeded(3))
        scale = torch.tensor(1.5, requires_grad=True)
        y, log_det = run(steps, x, {"scale": scale})
        inputs = [scale, *(p for b in blocks for p in b.parameters())]
        found.append(list(torch.autograd.grad(y.square().sum() + log_det.sum(), inputs)))
    assert same(*found, 1e-5)


def _plain(steps: list[Step], x: Tensor, context: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    total = torch.zeros(len(x))
    for step in steps:
        x, part = step.forward(x, context)
        total = total + part
    return x, total


@pytest.mark.parametrize("shape", [(1024, 64), (33, 7), (4, 3, 8, 8)])
@pytest.mark.parametrize("size", [1e-5, 1e-2])
def test_checksums_see_drift(shape: tuple[int, ...], size: float) -> None:
    x = 5 + torch.randn(shape)
    checksum = Checksum(x)
    kept = checksum.with_norm(x)[None]
    assert float(drift(checksum(x.clone())[None], kept)) == 0
    for error in (
        torch.randn(shape),
        torch.ones(shape),
        torch.randn(shape) * (torch.arange(shape[0]) == 1).reshape(-1, *[1] * (len(shape) - 1)),
    ):
        error = size * error * x.norm() / error.norm()
        assert size / 8 < float(drift(checksum(x + error)[None], kept)) < 4 * size
