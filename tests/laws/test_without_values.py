"""Shapes without values: on the meta device and in torch's FakeTensorMode no tensor is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import linfast as lf
from tests.laws.zoo import BIJECTIONS

Emptied = Callable[..., tuple[Any, Tensor]]


@pytest.fixture(params=["meta", "fake"])
def emptied(request: pytest.FixtureRequest) -> Iterator[Emptied]:
    """(module, shape) -> the module and an input [2, *shape], without values."""
    mode = FakeTensorMode()

    def fake(module: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
        for part in module.modules():
            for group in (part._parameters, part._buffers):
                group.update({name: None if t is None else mode.from_tensor(t) for name, t in group.items()})
        stack.enter_context(mode)
        return module, torch.randn(2, *shape)

    def meta(module: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
        return module.to("meta"), torch.randn(2, *shape, device="meta")

    with contextlib.ExitStack() as stack:
        yield fake if request.param == "fake" else meta


@pytest.mark.parametrize("memory", ["store", "invert"])
@pytest.mark.parametrize("name", BIJECTIONS)
def test_bijections_give_shapes(emptied: Emptied, name: str, memory: str) -> None:
    make, shape = BIJECTIONS[name]
    if memory == "invert" and not name.startswith(("flow", "image-flow")):
        return
    g, x = emptied(make(), *shape)
    x.requires_grad_()
    for flow in (m for m in g.modules() if isinstance(m, lf.Flow)):
        flow.memory = memory
    z, log_det = g.forward_and_log_det(x)
    (z.sum() + log_det.sum()).backward()
    y, log_det = g.inverse_and_log_det(z.detach())
    assert (y.shape, log_det.shape) == (x.shape, (2,))


def test_a_new_actnorm_stays_new(emptied: Emptied) -> None:
    g, x = emptied(lf.ActNorm(3), 3, 4)
    assert g.train()(x).shape == x.shape
    assert not g.waits_for_data()


OPERATORS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: lf.Dense(8),
    "low rank": lambda: lf.LowRank(0.5, torch.randn(8, 2), torch.randn(8, 2)),
    "diagonal": lambda: lf.Diagonal(8),
    "convolution": lambda: lf.DepthwiseConv(2, 3, (2, 2)),
    "at a time": lambda: lf.TimeLowRank(8, rank=2, alpha=1.0).at(0.5),
}
ALGEBRA: dict[str, Callable[..., object]] = {
    "inverse": lambda A: A.inverse(),
    "pinv": lambda A: A.pinv(),
    "power": lambda A: A**-2,
    "svd": lambda A: A.svd(),
    "eig": lambda A: A.eig(),
    "norm": lambda A: A.norm(2),
}


@pytest.mark.parametrize("what", ALGEBRA)
@pytest.mark.parametrize("name", OPERATORS)
def test_algebra_gives_shapes(emptied: Emptied, name: str, what: str) -> None:
    A, _ = emptied(OPERATORS[name](), 8)
    found = ALGEBRA[what](A)
    for tensor in found.parameters() if isinstance(found, nn.Module) else tree_leaves(found):
        assert not isinstance(tensor, Tensor) or tensor.is_meta or hasattr(tensor, "fake_mode")


def test_sampling_gives_shapes(emptied: Emptied) -> None:
    g = lf.coupling_flow(8, depth=2, hidden=(8,), mix="lu", time_features=8)
    f, x = emptied(lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(8, rank=2), g.at(t=0.0)), 8)
    for method in ("euler", "rk4"):
        assert lf.generator(f, steps=5, method=method)(x).shape == x.shape
        assert lf.sample(f, x, steps=5, method=method, one_step=False).shape == x.shape
    with pytest.raises(ValueError, match="tol must be None for an operator without values"):
        lf.collapse(f.A, steps=5, tol=1e-3)
