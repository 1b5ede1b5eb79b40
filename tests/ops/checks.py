"""Checks that apply to every op alike: compilation, transforms, second derivatives, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import linfast as lf
from tests.ops.budget import Call, Outputs, assert_within_budget
from tests.seeds import seeded

Scalar = Callable[..., Tensor]
_ORDERS = ("shift_first", "scale_first")


def turned(names: Sequence[str]) -> list[tuple[str, bool, str]]:
    """Each name in both directions and both orders of shift and scale, of which each pair comes with some name."""
    return [
        (name, inverse, _ORDERS[(i + inverse) % 2]) for i, name in enumerate(names) for inverse in (False, True)
    ]


def fixed_cotangents(*outputs: Tensor) -> list[Tensor]:
    """A random cotangent for each output, the same at every call."""
    rng = torch.Generator().manual_seed(seeded(1))
    return [torch.randn(output.shape, generator=rng).to(output) for output in outputs]


def refuse_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a launch raises AssertionError with the launcher's name."""

    def refuse(path: str) -> None:
        raise AssertionError(path)

    monkeypatch.setattr("linfast.ops.register._launcher", refuse)


def squared_sum(function: Callable[..., Tensor]) -> Scalar:
    """The sum of squares of the function's outputs."""
    return lambda *tensors: function(*tensors).square().sum()


def second_derivatives(loss: Scalar) -> Call:
    """The gradients of the squared gradients of a loss, with respect to the tensors that require one."""

    def call(*tensors: Tensor) -> Outputs:
        wanted = [t for t in tensors if t.requires_grad]
        first = torch.autograd.grad(loss(*tensors), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    return call


def assert_compiles_whole(loss: Scalar, inputs: Sequence[Tensor], op: str, launches: int = 1) -> None:
    """The compiled loss has no graph break, calls the op forward and backward, and has the same gradients."""
    called: list[str] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with lf.backend("triton"):
        compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        got = torch.autograd.grad(compiled(*inputs), inputs)
        expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(got, expected)
    assert called.count(f"linfast.{op}.default") == launches
    assert called.count(f"linfast.{op}_backward.default") == launches


def assert_transforms(transforms: Call, loss: Scalar, inputs: Sequence[Tensor]) -> None:
    """torch.func's transforms of the kernels are within the budget; forward-mode ones raise."""
    assert_within_budget(transforms, inputs)
    first, *rest = inputs
    with lf.backend("triton"), pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: loss(x, *rest), (first,), (first,))


def assert_same_bits(
    call: Call, inputs: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch, *modules: ModuleType
) -> None:
    """A second run, and one with int64 offsets in these kernel modules, give the bits of the first."""
    with lf.backend("triton"):
        first, again = call(*inputs), call(*inputs)
        for module in modules:
            monkeypatch.setattr(module, "needs_int64", lambda *_: True)
        wide = call(*inputs)
    for a, b, c in zip(first, again, wide, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def assert_registered(op: torch._ops.OpOverload, *calls: tuple[object, ...]) -> None:
    """opcheck for each of these arguments; tracing with unknown sizes, the slowest part, only for the first."""
    torch.library.opcheck(op, calls[0])
    for arguments in calls[1:]:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
