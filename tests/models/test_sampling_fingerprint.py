"""sample_stream resumes only a file of the same model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.sampling.stream import fingerprint
from tests.laws.zoo import perturb
from tests.models.stream_runs import Map, N, linearizer, rows_of, streamed
from tests.processes import CONTEXT


def _fixed(A: lf.LatentOperator) -> lf.Linearizer:
    return lf.Linearizer(lf.Flow([], features=N), A)


def _coupled(**how: str) -> lf.Linearizer:
    torch.manual_seed(0)
    return lf.Linearizer(perturb(lf.coupling_flow(N, 2, (8,), **how)), lf.Dense(N))


class DoubleLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replaced() -> lf.Linearizer:
    f = linearizer()
    layers = f.g_x.bijection.bijections[0].conditioner.layers
    layers[0].__class__ = DoubleLinear
    return f


def _hooked(by: float) -> lf.Linearizer:
    f = linearizer()
    f.g_x.bijection.register_forward_hook(lambda module, inputs, z: z * by)
    return f


@lf.io.register
class _Registered(nn.Module):
    """A registered class, which ``save`` stores by its constructor's argument."""

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
    "another class inside": (linearizer, _replaced),
    "an attribute of a registered class": (_Registered, lambda: _changed(_Registered(), "_factor", 2.0)),
    "an attribute that it had not": (_Registered, lambda: _changed(_Registered(), "more", 2.0)),
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
def test_the_file_of_the_same_model_is_gone_on_with(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    rows = streamed(lf.generator(linearizer(), 3, "euler", tol=1e-6), path)
    same = SAME[name](linearizer(), tmp_path)
    assert np.array_equal(streamed(lf.generator(same, 3, "euler", tol=1e-6), path), rows)


def test_the_eps_of_linfasts_own_norms_counts() -> None:
    first, second = _unet(), _changed(_unet(), "eps", 3.0, nn.GroupNorm)
    x = torch.randn(2, 2, 4, 4)
    assert not torch.equal(first(x), second(x))
    assert fingerprint(first) == fingerprint(_unet()) != fingerprint(second)


def test_a_model_that_was_called_is_the_same() -> None:
    model = lf.coupling_flow(N, 2, (8,), actnorm=True)
    for _ in range(2):
        model(torch.randn(64, N))
    fresh = copy.deepcopy(model).eval()
    assert fingerprint(fresh) == fingerprint(model.eval())


def test_a_compiled_model_is_the_same() -> None:
    model = lf.coupling_flow(N, 2, (8,))
    before = fingerprint(model)
    compiled = torch.compile(model, backend="eager")
    assert (fingerprint(compiled), fingerprint(model)) == (before, before)


def _send_fingerprint(sender: Any) -> None:
    sender.send(fingerprint(lf.Flow([linearizer().g_x, lf.AdditiveCoupling(_Registered("a"), N)])))


def test_a_model_is_the_same_in_another_process() -> None:
    """Another process has other hashes of strings and other addresses."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send_fingerprint, args=(sender,))
    process.start()
    assert receiver.recv() == fingerprint(lf.Flow([linearizer().g_x, lf.AdditiveCoupling(_Registered("a"), N)]))
    process.join()


def test_the_same_numbers_of_another_kind_are_the_same_run(tmp_path: Path) -> None:
    f, path = linearizer(), tmp_path / "x.npy"
    rows = streamed(f, path, steps=3, stop=1, noise_shape=(N,))
    assert np.array_equal(streamed(f, path, steps=np.int64(3), stop=np.float32(1), noise_shape=[np.int64(N)]), rows)


UNDESCRIBED: dict[str, Callable[[], nn.Module]] = {
    "a class that is not registered": Map,
    "a module of torch's": lambda: nn.LeakyReLU(0.1),
    "a hook": lambda: _hooked(2.0),
    "a tensor that is no buffer": lambda: _Registered(torch.ones(N)),
}


@pytest.mark.parametrize("name", UNDESCRIBED)
def test_a_model_that_no_file_can_describe_is_not_gone_on_with(name: str, tmp_path: Path) -> None:
    path, f = tmp_path / "x.npy", UNDESCRIBED[name]()
    rows = streamed(f, path)
    assert np.array_equal(rows, rows_of(f))
    with pytest.raises(ValueError, match=r"is of another run.*cannot be told from another model, for no file can"):
        streamed(f, path)
    assert np.array_equal(np.load(path), rows)
