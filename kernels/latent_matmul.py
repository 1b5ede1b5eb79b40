"""Latent product with a bank of K operators, one of which each row selects: a grouped product.

z [B, n_in], A [K, n_out, n_in], index [B], y [B, n_out]. With k = index[b] and g = dL/dy:

    y_b = A_k z_b + alpha z_b + bias       dz_b = A_k^T g_b + alpha g_b
    dA_k = sum over b with index[b] = k of g_b z_b^T        dbias = sum_b g_b

dz is the same product with A transposed (a view) and no bias. Only the inputs are saved.

The rows are sorted by operator (stably, on the device, without the host) and cut into tiles of one operator each.
The grid has the most tiles there can be, about B / rows + K. A program finds its tile in the running sum of tiles
per operator, gathers its rows of z and reads A_k in place: A is never gathered to [B, n_out, n_in]. For dA one
program per operator and tile of A_k adds the operator's rows in order: no atomics, the same bits every time. The
error of a chain of multiply-adds grows with its length: a new one begins after RUN steps of rows.

Bytes: z, y and the order once per column of tiles; each A_k once per tile of its rows, so about K n_out n_in + 2 B
n elements where the rows of an operator fit one tile. fp32 operands are not rounded (input_precision "ieee"); fp16
and bf16 run on the matrix units with fp32 sums. A row whose index is outside [0, K) gives NaN and adds to no dA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, ceil_div, needs_int64, tile_for

# (largest mean number of rows per operator, tile): ROWS of z by COLUMNS of y, INNER summed per step.
TILES: tuple[tuple[int, Tile], ...] = (
    (16, {"ROWS": 16, "COLUMNS": 64, "INNER": 64, "num_warps": 4}),  # bound by reading A: no wasted rows
    # wgmma's 64 rows. A thread has 16 sums; 32, with 4 warps, spill in fp32 at odd sizes (94 to 181 bytes).
    (1 << 62, {"ROWS": 64, "COLUMNS": 64, "INNER": 32, "num_warps": 8}),
)
# dA: n_out by n_in, INNER rows of the batch per step. With 4 warps Triton 3.6 spills in fp32 at odd sizes.
GRADIENT_TILE = {"ROWS": 64, "COLUMNS": 64, "INNER": 32, "num_warps": 8}
RUN = tl.constexpr(8)


@triton.jit(do_not_specialize=["n_operators"])
def _bank_kernel(
    z_ptr,
    a_ptr,
    bias_ptr,
    y_ptr,
    order_ptr,
    start_ptr,
    last_tile_ptr,
    operator_ptr,
    n_operators,
    n_out,
    n_in,
    alpha,
    stride_zb,
    stride_zn,
    stride_ak,
    stride_am,
    stride_an,
    stride_yb,
    stride_bias,
    ADD_Z: tl.constexpr,
    BIAS: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of one operator's rows by COLUMNS of y; grid (tiles, column tiles)."""
    operator = tl.load(operator_ptr + tl.program_id(0))
    if operator > n_operators:  # past the last tile
        return
    begin, end = tl.load(start_ptr + operator), tl.load(start_ptr + operator + 1)
    last_tile = tl.load(last_tile_ptr + operator)
    n_tiles = (end - begin + ROWS - 1) // ROWS
    position = begin + (tl.program_id(0) - (last_tile - n_tiles)) * ROWS + tl.arange(0, ROWS)
    inside = (position < end)[:, None]
    b = tl.load(order_ptr + position, mask=position < end, other=0)[:, None]
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    if INT64:
        m = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inner = inner.to(tl.int64)
    wanted = (m < n_out)[None, :]
    a_ptr += tl.minimum(operator, n_operators - 1) * stride_ak
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, n_in, INNER):
        n = first + inner
        z = tl.load(z_ptr + b * stride_zb + n[None, :] * stride_zn, mask=inside & (n < n_in)[None, :], other=0.0)
        at = n[:, None] * stride_an + m[None, :] * stride_am
        a = tl.load(a_ptr + at, mask=(n < n_in)[:, None] & wanted, other=0.0)
        total = tl.dot(z, a, total, input_precision="ieee")
    if ADD_Z:
        z = tl.load(z_ptr + b * stride_zb + m[None, :] * stride_zn, mask=inside & wanted, other=0.0)
        total += alpha * z.to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + m * stride_bias, mask=m < n_out, other=0.0).to(tl.float32)[None, :]
    total = tl.where(operator == n_operators, float("nan"), total)  # an index outside the bank
    tl.store(y_ptr + b * stride_yb + m[None, :], total.to(y_ptr.dtype.element_ty), mask=inside & wanted)


@triton.jit
def _bank_gradient_kernel(
    z_ptr,
    grad_ptr,
    da_ptr,
    order_ptr,
    start_ptr,
    n_out,
    n_in,
    stride_zb,
    stride_zn,
    stride_gb,
    stride_gn,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """dA[k, ROWS of n_out, COLUMNS of n_in], contiguous; grid (K, row tiles, column tiles)."""
    k = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if INT64:
        m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        n = n.to(tl.int64)
    begin, end = tl.load(start_ptr + k), tl.load(start_ptr + k + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    n_rows = (end - begin).to(tl.int32)
    for start in range(0, n_rows, RUN * INNER):
        run = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(start, tl.minimum(start + RUN * INNER, n_rows), INNER):
            position = begin + first + tl.arange(0, INNER)
            inside = position < end
            b = tl.load(order_ptr + position, mask=inside, other=0)
            at = b[None, :] * stride_gb + m[:, None] * stride_gn
            grad = tl.load(grad_ptr + at, mask=inside[None, :] & (m < n_out)[:, None], other=0.0)
            at = b[:, None] * stride_zb + n[None, :] * stride_zn
            z = tl.load(z_ptr + at, mask=inside[:, None] & (n < n_in)[None, :], other=0.0)
            run = tl.dot(grad, z, run, input_precision="ieee")
        total += run
    at = k * n_out * n_in + m[:, None] * n_in + n[None, :]
    wanted = (m < n_out)[:, None] & (n < n_in)[None, :]
    tl.store(da_ptr + at, total.to(da_ptr.dtype.element_ty), mask=wanted)


class _Rows:
    """The rows sorted by operator, on the device; those with an index outside the bank are last, as operator K.

    ``order`` [B] contains the row numbers, ``start`` [K + 2] where the rows of each operator begin in it.
    """

    def __init__(self, index: Tensor, n_operators: int) -> None:
        _check_index(index, n_operators)
        key = torch.where((index < 0) | (index >= n_operators), n_operators, index)
        key, self.order = key.sort(stable=True)
        self.start = torch.searchsorted(key, torch.arange(n_operators + 2, device=index.device))

    def tiles(self, rows: int) -> tuple[Tensor, Tensor]:
        """(number of tiles up to and including each operator's, operator of each tile or K + 1 past the last)."""
        batch, groups = self.order.shape[0], self.start.shape[0] - 1
        last = ((self.start.diff() + (rows - 1)) // rows).cumsum(0)
        tiles = torch.arange(batch // rows + min(groups, batch), device=last.device)
        return last, torch.searchsorted(last, tiles, right=True)


def _check_index(index: Tensor, n_operators: int) -> None:
    """Raise ValueError for an index outside the bank; on a CPU only, since the host does not read a GPU's index."""
    if index.is_cuda or index.numel() == 0:
        return
    low, high = map(int, index.aminmax())
    if low < 0 or high >= n_operators:
        raise ValueError(f"index must be in [0, {n_operators}), the range of A's operators; got {low} to {high}")


def _product(z: Tensor, A: Tensor, rows: _Rows, bias: Tensor | None, alpha: float) -> Tensor:
    """y [B, n_out], contiguous."""
    (batch, n_in), (n_operators, n_out) = z.shape, A.shape[:2]
    y = z.new_empty((batch, n_out))
    if n_operators == 0:
        return y.fill_(float("nan"))
    tile = tile_for(ceil_div(batch, max(n_operators, 1)), TILES)
    last_tile, operator = rows.tiles(tile["ROWS"])
    _bank_kernel[(operator.shape[0], ceil_div(n_out, tile["COLUMNS"]))](
        z, A, z if bias is None else bias, y, rows.order, rows.start, last_tile, operator,
        n_operators, n_out, n_in, alpha, *z.stride(), *A.stride(), y.stride(0),
        1 if bias is None else bias.stride(0),
        ADD_Z=alpha != 0.0, BIAS=bias is not None, INT64=needs_int64(z[0], A[0]), **tile,
    )  # fmt: skip
    return y


def launch_latent_matmul(z: Tensor, A: Tensor, index: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
    """y [B, n_out]."""
    if z.shape[0] == 0 or A.shape[1] == 0:
        return z.new_empty((z.shape[0], A.shape[1]))
    return _product(z, A, _Rows(index, A.shape[0]), bias, alpha)


def launch_latent_matmul_backward(
    z: Tensor, A: Tensor, index: Tensor, grad: Tensor | None, alpha: float, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """(dz, dA, None for the index, dbias), contiguous; None where not needed. A gradient that is None is zero."""
    grad = z.new_zeros(()).expand(z.shape[0], A.shape[1]) if grad is None else grad
    dbias = grad.sum(0) if needs[3] else None
    if z.numel() == 0 or grad.numel() == 0 or A.shape[0] == 0:
        return z.new_zeros(z.shape) if needs[0] else None, A.new_zeros(A.shape) if needs[1] else None, None, dbias
    rows = _Rows(index, A.shape[0])
    dz = _product(grad, A.mT, rows, None, alpha) if needs[0] else None
    return dz, _gradient(z, A, rows, grad) if needs[1] else None, None, dbias


def _gradient(z: Tensor, A: Tensor, rows: _Rows, grad: Tensor) -> Tensor:
    (n_operators, n_out, n_in), tile = A.shape, GRADIENT_TILE
    dA = A.new_empty(A.shape)
    _bank_gradient_kernel[(n_operators, ceil_div(n_out, tile["ROWS"]), ceil_div(n_in, tile["COLUMNS"]))](
        z, grad, dA, rows.order, rows.start, n_out, n_in, *z.stride(), *grad.stride(),
        INT64=needs_int64(z[0], grad[0], dA[0]), **tile,
    )  # fmt: skip
    return dA
