"""Matrix products of tiles in memory, in the modes of kernels/mlp.py with fp32 sums.

Both operands are split into parts inside the kernel, because gradients cannot be packed beforehand. Gradients of a
loss that is divided by the batch size need bf16's range, not fp16's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .mlp import dot_parts, split
from .stack_spec import N_PARTS

# Ids of dtypes in kernels.
FP32 = tl.constexpr(0)
FP16 = tl.constexpr(1)
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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
def tile_product(
    x_ptr, stride_xr, stride_xk, w_ptr, stride_wk, stride_wn, n_inner, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, TYPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """x W, fp32 [ROWS, COLUMNS]: x [ROWS, n_inner] and W [n_inner, n_columns], n_inner a multiple of DEPTH.

    Unless MASKED, W has at least COLUMNS columns.
    """
    r = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, n_inner, DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + r[:, None] * stride_xr + (first + k)[None, :] * stride_xk)
        w_at = w_ptr + (first + k)[:, None] * stride_wk + n[None, :] * stride_wn
        if MASKED:
            w = tl.load(w_at, mask=(n < n_columns)[None, :], other=0.0)
        else:
            w = tl.load(w_at)
        total = dot(x, w, total, PARTS, TYPE)
    return total


@triton.jit
def add_to(at, value, again):
    """Add to what earlier tiles of rows left at these addresses, where there were any."""
    total = tl.load(at, mask=again, other=0.0) + value
    if len(value.shape) == 1:  # every warp loads a vector, and one stores it
        tl.debug_barrier()
    tl.store(at, total)


@triton.jit
def add_outer(
    d_ptr, n_out, x_ptr, n_in, gradient_ptr, again, N_ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add d^T x [n_out, n_in] of N_ROWS rows to a weight's gradient."""
    n = tl.arange(0, TILE)
    across = tl.cdiv(n_in, TILE)
    for tile in tl.range(0, (n_out // TILE) * across, num_stages=1, disable_licm=True):
        row = tile // across * TILE
        column = tile % across * TILE
        total = tile_product(
            d_ptr + row, 1, n_out, x_ptr + column, n_in, 1, N_ROWS, n_in,
            TILE, TILE, DEPTH, STAGES, PARTS, TYPE, MASKED,
        )  # fmt: skip
        at = gradient_ptr + (row + n)[:, None] * n_in + (column + n)[None, :]
        if MASKED:
            inside = (n < n_in)[None, :]
            tl.store(at, tl.load(at, mask=inside & again, other=0.0) + total, mask=inside)
        else:
            add_to(at, total, again)
