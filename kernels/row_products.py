"""Matrix products for gradients, with a tall matrix of rows, in the modes of kernels/mlp.py with fp32 sums.

    rows_product  x W        x [B, K], W [K, N] of any strides   per program ROWS rows by COLUMNS columns
    outer         d^T x      d [B, M], x [B, N]                 per program such a tile of [M, N], one split of B

Both split fp32 operands into parts inside the kernel, because gradients cannot be packed beforehand. Gradients of a
loss that is divided by the batch size need bf16's range, not fp16's. d^T x is a sum over B in equal runs (splits),
each in a separate buffer; the buffers are added in a fixed order: no atomics, the same bits every time. Each run
also sums d's columns, for the gradient of the bias.

Bytes: x N / COLUMNS times and W B / ROWS times, both from L2; d^T x reads d N / COLUMNS times and x M / ROWS times
and writes M N per split. A tile is 64 by 64 in steps of depth 32: each of 256 threads has 16 sums, three parts of
each operand and the next step's loads, for any K, N and mode. With 128 threads d^T x in bf16 spills on sm_100.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div
from .mlp import dot_parts, split
from .stack_spec import N_PARTS

# Ids of dtypes in kernels.
FP32 = tl.constexpr(0)
FP16 = tl.constexpr(1)
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# How a product changes the output: replaces it, is added to it, multiplies it.
SET, ADD, MULTIPLY = 0, 1, 2
_ADD = tl.constexpr(ADD)
_MULTIPLY = tl.constexpr(MULTIPLY)


# A program's tile, the depth of a step, and the pipeline stages of its loads.
TILE = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "STAGES": 2, "num_warps": 8}

# The least rows per split of d^T x, and the most splits. With the four tiles of [128, 128] 32 splits fill a GPU;
# their partial sums take 4 MB at D = 64, H = 128.
ROWS_A_SPLIT = 512
MAX_SPLITS = 32


@dataclass(frozen=True)
class Mode:
    """The number of parts of a product's operands, and their dtype, where torch.float32 means tf32."""

    parts: int
    dtype: torch.dtype

    @classmethod
    def of(cls, dtype: torch.dtype, precision: str, part_dtype: torch.dtype) -> Mode:
        """For operands of this dtype: 16-bit ones are one part as they are, fp32 ones are cut as the mode says."""
        if dtype != torch.float32:
            return cls(1, dtype)
        return cls(N_PARTS[precision], torch.float32 if precision == "tf32" else part_dtype)

    @property
    def constexprs(self) -> dict[str, int]:
        return {"PARTS": self.parts, "TYPE": TYPES[self.dtype]}


@triton.jit
def dot(x, w, total, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """total + x w in so many parts of this type, tf32 for fp32."""
    dtype: tl.constexpr = tl.float32 if TYPE == FP32 else tl.float16 if TYPE == FP16 else tl.bfloat16
    x0, x1, x2 = split(x, dtype, PARTS)
    w0, w1, w2 = split(w, dtype, PARTS)
    return dot_parts(x0, x1, x2, w0, w1, w2, total, PARTS)


@triton.jit
def rows_product(
    x_ptr,
    w_ptr,
    n_rows,
    n_inner,
    stride_x,
    stride_wk,
    stride_wn,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """(x W, rows, columns) of this program's tile; x's rows past n_rows are zeros."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, n_inner, DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + r[:, None] * stride_x + (first + k)[None, :], mask=(r < n_rows)[:, None], other=0.0)
        w = tl.load(w_ptr + (first + k)[:, None] * stride_wk + n[None, :] * stride_wn)
        total = dot(x, w, total, PARTS, TYPE)
    return total, r, n


@triton.jit(do_not_specialize=["n_rows"])
def _linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_inner,
    stride_x,
    stride_wk,
    stride_wn,
    stride_out,
    BIAS: tl.constexpr,
    COMBINE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):
    total, r, n = rows_product(
        x_ptr, w_ptr, n_rows, n_inner, stride_x, stride_wk, stride_wn, ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE
    )
    if BIAS:
        total += tl.load(bias_ptr + n)[None, :]
    at = out_ptr + r[:, None] * stride_out + n[None, :]
    inside = (r < n_rows)[:, None]
    if COMBINE == _ADD:
        total += tl.load(at, mask=inside, other=0.0)
    elif COMBINE == _MULTIPLY:
        total *= tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "rows_a_split"])
def _outer_kernel(
    d_ptr,
    x_ptr,
    partial_ptr,
    partial_bias_ptr,
    n_rows,
    rows_a_split,
    n_columns,
    stride_d,
    stride_x,
    stride_split,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(2) * rows_a_split
    k = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, rows_a_split, DEPTH, num_stages=STAGES):
        row = start + first + k
        inside = (row < n_rows)[:, None]
        d = tl.load(d_ptr + row[:, None] * stride_d + m[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + row[:, None] * stride_x + n[None, :], mask=inside, other=0.0)
        total = dot(tl.trans(d), x, total, PARTS, TYPE)
        sums += tl.sum(d, 0)
    partial_ptr += tl.program_id(2) * stride_split
    tl.store(partial_ptr + m[:, None] * n_columns + n[None, :], total)
    if tl.program_id(1) == 0:
        tl.store(partial_bias_ptr + tl.program_id(2) * stride_split + m, sums)


def tile_for(n_inner: int, n_columns: int) -> dict[str, int]:
    """TILE for x W with W [n_inner, n_columns], powers of two of at least 16."""
    return {**TILE, "COLUMNS": min(TILE["COLUMNS"], n_columns), "DEPTH": min(TILE["DEPTH"], n_inner)}


def launch_linear(
    x: Tensor, w: Tensor, out: Tensor, mode: Mode, bias: Tensor | None = None, combine: int = SET
) -> Tensor:
    """Write x w + bias to out, add it to out or multiply out by it, as ``combine`` says; return out.

    x [B, K] and out [B, N] are fp32 with column stride 1; w [K, N] has any strides.
    """
    tile = tile_for(*w.shape)
    _linear_kernel[(ceil_div(x.shape[0], tile["ROWS"]), w.shape[1] // tile["COLUMNS"])](
        x, w, out if bias is None else bias, out, x.shape[0], w.shape[0], x.stride(0), *w.stride(), out.stride(0),
        BIAS=bias is not None, COMBINE=combine, **mode.constexprs, **tile,
    )  # fmt: skip
    return out


def launch_outer(d: Tensor, x: Tensor, partials: Tensor, at: int, bias_at: int, mode: Mode) -> None:
    """For each run s of rows write d^T x to partials[s, at:] and d's column sums to partials[s, bias_at:]."""
    tile = tile_for(TILE["DEPTH"], x.shape[1]) | {"ROWS": min(TILE["ROWS"], d.shape[1])}
    rows_a_split = ceil_div(ceil_div(x.shape[0], partials.shape[0]), TILE["DEPTH"]) * TILE["DEPTH"]
    grid = d.shape[1] // tile["ROWS"], x.shape[1] // tile["COLUMNS"], partials.shape[0]
    _outer_kernel[grid](
        d, x, partials[:, at:], partials[:, bias_at:], x.shape[0], rows_a_split, x.shape[1], d.stride(0),
        x.stride(0), partials.stride(0), **mode.constexprs, **tile,
    )  # fmt: skip


def n_splits(n_rows: int) -> int:
    """The number of splits of d^T x over this many rows."""
    return min(MAX_SPLITS, ceil_div(n_rows, ROWS_A_SPLIT))
