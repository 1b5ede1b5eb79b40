"""torch.export of the default models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from tests.laws.zoo import perturb
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


def _assert_close(got: object, expected: object) -> None:
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]  # type: ignore[call-overload]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
