"""Folded layers, and couplings that include them, give the same flow; nothing is folded where it should not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.flows import match, segments
from tests.laws.zoo import perturb, relative
from tests.ops.budget import DEVICE, assert_within_budget
from tests.seeds import seeded


def _coupling(features: int = 4, moves: str = "first", **options: object) -> lf.AffineCoupling:
    moved = (features + 1) // 2 if moves == "first" else features // 2
    return lf.AffineCoupling(_conditioner(features - moved, 2 * moved), features, moves, **options)  # type: ignore[arg-type]


def _conditioner(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (n_in, 1)), nn.Flatten(1, 2), _PerPosition(n_in, n_out))


class _PerPosition(nn.Module):
    """tanh of a matrix product over channels, for vectors and images."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oc,bc...->bo...", self.weight, x).tanh()


def _actnorm(features: int = 4) -> lf.ActNorm:
    norm = lf.ActNorm(features)
    norm(2 + 3 * torch.randn(64, features))
    return norm


FLOWS: dict[str, Callable[[], lf.Flow]] = {
    "coupling, mix, actnorm": lambda: lf.Flow(
        [_actnorm(), _coupling(), lf.Mix(4), _actnorm(), _coupling(), lf.Mix(4)]
    ),
    "everything in a row": lambda: lf.Flow(
        [lf.Permute(5), _actnorm(5), lf.Mix(5, "free"), _actnorm(5), lf.Permute(5), lf.Householder(5)]
    ),
    "row after and before": lambda: lf.Flow(
        [lf.Mix(5), lf.Permute(5), _coupling(5, "second", order="scale_first"), lf.Permute(5), lf.Mix(5, "free")]
    ),
    "no product": lambda: lf.Flow([_coupling(), _actnorm(), lf.Permute(4), _coupling(), _actnorm()]),
    "interleaved": lambda: lf.Flow([_coupling(5, "second", layout="interleaved"), lf.Householder(5)]),
    "one layer twice": lambda: lf.Flow([_coupling(), (mix := lf.Mix(4)), _coupling(), mix]),
}


def _plain(monkeypatch: pytest.MonkeyPatch, fold: bool) -> None:
    """Fold in plain torch and any dtype, or do not fold."""
    monkeypatch.setattr(match, "uses_triton", lambda *_: fold)
    monkeypatch.setattr(match, "stack_of", lambda *_: "folding is tested")


def _count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the layers of each segment that runs from here on."""
    seen: list[int] = []
    real = match.match

    def spy(*arguments: object) -> match.Launch:
        launch = real(*arguments)  # type: ignore[arg-type]
        folded = [s if isinstance(s, segments.Folded) else None for s in launch.segments]
        seen.extend(1 if s is None else len(s.row) + (s.coupling is not None) for s in folded)
        return launch

    monkeypatch.setattr("linfast.flows.flow.match", spy)
    return seen


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("positions", [(), (3, 2)])
def test_a_folded_flow_is_the_flow(name: str, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    g = perturb(FLOWS[name]()).double()
    x = torch.randn(3, g.features, *positions, dtype=torch.float64, requires_grad=True)  # type: ignore[misc]
    parameters = [x, *g.parameters()]

    def results() -> list[Tensor]:
        values = [g(x), g.inverse(x), *g.forward_and_log_det(x), *g.inverse_and_log_det(x)]
        loss = sum(v.pow(3).sum() for v in values)
        return [*values, *torch.autograd.grad(loss, parameters)]  # type: ignore[arg-type]

    _plain(monkeypatch, fold=False)
    expected = results()
    _plain(monkeypatch, fold=True)
    for got, one_by_one in zip(results(), expected, strict=True):
        assert got.shape == one_by_one.shape
        assert relative(got, one_by_one) < 1e-12


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("inverse", [False, True])
def test_kernels_of_a_folded_flow_stay_within_the_budget(name: str, inverse: bool) -> None:
    g = perturb(FLOWS[name]()).to(DEVICE)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        h = g if x.dtype == torch.float32 else _as_double(g)
        z, log_det = h.inverse_and_log_det(x) if inverse else h.forward_and_log_det(x)
        return (z, log_det, *torch.autograd.grad(z.square().sum() + log_det.sum(), [x, *h.parameters()]))

    assert_within_budget(call, [torch.randn(3, g.features, 3, 2, device=DEVICE, requires_grad=True)])  # type: ignore[arg-type]


def _as_double(g: nn.Module) -> lf.Flow:
    import copy

    return copy.deepcopy(g).double()  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "forward", "inverse"),
    [
        ("coupling, mix, actnorm", [1, 3, 2], [1, 3, 1, 1]),
        ("everything in a row", [6], [6]),
        ("row after and before", [2, 3], [2, 3]),
        ("no product", [1] * 5, [1] * 5),
        ("interleaved", [2], [1, 1]),
    ],
)
def test_what_is_folded(name: str, forward: list[int], inverse: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    g, seen = FLOWS[name](), _count(monkeypatch)
    _plain(monkeypatch, fold=True)
    z = g(torch.randn(3, g.features))  # type: ignore[arg-type]
    assert seen == forward
    seen.clear()
    g.inverse(z)
    assert seen == inverse


def _tripled(g: lf.Flow) -> None:
    class Tripled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 3 * weight

    torch.nn.utils.parametrize.register_parametrization(g.bijections[1], "weight", Tripled())


def _other_forward(g: lf.Flow) -> None:
    forward = g.bijections[1].forward
    g.bijections[1].forward = lambda x, **context: 3 * forward(x, **context)  # type: ignore[method-assign]


def _subclassed(g: lf.Flow) -> None:
    class Tripled(lf.Mix):
        def _transform(self, x, context, inverse, log_det):
            y, part = super()._transform(x, context, inverse, log_det)
            return 3 * y, part

    g.bijections[1].__class__ = Tripled


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.bijections[1].register_forward_hook(lambda *arguments: 3 * arguments[2]),
        lambda g: g.bijections[0].register_forward_hook(lambda *arguments: 3 * arguments[2]),
        lambda g: g.bijections[1].register_forward_pre_hook(lambda _, x: (3 * x[0],)),
        _tripled,
        _other_forward,
        _subclassed,
    ],
)
def test_layers_with_code_of_their_own_run_it(
    change: Callable[[lf.Flow], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = lf.Flow([_coupling(), lf.Mix(4, "free")])
    x = torch.randn(3, 4)
    expected = g(x)
    change(g)
    _plain(monkeypatch, fold=True)
    y = g(x)
    assert relative(y, expected) > 0.1
    _plain(monkeypatch, fold=False)
    torch.testing.assert_close(g(x), y)


def test_backward_hooks_and_global_hooks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _plain(monkeypatch, fold=True)
    g, seen = lf.Flow([_coupling(), lf.Mix(4)]), []
    handle = g.bijections[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    g(torch.randn(3, 4, requires_grad=True)).sum().backward()
    handle.remove()
    with torch.no_grad():
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        g(torch.randn(3, 4))
        hook.remove()
    assert seen[0] == "backward"
    assert {"Mix", "AffineCoupling"} <= set(seen)


def test_an_actnorm_is_initialised_by_what_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seeded(1))
    g = lf.coupling_flow(4, 3, (8,), actnorm=True, mix="lu")
    h = lf.coupling_flow(4, 3, (8,), actnorm=True, mix="lu")
    h.load_state_dict(g.state_dict())
    x = 2 + 3 * torch.randn(64, 4)
    _plain(monkeypatch, fold=False)
    expected = g(x)
    _plain(monkeypatch, fold=True)
    torch.testing.assert_close(h(x), expected)
    for ours, theirs in zip(h.state_dict().values(), g.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    seen = _count(monkeypatch)
    torch.testing.assert_close(h(x), expected)
    assert seen == [1, 3, 3, 2]
    with pytest.raises(ValueError, match="non-finite"):
        lf.Flow([_coupling(), lf.Mix(4), lf.ActNorm(4), lf.Mix(4)])(torch.full((4, 4), float("nan")))


@pytest.mark.parametrize("fold", [False, True])
def test_bad_input_is_named_as_before(fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _plain(monkeypatch, fold)
    g = lf.Flow([_coupling(), lf.Mix(4), lf.Mix(4)])
    with pytest.raises(ValueError, match=r"Flow: x must have 4 features.*\(3, 5\)"):
        g(torch.randn(3, 5))
    g.bijections[2].double()
    with pytest.raises(ValueError, match=r"Mix: x is torch.float32 and the parameters are torch.float64"):
        g(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"Mix: z is torch.float32 and the parameters are torch.float64"):
        g.inverse(torch.randn(3, 4))
    h = lf.Flow([lf.AffineCoupling(nn.Linear(2, 3), 4), lf.Mix(4)])
    with pytest.raises(ValueError, match=r"AffineCoupling: conditioner must return \(3, 4\).*\(3, 3\)"):
        h(torch.randn(3, 4))


def test_weights_are_folded_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    _plain(monkeypatch, fold=True)
    layers = (_actnorm(), perturb(lf.Mix(4)), _actnorm())
    owner, row = nn.ModuleList(layers), [(layer, layer.numbers()) for layer in layers]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = segments.fold(owner, row, True)
    for a, b in zip(narrow, segments.fold(owner, row, True), strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_compiles_whole_with_one_launch_a_coupling() -> None:
    from torch._dynamo.backends.common import aot_autograd

    g = perturb(FLOWS["coupling, mix, actnorm"]()).to(DEVICE)
    x = torch.randn(2, 4, 3, 2, device=DEVICE, requires_grad=True)
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def loss(x: Tensor) -> Tensor:
        z, log_det = g.forward_and_log_det(x)
        return z.pow(3).sum() - log_det.sum() + g.inverse(z).sum()

    wanted = [x, *g.parameters()]
    with lf.backend("triton"):
        compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        got = torch.autograd.grad(compiled(x), wanted)
        expected = torch.autograd.grad(loss(x), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    for name, forward, inverse in (("coupling_mix", 2, 1), ("affine_coupling", 0, 1), ("channel_mix", 0, 1)):
        assert called.count(f"linfast.{name}.default") == forward + inverse
        assert called.count(f"linfast.{name}_backward.default") == forward + inverse
