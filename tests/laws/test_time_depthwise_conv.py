"""TimeDepthwiseConv: one operator per time, in whatever form the time is given; near the identity at first."""

from __future__ import annotations

import pytest
import torch

import linfast as lf
from tests.laws.zoo import perturb, relative


def _timed() -> lf.TimeDepthwiseConv:
    return perturb(lf.TimeDepthwiseConv(2, 3, (4, 5), time_features=8, hidden=(16,))).double()  # type: ignore[return-value]


def test_a_number_a_tensor_and_a_batch_agree() -> None:
    A_t, z = _timed(), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    times = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    together = A_t(z, t=times)
    assert relative(A_t(z.flatten(1), t=times), together.flatten(1)) == 0.0
    for i, t in enumerate(times):
        for given in (float(t), t):
            assert A_t.at(given).weight.shape == (2, 3, 3)
            assert relative(A_t(z, t=given)[i], together[i]) <= 1e-14
    assert relative(together[0], A_t(z, t=1.0)[0]) > 1e-3
    assert relative(A_t.at(0.4).to_dense() @ z[1].flatten(), together[1].flatten()) <= 1e-13
    assert A_t(z[:0], t=times[:0]).shape == (0, 2, 4, 5)


def test_it_starts_near_the_identity_and_trains() -> None:
    A_t, z = lf.TimeDepthwiseConv(2, 4, (5, 5)), torch.randn(3, 2, 5, 5)
    assert relative(A_t(z, t=0.5), z) < 1.0
    A_t(z, t=torch.rand(3)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in A_t.parameters())


def test_it_is_saved_and_loaded(tmp_path) -> None:
    A_t, z = _timed(), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    lf.save(A_t, tmp_path / "A.safetensors")
    assert torch.equal(lf.load(tmp_path / "A.safetensors")(z, t=0.3), A_t(z, t=0.3))


def test_bad_input_is_named() -> None:
    A_t, z = _timed(), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="TimeDepthwiseConv depends on time: pass t="):
        A_t(z)
    with pytest.raises(ValueError, match=r"its algebra is that of A\.at"):
        A_t.inverse()
    with pytest.raises(ValueError, match=r"t must be a number, 0-d or \[B\], .*; got .*\(1, 3\)"):
        A_t.at(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="kernel_size must be at least 1; got 0"):
        lf.TimeDepthwiseConv(2, 0, (4, 5))
