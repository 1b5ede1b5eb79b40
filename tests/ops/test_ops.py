"""The ops against their formulas, written out plainly."""

from __future__ import annotations

import pytest
import torch

from linfast import ops
from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", SCALE_MAP_KINDS)
@pytest.mark.parametrize("order", ["shift_first", "scale_first"])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("moves", ["first", "second"])
def test_affine_coupling_is_its_formula(kind: str, order: str, layout: str, moves: str) -> None:
    x, scale_map = _rand(4, 5, 3), ScaleMap(kind)
    moved = x[:, :3] if moves == "first" else x[:, 3:]
    shift, raw = _rand(*moved.shape), _rand(*moved.shape)
    params = torch.cat((shift, raw), 1) if layout == "halves" else torch.stack((shift, raw), 2).flatten(1, 2)
    log_s = scale_map.log_scale(raw)
    expected = (moved + shift) * log_s.exp() if order == "shift_first" else moved * log_s.exp() + shift
    y, log_det = ops.affine_coupling(x, params, scale_map, order=order, layout=layout, moves=moves, log_det=True)
    whole = (expected, x[:, 3:]) if moves == "first" else (x[:, :3], expected)
    torch.testing.assert_close(y, torch.cat(whole, 1))
    torch.testing.assert_close(log_det, log_s.sum((1, 2)))
    back, inverse_log_det = ops.affine_coupling(
        y, params, scale_map, order=order, layout=layout, moves=moves, inverse=True, log_det=True
    )
    torch.testing.assert_close(back, x)
    assert torch.equal(inverse_log_det, -log_det)


@pytest.mark.parametrize("kind", SCALE_MAP_KINDS)
@pytest.mark.parametrize("floor", [None, 1e-3])
def test_scale_maps_agree_with_their_derivative_inverse_and_bound(kind: str, floor: float | None) -> None:
    scale_map = ScaleMap(kind, floor=floor)
    raw = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    log_scale = scale_map.log_scale(raw)
    (gradient,) = torch.autograd.grad(log_scale.sum(), raw)
    torch.testing.assert_close(scale_map.derivative(raw), gradient)
    inside = scale_map.derivative(raw) > 0
    torch.testing.assert_close(scale_map.inverse(log_scale[inside]), raw[inside])
    bound, _ = scale_map.constants
    if kind in ("clamp", "smooth", "tanh", "arctan"):
        assert float(scale_map.log_scale(torch.tensor([-1e9, 1e9]).double()).abs().max()) <= bound
    assert len({ScaleMap(k).constexpr_id for k in SCALE_MAP_KINDS}) == len(SCALE_MAP_KINDS)


def test_scale_maps_are_the_published_ones() -> None:
    raw = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for scale_map, scale in (
        (ScaleMap("clamp"), raw.clamp(-5, 5).exp()),
        (ScaleMap("sigmoid", floor=1e-3), torch.sigmoid(raw + 2) + 1e-3),
        (ScaleMap("sigmoid"), torch.sigmoid(raw + 2)),
        (ScaleMap("softplus"), (torch.nn.functional.softplus(raw) + 1e-3).clamp(0, 3)),
        (ScaleMap("tanh", 2.0), torch.exp(2 * torch.tanh(raw))),
        (ScaleMap("exp"), raw.exp()),
    ):
        torch.testing.assert_close(scale_map.log_scale(raw).exp(), scale)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (3, 2), 9])
@pytest.mark.parametrize("per_sample", [False, True])
def test_depthwise_conv_is_same_padded_and_its_transpose_is_exact(kernel, per_sample: bool) -> None:
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    x, y = _rand(2, 3, 5, 4), _rand(2, 3, 5, 4)
    weight = _rand(2, 3, kh, kw) if per_sample else _rand(3, kh, kw)
    out = ops.depthwise_conv(x, weight)
    for b in range(2):
        w = weight[b] if per_sample else weight
        expected = torch.nn.functional.conv2d(x[b : b + 1], w[:, None], padding="same", groups=3)
        torch.testing.assert_close(out[b : b + 1], expected)
    back = ops.depthwise_conv(y, weight, transpose=True)
    torch.testing.assert_close((out * y).sum(), (x * back).sum())


@pytest.mark.parametrize("alpha", [0.0, 0.7, torch.tensor(0.7, dtype=torch.float64)])
@pytest.mark.parametrize("shared_u", [True, False])
@pytest.mark.parametrize("shared_v", [True, False])
def test_low_rank_is_its_dense_product(alpha, shared_u: bool, shared_v: bool) -> None:
    x = _rand(4, 7)
    U = _rand(7, 2) if shared_u else _rand(4, 7, 2)
    V = _rand(7, 2) if shared_v else _rand(4, 7, 2)
    dense = alpha * torch.eye(7, dtype=torch.float64) + U @ V.mT
    torch.testing.assert_close(ops.low_rank(x, U, V, alpha), (dense @ x[..., None])[..., 0])


def test_low_rank_never_forms_the_matrix() -> None:
    n, seen = 3000, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if t is not None)
            return out

    x, U, V = (torch.randn(*s, requires_grad=True) for s in ((2, n), (2, n, 4), (2, n, 4)))
    with Watch():
        ops.low_rank(x, U, V).square().sum().backward()
    assert max(seen) < n * n // 50


def test_channel_mix_and_latent_matmul() -> None:
    x, W = _rand(2, 3, 4, 5), _rand(6, 3)
    torch.testing.assert_close(ops.channel_mix(x, W), torch.einsum("oc,bchw->bohw", W, x))
    z, A = _rand(4, 3), _rand(5, 3)
    torch.testing.assert_close(ops.latent_matmul(z, A), z @ A.mT)
    batch = _rand(4, 5, 3)
    torch.testing.assert_close(ops.latent_matmul(z, batch), torch.stack([batch[b] @ z[b] for b in range(4)]))


@pytest.mark.parametrize(("groups", "activation"), [(0, True), (2, True), (3, False)])
def test_conv2d_fused_is_its_formula(groups: int, activation: bool) -> None:
    """The taps are written out; the zeros of the padding come after the activation."""
    x, weight, bias, residual = _rand(2, 6, 4, 5), _rand(3, 6, 3, 3), _rand(2, 3), _rand(2, 3, 4, 5)
    scale, offset = (_rand(6), _rand(6)) if groups else (None, None)
    y, _ = ops.conv2d_fused(
        x, weight, bias, groups=groups, norm_weight=scale, norm_bias=offset, activation=activation,
        residual=residual, alpha=-0.5,
    )  # fmt: skip
    a = x
    if groups:
        rows = x.reshape(2, groups, -1)
        rows = (rows - rows.mean(2, keepdim=True)) / (rows.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        a = rows.view_as(x) * scale[:, None, None] + offset[:, None, None]
        a = a * torch.sigmoid(a) if activation else a
    padded = torch.nn.functional.pad(a, (1, 1, 1, 1))
    taps = (
        torch.einsum("oc,bchw->bohw", weight[:, :, u, v], padded[:, :, u : u + 4, v : v + 5])
        for u in range(3)
        for v in range(3)
    )
    torch.testing.assert_close(y, sum(taps) + bias[:, :, None, None] - 0.5 * residual)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ops.affine_coupling(_rand(2, 4), _rand(2, 3), ScaleMap()), r"params must be \(2, 4\)"),
        (lambda: ops.affine_coupling(_rand(2, 4), _rand(2, 4).to("meta"), ScaleMap()), "params is on meta"),
        (lambda: ops.affine_coupling(_rand(2, 1), _rand(2, 2), ScaleMap()), r"C >= 2.*\(2, 1\)"),
        (lambda: ops.low_rank(_rand(2, 4), _rand(4, 2), _rand(5, 2)), r"V must have N = 4"),
        (lambda: ops.low_rank(_rand(2, 4), _rand(4, 2), _rand(4, 3)), "same rank"),
        (lambda: ops.low_rank(_rand(2, 4), _rand(5, 2), _rand(4, 2), 1.0), "alpha must be 0"),
        (lambda: ops.low_rank(_rand(2, 4), _rand(3, 4, 2), _rand(4, 2)), r"U must be.*\(3, 4, 2\)"),
        (lambda: ops.low_rank(_rand(4), _rand(4, 2), _rand(4, 2)), r"x must be \[B, N\]"),
        (lambda: ops.latent_matmul(_rand(2, 4), _rand(3, 5)), r"\(2, 4\).*\(3, 5\)"),
        (lambda: ops.latent_matmul(_rand(2, 4), _rand(3, 5, 4)), "3 operators for 2 rows"),
        (lambda: ops.depthwise_conv(_rand(2, 3, 4), _rand(3, 2, 2)), r"x must be.*\(2, 3, 4\)"),
        (lambda: ops.depthwise_conv(_rand(2, 3, 4, 4), _rand(2, 2, 2)), r"weight must be.*\(2, 2, 2\)"),
        (lambda: ops.channel_mix(_rand(2, 3), _rand(3, 4)), r"\(2, 3\).*\(3, 4\)"),
        (lambda: ops.conv2d_fused(_rand(2, 3, 4, 4), _rand(5, 2, 3, 3)), r"\(2, 3, 4, 4\).*\(5, 2, 3, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
