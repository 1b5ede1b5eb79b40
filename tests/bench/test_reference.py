"""What the runs beside the reference repository count and measure, on models of our own."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from linfast.bench.reference import interleaved, launches, operations, step, step_bytes

import linfast as lf
from linfast.flows.unet_blocks import ResidualBlock


def test_operations_are_those_that_compute() -> None:
    x = torch.randn(3, 4)
    counts = operations(lambda: (x.mT.contiguous() + x.mT).view(-1)[None].exp_())
    assert counts == {"clone": 1, "add": 1, "exp_": 1}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="counts Triton's launches")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels may be loaded as compiled")
def test_launches_run_the_kernels_and_count_them() -> None:
    x, unet = torch.randn(1, 4, 2, 2), lf.UNet(4, 4, 2, 4, (1,), 1, ()).eval()
    with torch.no_grad():
        found, kernels = launches(lambda: unet(x))
        plain = operations(lambda: unet(x))
    blocks = sum(isinstance(module, ResidualBlock) for module in unet.modules())
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in unet.modules())
    assert found["conv2d_fused"] == kernels["_conv2d_fused_kernel"] == 2 * blocks > 5
    assert found["group_norm_silu"] == kernels["_group_norm_silu_kernel"] == norms - 2 * blocks > 0
    assert "native_group_norm" not in found
    assert "group_norm_silu" not in plain  # the backend is as it was


def test_a_step_by_inversion_needs_less_and_starts_from_no_gradients() -> None:
    g, x = lf.image_flow(2, 8, 8, 8), torch.randn(8, 2, 8, 8)
    parameters, sizes = list(g.parameters()), {}
    for g.memory in ("store", "invert", "store"):
        sizes.setdefault(g.memory, []).append(step_bytes(g, parameters, x))
    gradients = sum(p.nbytes for p in parameters)
    assert sizes["store"][0] == sizes["store"][1]
    assert gradients < sizes["invert"][0] < sizes["store"][0] / 2
    before = [p.grad.clone() for p in parameters]
    step(g, parameters, x)
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before, strict=True))


def test_runs_take_turns() -> None:
    order: list[str] = []
    times = interleaved([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b"] * 3  # the first turn warms up
    assert len(times) == 2
    assert all(wall >= 0 and cpu >= 0 for wall, cpu in times)
