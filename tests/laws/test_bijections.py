"""The laws of every bijection: inverses in both directions, log-determinants, gradients, edge cases."""

from __future__ import annotations

import pytest
import torch

import linfast as lf
from tests.laws.zoo import BIJECTIONS, build, perturb, relative

EPS32 = torch.finfo(torch.float32).eps
every = pytest.mark.parametrize("name", BIJECTIONS)


def _input(shape: tuple[int, ...], batch: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, *shape, dtype=torch.float64).to(dtype)


@every
def test_inverse_undoes_forward_and_forward_undoes_inverse(name: str) -> None:
    g, shape = build(name)
    x = _input(shape)
    assert relative(g.inverse(g(x)), x) < 1e-12
    z = g(_input(shape))
    assert relative(g(g.inverse(z)), z) < 1e-12


@every
def test_fp32_stays_within_a_few_roundings_of_fp64(name: str) -> None:
    wide, shape = build(name)
    narrow, _ = build(name, torch.float32)
    narrow.load_state_dict(wide.state_dict())
    x = _input(shape).float().double()
    z64, log_det64 = wide.forward_and_log_det(x)
    z32, log_det32 = narrow.forward_and_log_det(x.float())
    assert z32.dtype == log_det32.dtype == torch.float32
    assert relative(z32, z64) < 16 * EPS32
    assert float((log_det32 - log_det64).detach().abs().max()) < 64 * EPS32 * (
        1 + float(log_det64.detach().abs().max())
    )
    assert relative(narrow.inverse(z32), x) < 64 * EPS32


@every
def test_log_det_is_that_of_the_jacobian(name: str) -> None:
    g, shape = build(name)
    x = _input(shape, batch=2)
    z, log_det = g.forward_and_log_det(x)
    back, inverse_log_det = g.inverse_and_log_det(z)
    assert torch.equal(z, g(x))
    assert log_det.shape == inverse_log_det.shape == (2,)
    for b in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: g(v[None])[0], x[b])
        n = x[b].numel()
        expected = torch.linalg.slogdet(jacobian.reshape(n, n)).logabsdet
        torch.testing.assert_close(log_det[b], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-10, atol=1e-10)
    assert relative(back, x) < 1e-12


@every
@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_first_and_second_derivatives(name: str, direction: str) -> None:
    g, shape = build(name)
    x = (g(_input(shape, 2)) if direction.startswith("inverse") else _input(shape, 2)).detach()
    x.requires_grad_()
    parameters = list(g.parameters())[:3]

    def run(x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(g, direction)(x)

    assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x,), atol=1e-5, fast_mode=True)


@every
def test_no_rows(name: str) -> None:
    g, shape = build(name)
    x = _input(shape, batch=0)
    z, log_det = g.forward_and_log_det(x)
    assert g.inverse(z).shape == x.shape
    assert log_det.shape == (0,)


@every
def test_strides_do_not_matter(name: str) -> None:
    g, shape = build(name)
    x = _input(shape)
    for method, value in ((g, x), (g.inverse, g(x).detach())):
        for strided in _hostile(value):
            torch.testing.assert_close(method(strided), method(value), rtol=1e-12, atol=1e-12)
        row = value[:1].expand(3, *value.shape[1:])
        torch.testing.assert_close(method(row)[2], method(value)[0], rtol=1e-12, atol=1e-12)


def _hostile(value: torch.Tensor) -> list[torch.Tensor]:
    """The same values as every other element of rows filled with NaN, and with the batch innermost."""
    padded = torch.full((*value.shape[:-1], 2 * value.shape[-1]), float("nan"), dtype=value.dtype)
    padded[..., ::2] = value
    return [padded[..., ::2], value.movedim(0, -1).contiguous().movedim(-1, 0)]


@every
def test_forward_does_not_write_to_its_input(name: str) -> None:
    g, shape = build(name)
    x = _input(shape)
    kept = x.clone()
    z = g(x)
    assert torch.equal(x, kept)
    if name != "identity":
        assert z.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("depth", [1, 8, 32])
@pytest.mark.parametrize("mix", [None, "householder"])
def test_default_flows_round_trip_at_depth(depth: int, mix: str | None) -> None:
    g = perturb(lf.coupling_flow(64, depth, mix=mix))
    x = torch.randn(256, 64)
    assert relative(g.inverse(g(x)), x) < 1e-5
    g.double()
    assert relative(g.inverse(g(x.double())), x) < 1e-13


@pytest.mark.parametrize("depth", [8, 32])
def test_default_bound_survives_last_layers_scaled_by_six(depth: int) -> None:
    g = lf.coupling_flow(64, depth)
    with torch.no_grad():
        for layer in g.bijections:
            last = layer.conditioner.layers[-1]
            last.reset_parameters()  # ours start at zero, which a factor does not change
            for parameter in last.parameters():
                parameter.mul_(6)
    x = torch.randn(256, 64)
    assert relative(g.inverse(g(x)), x) < 4e-5


def test_hooks_of_inner_layers_run() -> None:
    g = lf.coupling_flow(6, 2, (8,))
    seen = []
    g.bijections[1].register_forward_hook(lambda *_: seen.append(1))
    g(torch.randn(2, 6))
    assert seen == [1]


@pytest.mark.parametrize("name", ["flow-mixed", "image-flow-even"])
def test_autocast_keeps_scale_and_log_det_in_fp32(name: str) -> None:
    g, shape = build(name, torch.float32)
    x = _input(shape, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = g.forward_and_log_det(x)
        back = g.inverse(z)
    assert log_det.dtype == torch.float32
    # The conditioners run in bf16, identically in both directions, so that the couplings invert exactly.
    assert relative(back, x) < 64 * torch.finfo(torch.bfloat16).eps
    assert relative(z, g(x)) < 4 * torch.finfo(torch.bfloat16).eps
