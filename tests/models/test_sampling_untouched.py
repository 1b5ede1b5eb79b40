"""Samplers never change the caller's model: modes, tensors and hooks, in one thread or many."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from tests.laws.zoo import perturb

N = 6
STEPS = {"steps": 4, "method": "euler"}


class Noisy(nn.Module):
    """An additive coupling whose shift has dropout and a batch norm, and is also called by a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(N // 2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, N - N // 2))
        self.again = [self.net]
        self.by = self.net.forward

    def _shift(self, x: Tensor) -> Tensor:
        return self.again[0](x) + self.by(x)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split((N // 2, N - N // 2), dim=1)
        return torch.cat((a, b + self._shift(a)), 1)

    def inverse(self, z: Tensor) -> Tensor:
        a, b = z.split((N // 2, N - N // 2), dim=1)
        return torch.cat((a, b - self._shift(a)), 1)


class Undecided(nn.Module):
    """A module whose code depends on the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0) if self.training else x

    def inverse(self, z: Tensor) -> Tensor:
        return z


def _model(g: Callable[[], nn.Module] = Noisy) -> lf.Linearizer:
    torch.manual_seed(0)
    f = lf.Linearizer(g(), lf.TimeLowRank(N, 1, time_features=4, hidden=8), g())
    for buffer in f.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    f.g_x.eval() if isinstance(f.g_x, Undecided) else f.g_x.net[0].eval()  # a mode of its own
    return f


def _state(f: nn.Module) -> list[Any]:
    """Everything that a call could change."""
    modes = [(id(module), type(module), module.training) for module in f.modules()]
    tensors = [
        (name, id(value), value.dtype, value.requires_grad, value.detach().clone())
        for name, value in (*f.named_parameters(), *f.named_buffers())
    ]
    return [modes, [(*rest, value.tolist()) for *rest, value in tensors]]


CALLS: dict[str, Callable[[lf.Linearizer, Tensor], Tensor]] = {
    "one step": lambda f, x: lf.sample(f, x, **STEPS),
    "steps": lambda f, x: lf.sample(f, x, **STEPS, one_step=False),
    "path": lambda f, x: lf.sample(f, x, **STEPS, one_step=False, return_path=True)[0],
    "invert": lambda f, x: lf.invert(f, x, **STEPS),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("g", [Noisy, Undecided])
def test_a_row_does_not_depend_on_its_batch_in_train_mode(name: str, g: Callable[[], nn.Module]) -> None:
    f, x = _model(g), torch.randn(5, N)
    before = _state(f)
    whole = CALLS[name](f, x)
    alone = torch.cat([CALLS[name](f, row[None]) for row in x])
    assert _state(f) == before
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, CALLS[name](f.eval(), x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, nn.Sequential, lambda f: nn.Sequential(f.at(0.5), f.g_x)])
def test_streams_are_in_eval_mode(wrap: Callable[[nn.Module], nn.Module]) -> None:
    f = wrap(lf.Linearizer(Noisy(), lf.Dense(N), Noisy()) if wrap is nn.Sequential else _model())
    before = _state(f)
    how = {**STEPS, "noise_shape": (N,), "block_size": 4}
    rows = torch.cat(list(lf.sample_stream(f, 10, 3, **how)))
    array = np.zeros((10, N), np.float32)
    lf.sample_stream(f, 10, 10, array, **how)
    assert _state(f) == before
    assert np.array_equal(array, rows)
    assert torch.equal(rows, torch.cat(list(lf.sample_stream(f.eval(), 10, 3, **how))))


def test_a_generator_has_the_modes_and_the_flows_of_its_linearizer() -> None:
    f = _model().eval()
    one, x = lf.generator(f, **STEPS), torch.randn(5, N)
    assert not any(module.training for module in one.modules())
    assert one.g_x is f.g_y
    assert one.g_y is f.g_x
    torch.testing.assert_close(one(x), lf.sample(f, x, **STEPS))
    assert lf.generator(_model(), 4).training


class DroppingA(lf.TimeLowRank):
    """Factors computed by networks with dropout."""

    def __init__(self) -> None:
        super().__init__(N, 1, time_features=4, hidden=8)
        self.drop = nn.Dropout(0.5)

    def _generate(self, embedded: Tensor) -> tuple[Tensor, ...]:
        U, V = super()._generate(embedded)
        return self.drop(U), V


def test_an_operator_is_collapsed_as_in_eval_mode() -> None:
    A = DroppingA()
    B = lf.collapse(A, 4)
    assert all(module.training for module in A.modules())
    assert torch.equal(B.to_dense(), lf.collapse(A, 4).to_dense())
    assert torch.equal(B.to_dense(), lf.collapse(A.eval(), 4).to_dense())
    B.to_dense().sum().backward()
    assert all(parameter.grad is not None for parameter in A.parameters())


def _watched(f: lf.Linearizer, seen: list[bool], error: Exception | None = None) -> None:
    """Compare the caller's model with its earlier state whenever a network of A is called."""
    before = _state(f)
    (of,) = (part for part in f.A.modules() if isinstance(part, lf.TimeLowRank))

    def look(module: nn.Module, inputs: object) -> None:
        seen.append(_state(f) == before)
        if error is not None:
            raise error

    of.u_net.register_forward_pre_hook(look)


@pytest.mark.parametrize("name", [*CALLS, "collapse"])
@pytest.mark.parametrize("composed", [False, True])
def test_nothing_of_the_callers_is_changed_for_a_moment(name: str, composed: bool) -> None:
    f, x, seen = _model(), torch.randn(3, N), []
    if composed:
        f = lf.Linearizer(f.g_x, 2 * f.A, f.g_y)
    before = _state(f)
    call = CALLS.get(name, lambda f, x: lf.collapse(f.A, 4))
    _watched(f, seen)
    call(f, x)
    assert seen
    assert all(seen)
    _watched(f, seen, RuntimeError("in between"))
    with pytest.raises(RuntimeError, match="in between"):
        call(f, x)
    assert _state(f) == before


def test_a_module_in_a_plain_attribute_is_in_eval_mode_too() -> None:
    model = nn.Sequential(nn.Linear(N, N))
    model.__dict__["hidden"] = nn.Dropout(0.5)
    model.register_forward_hook(lambda module, inputs, y: module.hidden(y))
    how = {"noise_shape": (N,), "block_size": 4}
    first, second = (torch.cat(list(lf.sample_stream(model, 20, n, **how))) for n in (3, 8))
    assert torch.equal(first, second)
    assert model.hidden.training


def test_a_script_is_in_eval_mode_too() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(N, N), nn.Dropout(0.5)))
    rows = torch.cat(list(lf.sample_stream(model, 20, noise_shape=(N,))))
    assert model.training
    assert torch.equal(rows, torch.cat(list(lf.sample_stream(model.eval(), 20, noise_shape=(N,)))))


@pytest.mark.parametrize("train", [False, True])
def test_a_lazy_model_is_refused_and_stays_lazy(train: bool) -> None:
    """In eval mode too, since its first call, in a sampler, would create its tensors."""

    def coupled() -> lf.Linearizer:
        layers = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(N))
        g = lf.Flow([lf.AdditiveCoupling(layers, N)])
        return lf.Linearizer(g, lf.TimeLowRank(N, 1, time_features=4, hidden=8))

    f, x = coupled().train(train), torch.randn(5, N)
    calls: list[Callable[[], object]] = [
        lambda: lf.sample(f, x, **STEPS),
        lambda: lf.invert(f, x, **STEPS),
        lambda: lf.generator(f, **STEPS),
        lambda: list(lf.sample_stream(f, 4, **STEPS)),
        lambda: list(lf.sample_stream(f.g_x, 4, noise_shape=(N,))),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"LazyLinear.* is not initialised: call the model once first"):
            call()
    assert all(map(nn.parameter.is_lazy, f.g_x.parameters()))


def test_a_model_that_cannot_be_copied_is_refused_only_in_train_mode() -> None:
    f = lf.Linearizer(lf.coupling_flow(N, 2, (8,)), lf.Dense(N))
    f.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"need a copy of the Linearizer in eval mode.*lock"):
        lf.sample_stream(f, 3)
    assert next(lf.sample_stream(f.eval(), 3)).shape == (3, N)
    model = nn.Sequential(nn.Dropout(0.5))
    called = model[0].forward
    for function in (lambda x: model[0](x), lambda x: called(x)):
        model.train().own = function
        with pytest.raises(ValueError, match=r"own of a Sequential is a function that refers to a module.*eval"):
            lf.sample_stream(model, 3, noise_shape=(N,))
        assert next(lf.sample_stream(model.eval(), 3, noise_shape=(N,))).shape == (3, N)


# Threads.


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns within every call."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("train", [False, True])
def test_one_model_in_several_threads(train: bool, switching: None) -> None:
    g = perturb(lf.coupling_flow(N, 2, (8,)))
    f = lf.Linearizer(g, lf.TimeLowRank(N, 1, time_features=4, hidden=8), g).train(train)
    other = lf.Linearizer(g, f.A + f.A.T, g).train(train)
    x = torch.randn(5, N)
    calls: list[Callable[[], Tensor]] = [
        lambda: lf.sample(f, x, **STEPS),
        lambda: lf.sample(f, x, **STEPS, one_step=False),
        lambda: lf.invert(f, x, steps=3),
        lambda: lf.collapse(f.A, 4).to_dense(),
        lambda: lf.collapse(other.A, 4, tol=1e-3).to_dense(),
        lambda: lf.generator(f, 4)(x),
        lambda: torch.cat(list(lf.sample_stream(f, 6, 3, steps=3, block_size=3))),
    ]
    truth = [call() for call in calls]
    before = _state(f)

    def compare(i: int) -> bool:
        return torch.equal(calls[i % len(calls)](), truth[i % len(calls)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(compare, range(12 * len(calls))))
    assert _state(f) == before
