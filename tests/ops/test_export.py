"""torch.export of the default models; compiled Linearizers: whole, and agreeing with eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from tests.laws.zoo import perturb
from tests.marks import long
from tests.ops.budget import DEVICE


def _linearizer(image: bool) -> lf.Linearizer:
    if not image:
        return lf.Linearizer(lf.coupling_flow(6, 2, (8,)), lf.Dense(6, 6))
    g = lf.image_flow(2, 4, 2, 8, actnorm=True, mix="lu")
    g(2 + 3 * torch.randn(8, 2, 4, 4))
    return lf.Linearizer(g, lf.Dense(32, 32))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "coupling_flow": (lambda: lf.coupling_flow(6, 2, (8,)), (3, 6)),
    "image_flow": (lambda: lf.image_flow(1, 4, 2, 8), (2, 1, 4, 4)),
    "Linearizer": (lambda: _linearizer(image=False), (3, 6)),
    "image Linearizer": (lambda: _linearizer(image=True), (2, 2, 4, 4)),
}


def _model(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    return perturb(make()).to(DEVICE), torch.randn(shape, device=DEVICE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_default_models_export(name: str, backend: str) -> None:
    model, x = _model(name)
    with lf.backend(backend), torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        got = program.module()(x)
    _assert_close(got, expected)
    targets = {str(node.target).split(".")[1] for node in program.graph.nodes if "linfast." in str(node.target)}
    if backend == "reference":
        assert targets == set()
    else:
        assert "coupling_mix" in targets or (
            "affine_coupling" in targets and name in ("coupling_flow", "Linearizer")
        )


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("Linearizer", "triton"),
        *long(("Linearizer", "reference"), ("image Linearizer", "triton"), ("image Linearizer", "reference")),
    ],
)
def test_default_linearizers_compile_without_a_graph_break(name: str, backend: str) -> None:
    f, x = _model(name)
    parameters = [p for p in f.parameters() if p.requires_grad]
    with lf.backend(backend):
        expected = f(x)
        expected_gradients = torch.autograd.grad(expected.square().sum(), parameters)
        for method in (f, f.inverse):
            compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
            _assert_close(compiled(x), method(x))
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        gradients = torch.autograd.grad(compiled(x).square().sum(), parameters)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _assert_close(got: object, expected: object) -> None:
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]  # type: ignore[call-overload]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
