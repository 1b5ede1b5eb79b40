"""A whole residual network on a tile of rows, in one launch and without gradients.

    h = x W^T + term                                      term [B or 1, H]: the first bias, and a context's part
    r = act(N_2(act(N_1(h)) W_1^T + b_1)) W_2^T + b_2     N(u) = (u - m) (v + eps)^-1/2 w + s, or u
    h <- h + r,  or  h + r sigmoid(gate)                  gate [B or 1, H]; once per block
    out = h W_n^T + b_n

Shapes: x [B, n_in] with any strides, H = ``width`` <= HIDDEN, a power of two; out [B, n_out] with strides
(n_out, 1) or (1, B). ``terms`` [B or 1, H (1 + gates)] holds the term and all blocks' gates beside each other.
``packed`` holds one after another, row by row: [W | V] [H, n_given], of which the first n_in columns are W; for
each block W_1 [H, H], b_1, W_2, b_2, and with norms w, s, m, v of N_1 and of N_2; W_n [n_out, H], b_n. It is read
as it is: what lies past H is masked, and the products split their operands as they load them
(kernels/row_products.py).

A program holds ROWS rows of h in registers from the first layer to the last. A block takes CHUNK columns of its
hidden layer at a time, which the second product sums at once, so that no other [ROWS, H] values are kept; its
first operand is split once. Sizes are run-time numbers: one compilation serves any number of blocks and of outputs.

Operations per row: 2 (n_in H + 2 H^2 blocks + H n_out), 3 times as many products in two parts and 6 times in
three. Bytes of device memory: x, out and terms, once. Bytes of L2: the weights once per program, in fp32
4 (H n_in + 2 H^2 blocks + H n_out): for H = 128 and 2 blocks 262 KB and those of the first and last layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, ceil_div, needs_int64, power_of_two
from .masked_steps import activate
from .math import sigmoid
from .mlp import activation_form, dot_parts, split
from .row_products import FP16, FP32, Mode
from .stack_configs import multiprocessors

# CHUNK columns of a hidden layer or of the output per step, DEPTH features of x per step. Loads are not pipelined:
# copies ahead of 50 columns, one number each, spill. A warp's 16 rows of 128 columns in three parts fill 96
# registers of each thread: 32 rows spill. FEW is also for small batches, so that more multiprocessors work.
FEW = {"ROWS": 16, "CHUNK": 32, "DEPTH": 16, "num_warps": 4}
IN_PARTS = {"ROWS": 32, "CHUNK": 32, "DEPTH": 16, "num_warps": 8}  # two parts, or three of up to 64 columns
IN_ONE_PART = {"ROWS": 64, "CHUNK": 32, "DEPTH": 16, "num_warps": 8}


@triton.jit
def _parts(x, PARTS: tl.constexpr, TYPE: tl.constexpr):
    dtype: tl.constexpr = tl.float32 if TYPE == FP32 else tl.float16 if TYPE == FP16 else tl.bfloat16
    return split(x.to(tl.float32), dtype, PARTS)


@triton.jit
def _add_product(x0, x1, x2, w, total, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """total + x w, x in parts."""
    w0, w1, w2 = _parts(w, PARTS, TYPE)
    return dot_parts(x0, x1, x2, w0, w1, w2, total, PARTS)


@triton.jit
def _weight(ptr, out, n_out, into, n_into, stride):
    """W^T [into, out] of W [n_out, n_into], rows ``stride`` apart; 0 past its end."""
    inside = (out < n_out)[None, :] & (into < n_into)[:, None]
    return tl.load(ptr + out[None, :] * stride + into[:, None], mask=inside, other=0.0)


@triton.jit
def _columns(ptr, c, inside, otherwise):
    """Parameters of these columns, fp32."""
    return tl.load(ptr + c, mask=inside, other=otherwise).to(tl.float32)


@triton.jit
def _read(u, norm_ptr, c, width, eps, NORMS: tl.constexpr, ACTIVATION: tl.constexpr, FORM: tl.constexpr):
    """act(N(u)) of these columns, whose w, s, m and v are at norm_ptr; 0 past the last column."""
    inside = (c < width)[None, :]
    c = c[None, :]
    if NORMS:
        gain = tl.div_rn(1.0, tl.sqrt_rn(_columns(norm_ptr + 3 * width, c, inside, 1.0) + eps))
        u = (u - _columns(norm_ptr + 2 * width, c, inside, 0.0)) * gain
        u = u * _columns(norm_ptr, c, inside, 0.0) + _columns(norm_ptr + width, c, inside, 0.0)
    return tl.where(inside, activate(u, ACTIVATION, FORM), 0.0)


@triton.jit(do_not_specialize=["n_batch", "n_blocks"])
def _residual_stack_kernel(
    x_ptr, packed_ptr, terms_ptr, out_ptr, n_batch, n_blocks, n_in, n_given, width, n_out, eps, stride_xb,
    stride_xk, stride_tb, NORMS: tl.constexpr, GATES: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, FORM: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr, INT64: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * ROWS
    r = tl.arange(0, ROWS)[:, None]
    r = r.to(tl.int64) if INT64 else r
    n = tl.arange(0, HIDDEN)
    c = tl.arange(0, CHUNK)
    is_row = r < n_batch - start
    inside = is_row & (n < width)[None, :]
    x_ptr += start * stride_xb + r * stride_xb
    terms_ptr += start * stride_tb + r * stride_tb + n[None, :]
    h = tl.load(terms_ptr, mask=inside, other=0.0).to(tl.float32)
    for first in tl.range(0, n_in, DEPTH, num_stages=1):
        k = first + tl.arange(0, DEPTH)
        at = k.to(tl.int64) if INT64 else k
        x = tl.load(x_ptr + at[None, :] * stride_xk, mask=is_row & (k < n_in)[None, :], other=0.0)
        x0, x1, x2 = _parts(x, PARTS, TYPE)
        h = _add_product(x0, x1, x2, _weight(packed_ptr, n, width, k, n_in, n_given), h, PARTS, TYPE)
    packed_ptr += width * n_given
    for _ in tl.range(0, n_blocks, num_stages=1):
        second_ptr = packed_ptr + width * (width + 1)
        norm_ptr = second_ptr + width * (width + 1)
        a0, a1, a2 = _parts(_read(h, norm_ptr, n, width, eps, NORMS, ACTIVATION, FORM), PARTS, TYPE)
        total = tl.zeros((ROWS, HIDDEN), tl.float32)
        for first in tl.range(0, width, CHUNK, num_stages=1):
            m = first + c
            u = tl.zeros((ROWS, CHUNK), tl.float32)
            u = _add_product(a0, a1, a2, _weight(packed_ptr, m, width, n, width, width), u, PARTS, TYPE)
            u += _columns(packed_ptr + width * width, m[None, :], (m < width)[None, :], 0.0)
            u0, u1, u2 = _parts(_read(u, norm_ptr + 4 * width, m, width, eps, NORMS, ACTIVATION, FORM), PARTS, TYPE)
            total = _add_product(u0, u1, u2, _weight(second_ptr, n, width, m, width, width), total, PARTS, TYPE)
        total += _columns(second_ptr + width * width, n[None, :], (n < width)[None, :], 0.0)
        if GATES:
            terms_ptr += width
            total *= sigmoid(tl.load(terms_ptr, mask=inside, other=0.0).to(tl.float32), FORM)
        h += total
        packed_ptr = norm_ptr + 8 * width * NORMS
    h0, h1, h2 = _parts(h, PARTS, TYPE)
    for first in tl.range(0, n_out, CHUNK, num_stages=1):
        m = first + c
        is_out = (m < n_out)[None, :]
        out = tl.zeros((ROWS, CHUNK), tl.float32)
        out = _add_product(h0, h1, h2, _weight(packed_ptr, m, n_out, n, width, width), out, PARTS, TYPE)
        out += _columns(packed_ptr + n_out * width, m[None, :], is_out, 0.0)
        at = m.to(tl.int64) if INT64 else m
        if TRANSPOSED:
            to = out_ptr + start + r + at[None, :] * n_batch
        else:
            to = out_ptr + start * n_out + r * n_out + at[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=is_row & is_out)


def launch_residual_stack(
    x: Tensor, packed: Tensor, terms: Tensor, n_out: int, n_blocks: int, n_given: int, norms: bool, gates: bool,
    eps: float, activation: int, transposed: bool, precision: str, part_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """out [B, n_out], with strides (1, B) where it is transposed."""
    batch, n_in = x.shape
    out = x.new_empty((n_out, batch) if transposed else (batch, n_out))
    out = out.t() if transposed else out
    if out.numel() == 0:
        return out
    terms = terms if terms.stride(1) == 1 else terms.contiguous()
    width, mode = terms.shape[1] // (1 + n_blocks * gates), Mode.of(x.dtype, precision, part_dtype)
    hidden = max(power_of_two(width), 16)
    tile = tile_for(x, hidden, mode.parts)
    few = slice(tile["ROWS"])
    one_row = terms.shape[0] == 1 and (batch > 1 or not gates)  # a single sample shares the kernel of many
    _residual_stack_kernel[(ceil_div(batch, tile["ROWS"]),)](
        x, packed, terms, out, batch, n_blocks, n_in, n_given, width, n_out, eps, *x.stride(),
        0 if one_row else terms.stride(0), NORMS=norms, GATES=gates, TRANSPOSED=transposed,
        ACTIVATION=activation, FORM=activation_form(x, precision), INT64=needs_int64(x[few], out[few], terms[few]),
        HIDDEN=hidden, **mode.constexprs, **tile,
    )  # fmt: skip
    return out


def tile_for(x: Tensor, hidden: int, parts: int) -> Tile:
    """FEW also where it leaves no more than one program for each multiprocessor."""
    if x.shape[0] <= FEW["ROWS"] * multiprocessors(x):
        return FEW
    return IN_ONE_PART if parts == 1 else IN_PARTS if parts == 2 or hidden <= 64 else FEW
