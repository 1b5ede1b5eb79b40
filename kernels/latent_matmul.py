"""Latent product with a bank of K operators, one of which each row selects: a grouped product.

z [B, n_in], A [K, n_out, n_in], index [B], y [B, n_out]. With k = index[b] and g = dL/dy:

    y_b = A_k z_b + alpha z_b + bias       dz_b = A_k^T g_b + alpha g_b
    dA_k = sum over b with index[b] = k of g_b z_b^T        dbias = sum_b g_b

dz is the same product with A transposed (a view) and no bias. Only the inputs are saved.

A call of at most ELEMENTS_ALONE elements of A over all rows, padded to whole tiles, runs row by row: a program
reads its row's operator and sums in fp32. Bytes: n_out n_in elements per row, from L2 where the bank fits. One
launch, where a sort is some ten.

Else rows are sorted by operator (stably, on the device, without the host) and cut into tiles. A program runs one
operator of a tile, at most B / ROWS + K in all. It gathers rows of z and reads A_k in place: A is never gathered to
[B, n_out, n_in]. Bytes: each A_k once per tile of its rows, z and the order once per column of tiles, and y. For dA
a program adds the rows of one operator and split in order, for one tile of A_k, and torch adds the splits: no
atomics, the same bits every time.

Products of tiles are in parts as in kernels/mlp.py, fp32 operands as the mode says, fp16 and bf16 as they are, with
fp32 sums. A row whose index is outside [0, K) gives NaN and adds to no dA.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, ceil_div, needs_int64, tile_for
from .row_products import Mode, dot

# The most elements of A to read row by row, over all rows and padded to ROW_TILE: 134 MB in fp32, 25 us at the
# rate of an H100's L2.
ELEMENTS_ALONE = 2**25
ROW_TILE = {"COLUMNS": 64, "INNER": 32, "num_warps": 4}  # 8 KB in flight; ten programs per multiprocessor

# (largest number of rows per operator, tile): ROWS of z by COLUMNS of y, INNER summed per step.
TILES: tuple[tuple[int, Tile], ...] = (
    (16, {"ROWS": 16, "COLUMNS": 64, "INNER": 32, "num_warps": 4}),  # bound by reading A: no wasted rows
    # The most rows without spills: for three parts at odd sizes sm_80 needs all 255 registers.
    (1 << 62, {"ROWS": 128, "COLUMNS": 64, "INNER": 32, "num_warps": 8}),
)
# Rows are counted as if there were so many operators: fewer rows per program where programs are few.
FEWEST_TILES = 64
# dA: n_out by n_in, INNER rows of the batch per step. With 4 warps Triton 3.6 spills in fp32 at odd sizes.
GRADIENT_TILE = {"ROWS": 64, "COLUMNS": 64, "INNER": 32, "num_warps": 8}
ROWS_A_SPLIT = 512  # the fewest rows of an operator per split, on average
PROGRAMS = 512  # the most with splits: some four per multiprocessor of an H100, and at most 8 MB of sums to add
# In one part the matrix units may truncate each step of a sum: after RUN steps it is added to the total in fp32.
# (Triton turns total + dot(x, w, 0) into dot(x, w, total): a sum of its own needs a loop of its own.)
RUN = tl.constexpr(8)
SHORT_KEYS = 2**15 - 1  # operators that int16 can number, with one past them: a sort takes a quarter of its passes


@triton.jit(do_not_specialize=["n_operators"])
def _row_kernel(
    z_ptr, a_ptr, bias_ptr, y_ptr, index_ptr, n_operators, n_tiles, n_out, n_in, alpha,
    stride_zb, stride_zn, stride_ak, stride_am, stride_an, stride_yb, stride_bias,
    ADD_Z: tl.constexpr, BIAS: tl.constexpr, INT64: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """COLUMNS of y for one row; grid (B column tiles)."""
    row = tl.program_id(0) // n_tiles
    b = row.to(tl.int64)
    m = (tl.program_id(0) - row * n_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    if INT64:
        m, inner = m.to(tl.int64), inner.to(tl.int64)
    operator = tl.load(index_ptr + b)
    known = (operator >= 0) & (operator < n_operators)
    wanted = m < n_out
    z_ptr += b * stride_zb
    a_ptr += tl.where(known, operator, 0) * stride_ak
    products = tl.zeros((COLUMNS, INNER), tl.float32)
    for first in range(0, n_in, INNER):
        n = first + inner
        z = tl.load(z_ptr + n * stride_zn, mask=n < n_in, other=0.0)
        at = m[:, None] * stride_am + n[None, :] * stride_an
        a = tl.load(a_ptr + at, mask=wanted[:, None] & (n < n_in)[None, :], other=0.0)
        products += a.to(tl.float32) * z.to(tl.float32)[None, :]
    y = tl.where(known, tl.sum(products, 1), float("nan"))
    if ADD_Z:
        y += alpha * tl.load(z_ptr + m * stride_zn, mask=wanted, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + m * stride_bias, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y_ptr + b * stride_yb + m, y.to(y_ptr.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["n_rows", "n_operators"])
def _bank_kernel(
    z_ptr, a_ptr, bias_ptr, y_ptr, order_ptr, key_ptr, start_ptr, n_rows, n_operators, n_out, n_in, alpha,
    stride_zb, stride_zn, stride_ak, stride_am, stride_an, stride_yb, stride_bias,
    ADD_Z: tl.constexpr, BIAS: tl.constexpr, INT64: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One operator's rows of a tile by COLUMNS of y; grid (row tiles + K + 1, column tiles).

    The first programs run the operator that a tile begins with, the others one that begins inside a tile, as far as
    that tile. Operator K stands for the rows past the bank.
    """
    tile = tl.program_id(0).to(tl.int64)
    n_tiles = tl.cdiv(n_rows, ROWS)
    if tile < n_tiles:
        operator = tl.load(key_ptr + tile * ROWS).to(tl.int64)
    else:
        operator = tile - n_tiles
        begin = tl.load(start_ptr + operator)
        if (begin % ROWS == 0) | (begin == tl.load(start_ptr + operator + 1)):
            return
        tile = begin // ROWS
    position = tile * ROWS + tl.arange(0, ROWS)
    inside = position < n_rows
    mine = inside & (tl.load(key_ptr + position, mask=inside, other=0) == operator)
    b = tl.load(order_ptr + position, mask=mine, other=0)[:, None]
    mine = mine[:, None]
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    if INT64:
        m, inner = m.to(tl.int64), inner.to(tl.int64)
    wanted = (m < n_out)[None, :]
    known = (operator >= 0) & (operator < n_operators)
    a_ptr += tl.where(known, operator, 0) * stride_ak
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, n_in, INNER):
        n = first + inner
        z = tl.load(z_ptr + b * stride_zb + n[None, :] * stride_zn, mask=mine & (n < n_in)[None, :], other=0.0)
        at = n[:, None] * stride_an + m[None, :] * stride_am
        a = tl.load(a_ptr + at, mask=(n < n_in)[:, None] & wanted, other=0.0)
        total = dot(z, a, total, PARTS, TYPE)
    # Read again: held in registers through the loop, the numbers spill on sm_80.
    b = tl.load(order_ptr + position, mask=inside, other=0)[:, None]
    if ADD_Z:
        z = tl.load(z_ptr + b * stride_zb + m[None, :] * stride_zn, mask=mine & wanted, other=0.0)
        total += alpha * z.to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + m * stride_bias, mask=m < n_out, other=0.0).to(tl.float32)[None, :]
    total = tl.where(known, total, float("nan"))
    tl.store(y_ptr + b * stride_yb + m[None, :], total.to(y_ptr.dtype.element_ty), mask=mine & wanted)


@triton.jit(do_not_specialize=["n_splits"])
def _bank_gradient_kernel(
    z_ptr, grad_ptr, da_ptr, order_ptr, start_ptr, n_out, n_in, n_splits,
    stride_zb, stride_zn, stride_gb, stride_gn,
    INT64: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dA[k, split, ROWS of n_out, COLUMNS of n_in], contiguous; grid (K splits, row tiles, column tiles)."""
    k = tl.program_id(0).to(tl.int64) // n_splits
    split = tl.program_id(0) - k * n_splits
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if INT64:
        m, n = m.to(tl.int64), n.to(tl.int64)
    begin, end = tl.load(start_ptr + k), tl.load(start_ptr + k + 1)
    share = tl.cdiv(end - begin, n_splits)
    begin += split * share
    end = tl.minimum(begin + share, end)
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
            if PARTS == 1:
                run = dot(grad, z, run, PARTS, TYPE)
            else:  # each step is summed from zero by itself
                total = dot(grad, z, total, PARTS, TYPE)
        if PARTS == 1:
            total += run
    at = tl.program_id(0).to(tl.int64) * n_out * n_in + m[:, None] * n_in + n[None, :]
    wanted = (m < n_out)[:, None] & (n < n_in)[None, :]
    tl.store(da_ptr + at, total.to(da_ptr.dtype.element_ty), mask=wanted)


class _Rows:
    """The rows of a call, sorted by operator when that is first needed."""

    def __init__(self, index: Tensor, n_operators: int) -> None:
        _check_index(index, n_operators)
        self.index, self.n_operators = index, n_operators

    @functools.cached_property
    def by_operator(self) -> tuple[Tensor, Tensor]:
        """(operators in order, -1 or K outside the bank; their rows)."""
        key = self.index.clamp(-1, self.n_operators)
        return key.to(torch.int16 if self.n_operators < SHORT_KEYS else torch.int64).sort(stable=True)

    @functools.cached_property
    def start(self) -> Tensor:
        """[K + 2]: where the rows of operator 0 to K + 1 begin in this order."""
        key, _ = self.by_operator
        return torch.searchsorted(key, torch.arange(self.n_operators + 2, dtype=key.dtype, device=key.device))


def _check_index(index: Tensor, n_operators: int) -> None:
    """Raise ValueError for an index outside the bank; on a CPU only, since the host does not read a GPU's index."""
    if index.is_cuda or index.numel() == 0:
        return
    low, high = map(int, index.aminmax())
    if low < 0 or high >= n_operators:
        raise ValueError(f"index must be in [0, {n_operators}), the range of A's operators; got {low} to {high}")


def _product(z: Tensor, A: Tensor, rows: _Rows, bias: Tensor | None, alpha: float, mode: Mode) -> Tensor:
    """y [B, n_out], contiguous."""
    (batch, n_in), (n_operators, n_out) = z.shape, A.shape[:2]
    y = z.new_empty((batch, n_out))
    if n_operators == 0:
        return y.fill_(float("nan"))
    tensors = (z, A, z if bias is None else bias, y)
    sizes = (n_out, n_in, alpha, *z.stride(), *A.stride(), y.stride(0), 1 if bias is None else bias.stride(0))
    options = {"ADD_Z": alpha != 0.0, "BIAS": bias is not None, "INT64": needs_int64(z[0], A[0])}
    n_tiles = ceil_div(n_out, ROW_TILE["COLUMNS"])
    padded = n_tiles * ROW_TILE["COLUMNS"] * ceil_div(n_in, ROW_TILE["INNER"]) * ROW_TILE["INNER"]
    if batch * padded <= ELEMENTS_ALONE:
        index = rows.index.contiguous()
        _row_kernel[(batch * n_tiles,)](*tensors, index, n_operators, n_tiles, *sizes, **options, **ROW_TILE)
        return y
    key, order = rows.by_operator
    tile = tile_for(ceil_div(batch, max(n_operators, FEWEST_TILES)), TILES)
    _bank_kernel[(ceil_div(batch, tile["ROWS"]) + n_operators + 1, ceil_div(n_out, tile["COLUMNS"]))](
        *tensors, order, key, rows.start, batch, n_operators, *sizes, **options, **mode.constexprs, **tile
    )
    return y


def launch_latent_matmul(
    z: Tensor, A: Tensor, index: Tensor, bias: Tensor | None, alpha: float, precision: str, part_dtype: torch.dtype,
    gradient_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [B, n_out]; gradient_dtype is for the backward."""
    if z.shape[0] == 0 or A.shape[1] == 0:
        return z.new_empty((z.shape[0], A.shape[1]))
    return _product(z, A, _Rows(index, A.shape[0]), bias, alpha, Mode.of(z.dtype, precision, part_dtype))


def launch_latent_matmul_backward(
    z: Tensor, A: Tensor, index: Tensor, grad: Tensor | None, alpha: float, precision: str, part_dtype: torch.dtype,
    gradient_dtype: torch.dtype, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dz, dA, None for the index, dbias), contiguous; None where not needed. A gradient that is None is zero.

    The parts of fp32 operands are gradient_dtype: in fp16, as part_dtype may be, small gradients would become zero.
    """
    grad = z.new_zeros(()).expand(z.shape[0], A.shape[1]) if grad is None else grad
    dbias = grad.sum(0) if needs[3] else None
    if z.numel() == 0 or grad.numel() == 0 or A.shape[0] == 0:
        return z.new_zeros(z.shape) if needs[0] else None, A.new_zeros(A.shape) if needs[1] else None, None, dbias
    rows, mode = _Rows(index, A.shape[0]), Mode.of(z.dtype, precision, gradient_dtype)
    dz = _product(grad, A.mT, rows, None, alpha, mode) if needs[0] else None
    return dz, _gradient(z, A, rows, grad, mode) if needs[1] else None, None, dbias


def _n_splits(batch: int, n_operators: int, n_out: int, n_in: int) -> int:
    """The number of runs of rows in which dA is summed, as ROWS_A_SPLIT and PROGRAMS say."""
    tiles = ceil_div(n_out, GRADIENT_TILE["ROWS"]) * ceil_div(n_in, GRADIENT_TILE["COLUMNS"])
    return max(min(batch // (n_operators * ROWS_A_SPLIT), PROGRAMS // (n_operators * tiles)), 1)


def _gradient(z: Tensor, A: Tensor, rows: _Rows, grad: Tensor, mode: Mode) -> Tensor:
    (n_operators, n_out, n_in), tile = A.shape, GRADIENT_TILE
    splits = _n_splits(z.shape[0], *A.shape)
    dA = A.new_empty((n_operators, splits, n_out, n_in), dtype=A.dtype if splits == 1 else torch.float32)
    _bank_gradient_kernel[(n_operators * splits, ceil_div(n_out, tile["ROWS"]), ceil_div(n_in, tile["COLUMNS"]))](
        z, grad, dA, rows.by_operator[1], rows.start, n_out, n_in, splits, *z.stride(), *grad.stride(),
        INT64=needs_int64(z[0], grad[0], dA[0, 0]), **mode.constexprs, **tile,
    )  # fmt: skip
    return dA[:, 0] if splits == 1 else dA.sum(1).to(A.dtype)
