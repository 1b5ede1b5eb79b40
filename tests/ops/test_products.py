"""The product of kernels/mlp.py alone, y = x W^T, against float64: by mode, at values that are hard for parts.

An error is relative to sum_k |x_ik W_jk|, to which the errors of fp32 are proportional: large features that weights
cancel, or huge rows beside tiny ones, do not hide the error of others.

Triton's interpreter has no bf16 arithmetic: there "high" and "fast" are computed in parts of tf32, which err less
than bf16. Only machine code, on a GPU or in tests.machine_code, tests the limits of these modes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from linfast.kernels.mlp import dot_parts, dot_scaled, operand, scaled_parts, split
from linfast.kernels.stack_spec import N_PARTS
from torch import Tensor

from tests.ops.budget import COMPILED, DEVICE

ROWS = COLUMNS = 64


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, y_ptr, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, CHUNK)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, K, CHUNK):
        x0, x1, x2 = split(tl.load(x_ptr + r[:, None] * K + (first + k)[None, :]), DTYPE, PARTS)
        w0, w1, w2 = split(tl.load(w_ptr + n[None, :] * K + (first + k)[:, None]), DTYPE, PARTS)
        total = dot_parts(x0, x1, x2, w0, w1, w2, total, PARTS)
    tl.store(y_ptr + r[:, None] * COLUMNS + n[None, :], total)


@triton.jit
def _scaled_product_kernel(
    x_ptr, w_ptr, y_ptr, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """W is scaled already, as it is packed."""
    r = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, CHUNK)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, K, CHUNK):
        x = tl.load(x_ptr + r[:, None] * K + (first + k)[None, :])
        x0, x1, _, unscale = operand(x, tl.float16, 2)
        w0, w1 = scaled_parts(tl.load(w_ptr + n[None, :] * K + (first + k)[:, None]))
        total = dot_scaled(x0, x1, unscale, w0, w1, total)
    tl.store(y_ptr + r[:, None] * COLUMNS + n[None, :], total)


def scaled_product(x: Tensor, W: Tensor) -> Tensor:
    """x W^T as stacks compute it in "exact": x [64, K], W [64, K]."""
    y, K = x.new_empty(ROWS, COLUMNS), x.shape[1]
    scale = torch.ldexp(torch.ones(COLUMNS, device=DEVICE), 15 - W.abs().amax(1).frexp().exponent)
    _scaled_product_kernel[(1,)](x, W * scale[:, None], y, K, ROWS=ROWS, COLUMNS=COLUMNS, CHUNK=min(K, 128))
    return y * (2.0**14 / scale)


def product(x: Tensor, W: Tensor, mode: str) -> Tensor:
    """x W^T as other ops, and gradients, compute it: x [64, K], W [64, K]."""
    y = x.new_empty(ROWS, COLUMNS)
    # The interpreter has no bf16 arithmetic; parts in tf32 have the same range, as in coupling_stack_backward.py.
    DTYPE = tl.bfloat16 if COMPILED and mode != "tf32" else tl.float32
    K = x.shape[1]
    sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "CHUNK": min(K, 128)}
    _product_kernel[(1,)](x, W, y, K, DTYPE=DTYPE, PARTS=N_PARTS[mode], **sizes)
    return y


def fp32(x: Tensor, W: Tensor) -> Tensor:
    """x W^T in fp32, term by term: the same bits on every machine."""
    total = x.new_zeros(ROWS, COLUMNS)
    for k in range(x.shape[1]):
        total = total + x[:, k, None] * W[None, :, k]
    return total


def error_of(y: Tensor, x: Tensor, W: Tensor) -> float:
    """The largest of each row's root mean square of |y_ij - (x W^T)_ij| / sum_k |x_ik W_jk|."""
    x, W = x.double(), W.double()
    relative = (y.double() - x @ W.mT) / (x.abs() @ W.abs().mT)
    return relative.square().mean(1).sqrt().max().item()


def gaussian(K: int) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, K, device=DEVICE), torch.randn(COLUMNS, K, device=DEVICE) / K**0.5


def heavy_tailed(K: int) -> tuple[Tensor, Tensor]:
    """Weights of Student's t with 1.5 degrees of freedom, which has no variance."""
    x, W = gaussian(K)
    return x, torch.distributions.StudentT(1.5).sample(W.shape).to(W) / K**0.5


def huge(K: int) -> tuple[Tensor, Tensor]:
    x, W = gaussian(K)
    return x * 1e20, W


def tiny(K: int) -> tuple[Tensor, Tensor]:
    x, W = gaussian(K)
    return x * 1e-20, W


def huge_rows_beside_tiny(K: int) -> tuple[Tensor, Tensor]:
    """Rows of x and of W from 1e-20 to 1e20, of which products stay in the range of fp32."""
    x, W = gaussian(K)
    scale = torch.logspace(-20, 20, ROWS, device=DEVICE)[:, None]
    return x * scale, W * scale.abs().clamp(1e-15, 1e15)


def huge_beside_tiny_in_a_row(K: int) -> tuple[Tensor, Tensor]:
    """Each row of x has values of 1e20 at features that no weight reads, and of 1e-20 elsewhere."""
    x, W = gaussian(K)
    x[:, ::2] *= 1e20
    x[:, 1::2] *= 1e-20
    W[:, ::2] = 0
    return x, W


def millions_beside_ones_in_a_row(K: int) -> tuple[Tensor, Tensor]:
    """Half of the features are a million times larger than the others, and their weights that much smaller."""
    x, W = gaussian(K)
    x[:, ::2] *= 1e6
    W[:, ::2] *= 1e-6
    return x, W


SCALABLE = (gaussian, heavy_tailed, huge, tiny, huge_rows_beside_tiny, millions_beside_ones_in_a_row)
MAKERS = (*SCALABLE, huge_beside_tiny_in_a_row)


@pytest.mark.parametrize("K", [32, 128, 512, 1024])
@pytest.mark.parametrize("make", MAKERS)
def test_three_parts_are_as_accurate_as_fp32(make: Callable[[int], tuple[Tensor, Tensor]], K: int) -> None:
    """To a factor of two, on each row."""
    x, W = make(K)
    own = error_of(fp32(x, W), x, W)
    assert 0 < error_of(product(x, W, "exact"), x, W) <= 2 * own


@pytest.mark.parametrize("K", [32, 128, 512, 1024])
@pytest.mark.parametrize("make", SCALABLE)
def test_two_scaled_parts_are_as_accurate_as_fp32(make: Callable[[int], tuple[Tensor, Tensor]], K: int) -> None:
    """To a factor of two, on each row; not where weights read only what is 2^-26 of a row's largest or smaller."""
    x, W = make(K)
    own = error_of(fp32(x, W), x, W)
    assert 0 < error_of(scaled_product(x, W), x, W) <= 2 * own


@pytest.mark.parametrize("K", [32, 1024])
def test_what_two_scaled_parts_lose_is_measured_by_the_largest_of_a_row(K: int) -> None:
    x, W = huge_beside_tiny_in_a_row(K)
    error = (scaled_product(x, W).double() - x.double() @ W.double().mT).abs()
    limit = 2.0**-48 * x.abs().amax(1).double()[:, None] * W.abs().double().sum(1)
    assert bool((error <= limit).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_two_scaled_parts_keep_what_is_not_finite(value: float) -> None:
    x, W = gaussian(32)
    x[3, 5] = value
    y = scaled_product(x, W)
    assert not y[3].isfinite().any()
    assert bool(y[:3].isfinite().all())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("mode", "unit"), [("high", 2.0**-17), ("tf32", 2.0**-11), ("fast", 2.0**-9)])
def test_other_modes_err_by_their_unit(
    mode: str, unit: float, make: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    for K in (32, 1024):
        x, W = make(K)
        assert error_of(product(x, W, mode), x, W) <= unit
