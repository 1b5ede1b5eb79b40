"""conv2d_fused's kernels against float64: prologue, epilogue, statistics, layouts and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linfast.kernels.conv2d_configs import choose_tile, handed_over, runs_fused, tile_rows_of, weight_splits
from torch import Tensor

import linfast as lf
from linfast.ops import conv2d_fused
from tests.ops.budget import DEVICE, HALF_DTYPES, assert_within_budget, error, hostile
from tests.ops.checks import assert_same_bits, fixed_cotangents
from tests.ops.stacks import factors_of_every_part, rounding

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")
# (B, C_in, H, W), C_out, k, groups
SHAPES = [
    ((2, 8, 5, 7), 8, 3, 2),
    ((1, 8, 9, 11), 12, 3, 4),  # two tiles of positions
    ((2, 18, 3, 4), 20, 3, 6),  # two steps of channels, neither a power of two, groups of three
    ((2, 6, 1, 1), 5, 3, 3),
    ((2, 9, 4, 3), 33, 1, 9),
    ((1, 16, 2, 9), 130, 1, 1),  # two programs' output channels
    ((1, 4, 3, 2), 3, 5, 2),
    ((0, 8, 3, 3), 8, 3, 2),
]
Call = Callable[..., tuple[Tensor, ...]]
_EXACT: dict[str, Any] = {"precision": "exact"}


def _inputs(shape: tuple[int, ...], n_out: int, k: int, dtype: torch.dtype = torch.float32, rows: bool = False):
    """x, weight, bias, norm_weight, norm_bias, residual; x's mean is not small relative to its spread."""
    batch, n_in, height, width = shape
    shapes = (shape, (n_out, n_in, k, k), (batch, n_out) if rows else (n_out,), (n_in,), (n_in,))
    values = [torch.randn(s) for s in (*shapes, (batch, n_out, height, width))]
    values[0] += 2
    values[1] /= (n_in * k * k) ** 0.5
    return [v.to(DEVICE, dtype).requires_grad_() for v in values]


def _call(given: tuple[str, ...] = NAMES[2:], **options: object) -> Call:
    """y and every gradient; the tensors after weight are ``given``; in "exact" by default."""
    options = {**_EXACT, **options}

    def call(x: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        y, _ = conv2d_fused(x, weight, **dict(zip(given, rest, strict=True)), **options)  # type: ignore[arg-type]
        return (y, *torch.autograd.grad(y, (x, weight, *rest), fixed_cotangents(y)[0]))

    return call


@pytest.mark.parametrize(("shape", "n_out", "k", "groups"), SHAPES)
def test_every_shape(shape: tuple[int, ...], n_out: int, k: int, groups: int) -> None:
    assert_within_budget(_call(groups=groups, alpha=0.7), _inputs(shape, n_out, k))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((), {}),
        (("bias",), {}),
        (("residual",), {"alpha": -0.3}),
        ((), {"groups": 4}),
        (("norm_weight",), {"groups": 2}),
        (("norm_bias", "residual"), {"groups": 1}),
        (("bias", "norm_weight", "norm_bias"), {"groups": 2, "activation": False}),
    ],
)
def test_what_is_not_given(given: tuple[str, ...], options: dict[str, object]) -> None:
    inputs = dict(zip(NAMES, _inputs((2, 8, 3, 5), 6, 3), strict=True))
    assert_within_budget(_call(given, **options), [inputs[name] for name in (*NAMES[:2], *given)])


def test_a_bias_for_each_sample() -> None:
    assert_within_budget(_call(groups=2), _inputs((3, 8, 3, 4), 6, 3, rows=True))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_sums_in_fp32(dtype: torch.dtype) -> None:
    assert_within_budget(_call(groups=2, alpha=0.7), _inputs((2, 8, 5, 7), 8, 3, dtype))


@pytest.mark.parametrize("precision", ["exact", "tf32", "high", "fast"])
def test_precision_modes(precision: str) -> None:
    """Operands are rounded as the mode says, and no more accurately."""
    inputs, call = _inputs((2, 16, 4, 5), 8, 3), _call(groups=4, precision=precision)
    assert_within_budget(call, inputs, rounding(precision))
    with lf.backend("triton"):
        got = call(*inputs)
    truth = call(*(t.detach().double().requires_grad_() for t in inputs))
    assert max(map(error, got, truth)) >= {"exact": 0, "tf32": 1e-5, "high": 2e-8, "fast": 1e-5}[precision]


def test_exact_products_keep_every_bit_of_fp32() -> None:
    x, w = factors_of_every_part()
    with lf.backend("triton"):
        y, _ = conv2d_fused(x.reshape(1, 1, 1, 3), w.reshape(3, 1, 1, 1), precision="exact")
    assert torch.equal(y[0, :, 0].diagonal(), x * w)


def test_more_positions_than_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linfast.kernels.conv2d_configs._STEPS_A_SPLIT", 1)
    assert weight_splits(3) == (3, 1)
    assert_within_budget(_call(groups=2), _inputs((2, 4, 9, 17), 4, 3))


def test_a_mean_a_thousand_times_the_spread_costs_only_the_inputs_own_digits() -> None:
    x, weight, *_ = (t.detach() for t in _inputs((1, 8, 5, 7), 8, 3))
    x = x + 1000
    with lf.backend("triton"):
        y, _ = conv2d_fused(x, weight, groups=2, precision="exact")
    exact, _ = conv2d_fused(x.double(), weight.double(), groups=2)
    assert error(y, exact) <= 4 * 1000 * 2.0**-24


@pytest.mark.parametrize("name", sorted(hostile(torch.zeros(2, 2, 2, 2))))
def test_strides_of_every_tensor_and_of_the_incoming_gradient(name: str) -> None:
    inputs = [t.detach() for t in _inputs((2, 8, 3, 2), 6, 3)]
    cotangent = torch.randn(2, 6, 3, 2).to(inputs[0])

    def strided(t: Tensor) -> Tensor:
        return hostile(t[None] if t.ndim == 1 else t).get(name, t).reshape(t.shape)

    def call(x: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        y, _ = conv2d_fused(x, weight, **dict(zip(NAMES[2:], rest, strict=True)), groups=2, **_EXACT)  # type: ignore[arg-type]
        return (y, *torch.autograd.grad(y, (x, weight, *rest), strided(cotangent.to(y.dtype))))

    assert_within_budget(call, [strided(t).requires_grad_() for t in inputs])


@pytest.mark.parametrize("only", range(6), ids=NAMES)
def test_each_gradient_alone(only: int) -> None:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, _ = conv2d_fused(*tensors[:2], **dict(zip(NAMES[2:], tensors[2:], strict=True)), groups=2, **_EXACT)  # type: ignore[arg-type]
        return torch.autograd.grad(y, tensors[only], fixed_cotangents(y)[0].expand_as(y))

    inputs = _inputs((2, 8, 3, 5), 6, 3)
    assert_within_budget(call, [t.detach().requires_grad_(i == only) for i, t in enumerate(inputs)])


def test_an_expanded_gradient() -> None:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, _ = conv2d_fused(*tensors[:2], **dict(zip(NAMES[2:], tensors[2:], strict=True)), groups=2, **_EXACT)  # type: ignore[arg-type]
        return torch.autograd.grad(y.sum(), tensors)

    assert_within_budget(call, _inputs((2, 8, 3, 5), 6, 3))


@pytest.mark.parametrize(
    ("shape", "n_out", "groups"), [((1, 8, 6, 11), 12, 3), ((2, 4, 2, 3), 10, 2), ((1, 4, 1, 1), 8, 8)]
)
def test_statistics_are_handed_over(shape: tuple[int, ...], n_out: int, groups: int) -> None:
    """The next convolution uses the first one's statistics: y, and gradients through both."""
    x, weight, *_ = _inputs(shape, n_out, 3)
    second = (torch.randn(4, n_out, 3, 3, device=DEVICE) / n_out).requires_grad_()
    seen = []

    def call(x: Tensor, weight: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        h, statistics = conv2d_fused(x + 5, weight, next_groups=groups, precision="exact")
        seen.append((h.detach(), statistics))
        y, _ = conv2d_fused(h, second, groups=groups, statistics=statistics, precision="exact")
        return (y, *torch.autograd.grad(y, (x, weight, second), fixed_cotangents(y)[0]))

    assert_within_budget(call, [x, weight, second])
    h, tiles = seen[0]
    assert tiles is not None
    assert not tiles.requires_grad
    assert all(statistics is None for _, statistics in seen[2:])
    assert_tiles_are_moments(h, tiles)


def assert_tiles_are_moments(y: Tensor, tiles: Tensor) -> None:
    """(m_t, q_t) [B, tiles, groups, 2] of y, written out."""
    rows = tile_rows_of(tiles.shape[1], y.shape[2] * y.shape[3])
    parts = y.double().reshape(len(y), tiles.shape[2], -1, y.shape[2] * y.shape[3]).split(rows, 3)
    means = torch.stack([part.mean((2, 3)) for part in parts], 1)
    squares = torch.stack([part.var((2, 3), correction=0) * part[0, 0].numel() for part in parts], 1)
    assert error(tiles[..., 0], means) <= 1e-6
    assert error(tiles[..., 1], squares) <= 1e-5


@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 17, 33), 4), ((1, 300, 2, 15), 1), ((2, 5, 1, 1), 5)])
def test_statistics_of_a_tensor(shape: tuple[int, ...], groups: int) -> None:
    from linfast.kernels.group_statistics import launch_group_statistics

    x = torch.randn(shape, device=DEVICE) + 100
    for layout in hostile(x).values():
        assert_tiles_are_moments(layout, launch_group_statistics(layout, groups))


def test_statistics_given_are_those_used() -> None:
    """Wrong statistics give another y, so that they are not computed again."""
    x, weight, *_ = (t.detach() for t in _inputs((2, 8, 3, 5), 8, 3))
    with lf.backend("triton"):
        _, statistics = conv2d_fused(x, weight, next_groups=2)
        assert statistics is not None
        own, _ = conv2d_fused(x, weight, groups=2)
        other, _ = conv2d_fused(x, weight, groups=2, statistics=statistics + 1)
    assert error(other, own) > 1e-2


def test_groups_that_the_kernel_does_not_sum_are_left_to_the_next_norm() -> None:
    x, weight, *_ = (t.detach() for t in _inputs((1, 4, 2, 2), 15, 1))
    assert handed_over(15, 1)
    assert not handed_over(15, 5)  # 5 groups of 3, padded to 8 of 4, are more than the tile's 16 columns
    with lf.backend("triton"):
        assert conv2d_fused(x, weight, next_groups=1)[1] is not None
        assert conv2d_fused(x, weight, next_groups=5)[1] is None


@pytest.mark.parametrize("shape", [(1, 8, 6, 11), (2, 18, 2, 2)])
def test_int64_offsets_and_a_second_run_give_the_same_bits(shape: tuple[int, ...], monkeypatch) -> None:
    import linfast.kernels.conv2d_fused as forward
    import linfast.kernels.conv2d_fused_backward as backward
    import linfast.kernels.group_statistics as statistics

    assert_same_bits(_call(groups=2), _inputs(shape, 12, 3), monkeypatch, forward, backward, statistics)


def test_nan_stays_where_it_reaches() -> None:
    x, weight, *_ = (t.detach() for t in _inputs((1, 8, 5, 5), 8, 3))
    x[0, 0, 0, 0] = float("nan")
    with lf.backend("triton"):
        y, _ = conv2d_fused(x, weight)
    assert bool(y[:, :, :2, :2].isnan().all())
    assert not bool(y[:, :, 2:].isnan().any())


def test_where_it_runs() -> None:
    """The table by channels, kernel, mode and target; and the tiles of small images."""
    assert runs_fused(16, 16, 3, "tf32", "sm_90")
    assert not runs_fused(16, 16, 3, "tf32", None)
    assert not runs_fused(16, 16, 3, "tf32", "gfx942")
    assert not runs_fused(4, 16, 3, "tf32", "sm_90")
    assert not runs_fused(16, 128, 3, "tf32", "sm_90")
    assert runs_fused(64, 64, 3, "fast", "sm_80")
    assert runs_fused(32, 32, 1, "fast", "sm_80")
    assert not runs_fused(64, 64, 1, "fast", "sm_80")
    assert not runs_fused(64, 64, 3, "exact", "sm_90")
    assert not runs_fused(16, 16, 5, "tf32", "sm_90")
    assert [choose_tile(16, n)["ROWS"] for n in (1, 16, 17, 4096)] == [16, 16, 32, 64]
    assert [tile_rows_of(n, 99) for n in (1, 2, 4)] == [128, 64, 32]
