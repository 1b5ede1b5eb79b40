"""freeze: derived weights are computed once inside the block, gradients are right, and nothing is left after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast import dispatch
from linfast import match as of_linearizers
from linfast.flows import match
from linfast.freeze import _active, derived
from tests.laws.zoo import perturb
from tests.marks import long


@pytest.fixture
def g() -> lf.Flow:
    g = lf.coupling_flow(4, 2, (8,), actnorm=True, mix="lu")
    g(2 + 3 * torch.randn(64, 4))
    return perturb(g)  # type: ignore[return-value]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records the direction of each W or W^-1 that is formed from here on."""
    seen: list[bool] = []
    real = lf.Mix._wide_weight
    monkeypatch.setattr(lf.Mix, "_wide_weight", lambda self, *given: seen.append(given[-1]) or real(self, *given))
    return seen


@pytest.mark.parametrize("fold", [False, True])
def test_derived_weights_are_computed_once(
    g: lf.Flow, computed: list[bool], fold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(match, "uses_triton", lambda *_: fold)
    monkeypatch.setattr(match, "stack_of", lambda *_: "folding is tested")
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = [g(x), g.inverse(x), g.inverse(x)]
        assert computed == [False] * 2 + [True] * 4
        computed.clear()
        with lf.freeze(g):
            got = [g(x), g.inverse(x), g.inverse(x), g(x)]
            assert computed == [False] * 2 + [True] * 2
        for parameter in g.parameters():
            parameter.add_(0.1)
        moved = g(x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=False))
    assert torch.equal(got[0], got[3])
    assert not torch.allclose(moved, expected[0], atol=1e-3)
    assert _active == []


def test_slogdet_of_a_free_mix_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mix, seen, real = lf.Mix(3, "free"), [], torch.linalg.slogdet
    monkeypatch.setattr(torch.linalg, "slogdet", lambda a: seen.append(1) or real(a))
    with lf.freeze(mix), torch.no_grad():
        first, second = (mix.inverse_and_log_det(torch.randn(2, 3))[1] for _ in range(2))
    assert seen == [1]
    assert torch.equal(first, second)


def test_gradients_are_those_without_a_freeze(g: lf.Flow, computed: list[bool]) -> None:
    x = torch.randn(3, 4, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        z, log_det = g.inverse_and_log_det(x)
        return torch.autograd.grad(z.pow(3).sum() + log_det.sum(), [x, *g.parameters()])

    expected = gradients()
    with lf.freeze(g):
        with torch.no_grad():
            g.inverse(x)  # kept, but must not be used below
        got = gradients()
        got_again = gradients()
    for a, b, c in zip(got, got_again, expected, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)
    assert len(computed) == 2 * 4


def test_gradients_of_x_only_use_the_kept_weights(g: lf.Flow, computed: list[bool]) -> None:
    g.requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(g.inverse(x).pow(3).sum(), x)
    computed.clear()
    with lf.freeze(g):
        with torch.inference_mode():
            g.inverse(torch.randn(3, 4))  # the tensors that it keeps must work with autograd
        got = torch.autograd.grad(g.inverse(x).pow(3).sum(), x)
    assert torch.equal(got[0], expected[0])
    assert len(computed) == 2


def test_blocks_nest_and_end_with_an_exception(g: lf.Flow, computed: list[bool]) -> None:
    x = torch.randn(3, 4)
    with torch.no_grad():
        with lf.freeze(g):
            g(x)
            with lf.freeze(g), lf.freeze(g.bijections[0]):
                g(x)
            g(x)
        assert len(computed) == 2
        with pytest.raises(ValueError, match="features"), lf.freeze(g):
            g(torch.cat((g(x), x), 1))
        g(x)
    assert len(computed) == 2 + 2 + 2
    assert _active == []


def test_only_the_given_model_is_frozen(g: lf.Flow, computed: list[bool]) -> None:
    other = lf.Mix(4)
    with torch.no_grad(), lf.freeze(g.bijections[2]):
        for _ in range(2):
            other(torch.randn(2, 4))
            g(torch.randn(2, 4))  # one of its two mixes is frozen
    assert len(computed) == 2 + 1 + 2
    with pytest.raises(TypeError, match=r"model must be a .*Module; got int"), lf.freeze(3):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("fold", [True, *long(False)])
def test_compiled_flows_are_right_inside_and_after(g: lf.Flow, fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "uses_triton", lambda *_: fold)
    monkeypatch.setattr(match, "stack_of", lambda *_: "folding is tested")
    x = torch.randn(3, 4)
    compiled = torch.compile(g.inverse, fullgraph=True, backend="aot_eager")
    inside = torch.compile(lambda x: _frozen_inverse(g, x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for scale in (1.0, 1.1):
            for parameter in g.parameters():
                parameter.mul_(scale)
            expected = g.inverse(x)
            with lf.freeze(g):
                g.inverse(x)
                torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(inside(x), expected)
    assert _active == []


def _frozen_inverse(g: lf.Flow, x: Tensor) -> Tensor:
    with lf.freeze(g):
        return g.inverse(x)


def test_transforms_neither_use_nor_leave_anything(g: lf.Flow) -> None:
    g.requires_grad_(False)
    x, parameters = torch.randn(3, 4), dict(g.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(_Inverse(g), {f"g.{k}": v for k, v in parameters.items()}, x).sum()

    stacked = {k: torch.stack((v, 1.1 * v)) for k, v in parameters.items()}
    with torch.no_grad():
        expected = torch.func.vmap(loss)(stacked)
    gradients = torch.func.grad(loss)(parameters)
    with lf.freeze(g):
        before = g.inverse(x)
        with torch.no_grad():
            torch.testing.assert_close(torch.func.vmap(loss)(stacked), expected)
        for key, value in torch.func.grad(loss)(parameters).items():
            torch.testing.assert_close(value, gradients[key])
        assert torch.equal(g.inverse(x), before)


class _Inverse(torch.nn.Module):
    def __init__(self, g: lf.Flow) -> None:
        super().__init__()
        self.g = g

    def forward(self, z: Tensor) -> Tensor:
        return self.g.inverse(z)


def test_derived_keeps_one_value_per_key() -> None:
    mix, other = lf.Mix(2), lf.Mix(2)
    values = iter(range(9))
    with torch.no_grad():
        assert [derived(mix, "a", lambda: next(values)) for _ in range(2)] == [0, 1]
        with lf.freeze(torch.nn.ModuleList([mix, other])):
            keys = [(mix, "a"), (mix, "b"), (other, "a"), (mix, "a"), (other, "a")]
            assert [derived(module, key, lambda: next(values)) for module, key in keys] == [2, 3, 4, 2, 4]


def test_a_frozen_call_decides_its_path_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walking the layers takes most of the host time of a small call; another mode is decided anew."""
    f = perturb(lf.Linearizer(lf.coupling_flow(6, 2, (8,)), lf.Dense(6)))
    x, asked = torch.randn(3, 6), []
    stack_of = match.stack_of
    for module in (match, of_linearizers):
        monkeypatch.setattr(module, "stack_of", lambda *given: (asked.append(1), stack_of(*given))[1])
    with torch.no_grad(), lf.freeze(f):
        with lf.backend("triton"):
            first = f(x), f.g_x(x), f.g_x.inverse(x)
            before = len(asked)
            again = f(x), f.g_x(x), f.g_x.inverse(x)
            assert len(asked) == before
            with monkeypatch.context() as precision:
                precision.setattr(dispatch, "state_key", lambda x: "another mode")
                f(x)
            assert len(asked) > before
        with lf.backend("reference"):
            plain = f(x)
    assert all(map(torch.equal, first, again))
    torch.testing.assert_close(plain, first[0], rtol=1e-4, atol=1e-5)
