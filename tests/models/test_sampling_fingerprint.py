"""sample_stream goes on with a file of the same model only."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.sampling.fingerprint import fingerprint
from tests.laws.zoo import perturb
from tests.models.stream_runs import Map, N, linearizer, rows_of, streamed
from tests.processes import CONTEXT


def _fixed(A: lf.LatentOperator) -> lf.Linearizer:
    return lf.Linearizer(lf.Flow([], features=N), A)


def _coupled(**how: str) -> lf.Linearizer:
    torch.manual_seed(0)
    return lf.Linearizer(perturb(lf.coupling_flow(N, 2, (8,), **how)), lf.Dense(N))


_SCALE = 2.0


def _scaled(x: Tensor) -> Tensor:
    return x * _SCALE


@functools.wraps(torch.tanh)
def _called_tanh(x: Tensor) -> Tensor:
    return x * 3


@torch.no_grad()
def _decorated(x: Tensor) -> Tensor:
    return x * _SCALE


class DoubleLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replaced() -> lf.Linearizer:
    f = linearizer()
    layers = f.g_x.bijection.bijections[0].conditioner.layers
    layers[0].__class__ = DoubleLinear
    return f


def _by_factory(a: float) -> nn.Module:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return a * x

    return Local()


def _with_buffer(value: float) -> nn.Module:
    module = nn.Identity()
    module.register_buffer("scale", torch.tensor(value), persistent=False)
    module.register_forward_hook(lambda module, inputs, y: y * module.scale)
    return module


def _hooked(by: float) -> lf.Linearizer:
    f = linearizer()
    f.g_x.bijection.register_forward_hook(lambda module, inputs, z: z * by)
    return f


def _patched(by: float) -> nn.Module:
    module = nn.Identity()
    module.forward = lambda x: x * by
    return module


def _in_order(*names: str) -> nn.Module:
    parts = {"tanh": nn.Tanh(), "exp": Map(torch.exp)}
    return nn.Sequential(OrderedDict((name, parts[name]) for name in names))


@lf.io.register
class _Registered(nn.Module):
    """What save knows by its constructor's argument."""

    def __init__(self, scale: object = 1.0) -> None:
        super().__init__()
        self.scale, self._factor = scale, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * self._factor * getattr(self, "more", 1.0)


def _changed(model: nn.Module, name: str, value: object, of: type[nn.Module] = nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, of):
            setattr(module, name, value)
    return model


def _unet() -> nn.Module:
    torch.manual_seed(0)
    return perturb(lf.image_flow(2, 4, depth=1, conditioner="unet", width=8)).eval()


OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "activation": (linearizer, lambda: linearizer("relu")),
    "alpha": (linearizer, lambda: linearizer(alpha=1.0)),
    "t of g_x and g_y": (linearizer, lambda: linearizer(times=(0.0, 1.0))),
    "factor": (linearizer, lambda: linearizer(factor=3.0)),
    "the order of shift and scale": (_coupled, lambda: _coupled(order="scale_first")),
    "alpha of a factored A": (
        lambda: _fixed(lf.LowRank(1.0, torch.ones(N, 1), torch.ones(N, 1))),
        lambda: _fixed(lf.LowRank(2.0, torch.ones(N, 1), torch.ones(N, 1))),
    ),
    "its transpose": (
        lambda: _fixed(lf.Dense.of(torch.arange(16.0).reshape(N, N))),
        lambda: _fixed(lf.Dense.of(torch.arange(16.0).reshape(N, N)).T),
    ),
    "a hook": (linearizer, lambda: _hooked(2.0)),
    "a hook's constant": (lambda: _hooked(2.0), lambda: _hooked(3.0)),
    "a function": (lambda: Map(torch.tanh), lambda: Map(torch.relu)),
    "a function's own constant": (lambda: Map(lambda x: x * 2), lambda: Map(lambda x: x * 3)),
    "a constant": (lambda: Map(constant=1.0), lambda: Map(constant=2.0)),
    "an integer for a float": (lambda: Map(constant=[1]), lambda: Map(constant=[1.5])),
    "a tensor in a list": (lambda: Map(constant=[torch.ones(N)]), lambda: Map(constant=[torch.zeros(N)])),
    "an array": (lambda: Map(constant=np.ones(N, np.float32)), lambda: Map(constant=np.zeros(N, np.float32))),
    "a class made by a function": (lambda: _by_factory(2.0), lambda: _by_factory(3.0)),
    "a buffer that no file holds": (lambda: _with_buffer(2.0), lambda: _with_buffer(3.0)),
    "another class inside": (linearizer, _replaced),
    "a function of another's name": (lambda: Map(torch.tanh), lambda: Map(_called_tanh)),
    "a patched forward": (lambda: _patched(2.0), lambda: _patched(3.0)),
    "torch's own constant": (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2)),
    "a tensor that is no buffer": (lambda: _Registered(torch.ones(N)), lambda: _Registered(2 * torch.ones(N))),
    "an attribute of a registered class": (_Registered, lambda: _changed(_Registered(), "_factor", 2.0)),
    "an attribute that it had not": (_Registered, lambda: _changed(_Registered(), "more", 2.0)),
    "numpy's functions": (
        lambda: Map(lambda x, f=np.exp: torch.from_numpy(f(x.numpy()))),
        lambda: Map(lambda x, f=np.tanh: torch.from_numpy(f(x.numpy()))),
    ),
    "a pattern": (
        lambda: Map(lambda x, p=re.compile("a"): x * len(p.sub("", "aab"))),
        lambda: Map(lambda x, p=re.compile("b"): x * len(p.sub("", "aab"))),
    ),
    "the order of named parts": (lambda: _in_order("tanh", "exp"), lambda: _in_order("exp", "tanh")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_file_of_another_model_is_refused(name: str, tmp_path: Path) -> None:
    first, second = (make() for make in OTHERS[name])
    assert not np.array_equal(rows_of(first), rows_of(second))
    path = tmp_path / "x.npy"
    rows = streamed(first, path)
    assert np.array_equal(streamed(OTHERS[name][0](), path), rows)
    with pytest.raises(ValueError, match="is of another run"):
        streamed(second, path)
    assert np.array_equal(np.load(path), rows)


def test_what_a_function_refers_to_is_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    streamed(Map(_scaled), path)
    streamed(Map(_decorated), tmp_path / "decorated.npy")
    for target, name in ((_scaled.__globals__, "_SCALE"), (Map, "gain")):
        with monkeypatch.context() as patch:
            patch.setitem(target, name, 3.0) if isinstance(target, dict) else patch.setattr(target, name, 3.0)
            with pytest.raises(ValueError, match="is of another run"):
                streamed(Map(_scaled), path)
            with pytest.raises(ValueError, match="is of another run"):
                streamed(Map(_decorated), tmp_path / "decorated.npy")
    assert np.array_equal(streamed(Map(_scaled), path), rows_of(Map(_scaled)))


def _loaded(f: lf.Linearizer, folder: Path) -> nn.Module:
    lf.save(f, folder / "f.safetensors")
    return lf.load(folder / "f.safetensors")


SAME: dict[str, Callable[[lf.Linearizer, Path], nn.Module]] = {
    "loaded": _loaded,
    "copied": lambda f, _: copy.deepcopy(f),
    "pickled": lambda f, _: pickle.loads(pickle.dumps(f)),
    "in eval mode": lambda f, _: f.eval(),
    "frozen": lambda f, _: f.requires_grad_(False),
    "made again": lambda f, _: linearizer(),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("foreign", [False, True])
def test_the_file_of_the_same_model_is_gone_on_with(name: str, foreign: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"

    def wrapped(f: nn.Module) -> nn.Module:
        one = lf.generator(f, 3, "euler", tol=1e-6)
        return nn.Sequential(one, Map()) if foreign else one

    rows = streamed(wrapped(linearizer()), path)
    assert np.array_equal(streamed(wrapped(SAME[name](linearizer(), tmp_path)), path), rows)


def test_the_eps_of_linfasts_own_norms_counts() -> None:
    first, second = _unet(), _changed(_unet(), "eps", 3.0, nn.GroupNorm)
    x = torch.randn(2, 2, 4, 4)
    assert not torch.equal(first(x), second(x))
    assert fingerprint(first) == fingerprint(_unet()) != fingerprint(second)


def test_a_model_that_was_called_is_the_same() -> None:
    """Also inside a class that save does not know, whose parts are read one by one."""
    model = nn.Sequential(lf.coupling_flow(N, 2, (8,), actnorm=True))
    for _ in range(2):
        model(torch.randn(64, N))
    fresh = copy.deepcopy(model).eval()
    assert fingerprint(fresh) == fingerprint(model.eval())


@pytest.mark.parametrize("make", [lambda: lf.coupling_flow(N, 2, (8,)), lambda: nn.Sequential(nn.Linear(N, N))])
def test_a_compiled_model_is_the_same(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = fingerprint(model)
    compiled = torch.compile(model, backend="eager")
    assert (fingerprint(compiled), fingerprint(model)) == (before, before)


def _send_fingerprint(sender: Any) -> None:
    sender.send(fingerprint(nn.Sequential(linearizer(), Map(constant={"a", "b", "c"}))))


def test_a_model_is_the_same_in_another_process() -> None:
    """Where strings have other hashes, and objects lie elsewhere."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send_fingerprint, args=(sender,))
    process.start()
    assert receiver.recv() == fingerprint(nn.Sequential(linearizer(), Map(constant={"c", "b", "a"})))
    process.join()


def test_the_same_numbers_of_another_kind_are_the_same_run(tmp_path: Path) -> None:
    f, path = linearizer(), tmp_path / "x.npy"
    rows = streamed(f, path, steps=3, stop=1, noise_shape=(N,))
    assert np.array_equal(streamed(f, path, steps=np.int64(3), stop=np.float32(1), noise_shape=[np.int64(N)]), rows)


def test_what_cannot_be_told_from_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    f = Map(constant=0.0)
    f.lock = threading.Lock()
    f.eval()
    rows = streamed(f, path)
    assert np.array_equal(rows, rows_of(f))
    with pytest.raises(ValueError, match="cannot be told from another model, a lock in it"):
        streamed(f, path)
    assert np.array_equal(np.load(path), rows)
