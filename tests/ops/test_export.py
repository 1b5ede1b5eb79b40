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


class _WithLogDet(nn.Module):
    def __init__(self, g: lf.Flow) -> None:
        super().__init__()
        self.g = g

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.g.forward_and_log_det(x)


def test_maps_without_a_volume_change_export_for_images_of_any_size() -> None:
    """Where log|det| is 0, it must not be multiplied by the number of positions: that fixes H and W."""
    conditioner = nn.Conv2d(8, 8, 3, padding=1)
    g = lf.Flow([lf.Squeeze(4), lf.AdditiveCoupling(conditioner, 16), lf.Permute(16)])
    batch, height, width = (torch.export.Dim(name, min=2, max=32) for name in ("batch", "height", "width"))
    sizes = {"x": {0: batch, 2: 2 * height, 3: 2 * width}}
    program = torch.export.export(_WithLogDet(g), (torch.randn(2, 4, 8, 8),), dynamic_shapes=sizes)
    x = torch.randn(3, 4, 16, 12)
    _assert_close(program.module()(x), g.forward_and_log_det(x))
