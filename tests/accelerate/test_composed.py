"""An accelerated model compiles without graph breaks where the original does, with the same results."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import linfast as lf
from tests.laws.zoo import relative

from .test_usable import Run
from .zoo import KINDS, inputs, make

COMPILED = (
    "normflows exp channel",
    "normflows masked alternate",
    "nflows Affine MLP halves",
    "nflows Additive gather",
    "glasflow",
    "FrEIA GLOWCouplingBlock ATAN",
    "FrEIA NICE",
    "zuko",
    "memcnn sigmoid",
    "reference",
)


def _kind(name):
    """The reference is run once, through both of its networks and A: tracing it takes seconds."""
    if name != "reference":
        return KINDS[name]
    return dataclasses.replace(KINDS[name], run=lambda model, x, c: [model(x, t=c[:, 0].sigmoid())])


def _values_and_gradients(call, run, x, c):
    values = [*call(x, c)]
    total = sum((v.double() * torch.arange(v.numel()).cos().view_as(v)).sum() for v in values)
    wanted = [x, *(p for p in run.parameters() if p.requires_grad)]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*values, *(g for g in found if g is not None)]


def _compiled(run):
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", COMPILED)
def test_an_accelerated_model_compiles_whole_where_the_original_does(name):
    """Values in both directions and all gradients. The original is compiled only to excuse a failure."""
    kind = _kind(name)
    original, given = Run(kind, make(kind, 0)), inputs(kind, torch.float32)
    expected = _values_and_gradients(original, original, *given)
    fast = copy.deepcopy(original)
    assert lf.accelerate(fast).swapped
    eager = _values_and_gradients(fast, fast, *given)
    try:
        compiled = _values_and_gradients(_compiled(fast), fast, *given)
    except torch._dynamo.exc.TorchDynamoException:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            _values_and_gradients(_compiled(original), original, *given)
        pytest.skip("the original does not compile whole either")
    for actual, value, before in zip(compiled, eager, expected, strict=True):
        assert relative(actual, value) < 1e-5
        assert relative(actual, before) < 1e-4
