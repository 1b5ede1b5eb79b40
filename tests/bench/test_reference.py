"""The measurements against the research repository, run on our own models."""

from __future__ import annotations

import torch
from linfast.bench.reference import step, step_bytes

import linfast as lf


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
