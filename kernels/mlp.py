"""A conditioner MLP on a tile of rows, as @triton.jit helpers: products by precision mode, activations.

A product x W^T splits its operands into ``PARTS`` parts of W's element type, each the rounding of the remainder
that the parts before it leave, and sums the significant products of parts in fp32:

    PARTS  element        products                                  mode                 relative error
    1      fp32           tf32                                      tf32                 2^-11
    1      bf16           x0 w0                                     fast                 2^-9
    2      bf16           x0 w0, x0 w1, x1 w0                       high                 2^-17
    2      fp16, scaled   the same                                  exact, of stacks     2^-22
    3      bf16           those, x1 w1, x0 w2, x2 w0                exact, of other ops  2^-24

Scaled operands (Ootomo and Yokota, arXiv 2203.03341) are parts of s x, where s is a power of two for each row of x,
and for each row of W, that brings the largest value of the row to [2^14, 2^15); x1 holds the remainder times 2^11.
With them x is represented to 2^-23 where |x| is within 2^-28 of the row's largest, elsewhere to 2^-50 of that: a
sum is as accurate as one in fp32, unless the weights of the row's largest values are 2^-26 of others or less. Every
finite row has a scale. Two parts of fp16 are always scaled; W's scales are packed with its biases
(kernels/stack_spec.py).

W is split beforehand (kernels/stack_pack.py), so that its parts go from memory to the matrix units unchanged. The
units drop the low 13 bits of an fp32 operand, an error of up to twice that of rounding and always towards zero.
tf32 operands are therefore rounded to nearest first, W when it is packed. The units may also truncate each partial
sum. Products of parts are therefore summed from zero, smallest first, and that sum is added to the total in fp32.

Activations have four forms (kernels/math.py). EXACT and EXACT_PTX have the defining formulas, EXACT_PTX with
NVIDIA's reciprocal; FAST and PTX have formulas in tanh, which PTX computes by tanh.approx (relative error 2^-11,
one special-function instruction) and FAST by exp2 (two). FAST and PTX err by less than tf32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import EXACT_PTX, LOG2E, PTX, divide, tanh
from .stack_spec import LOW

# Indices in linfast.ops.activations.ACTIVATION_NAMES; a test checks that they agree.
RELU = tl.constexpr(0)
SILU = tl.constexpr(1)
TANH = tl.constexpr(2)
GELU = tl.constexpr(3)

_LOW = tl.constexpr(LOW)
_THREADS = tl.constexpr(256)  # of the largest program of a coupling stack: 8 warps, or 4 of 64 threads

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _tanh_fast(x, FORM: tl.constexpr):
    if FORM == PTX:
        result = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    return result


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FORM: tl.constexpr):
    """The activation of x, fp32.

    SiLU's exp2(-x log2 e) loses |x| roundings, but of a term that is small where |x| is
    large. Fast GELU is x (1 + tanh u(x)) / 2, u an odd polynomial near atanh(erf(x / sqrt 2)):
    within 2.6e-5 of the exact one, where the common two-term u is within 4.8e-4.
    """
    if ACTIVATION == RELU:
        result = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == SILU:
        if FORM <= EXACT_PTX:
            result = divide(x, 1.0 + tl.exp2(x * -LOG2E), FORM)
        else:
            half = 0.5 * x
            result = half + half * _tanh_fast(half, FORM)
    elif ACTIVATION == TANH:
        if FORM <= EXACT_PTX:
            result = tanh(x, FORM)
        else:
            result = _tanh_fast(x, FORM)
    else:
        if FORM <= EXACT_PTX:
            result = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
        else:
            z = tl.minimum(x * x, 36.0)  # past |x| = 6 tanh u is 1
            u = x * (0.7975078840993945 + z * (0.037005646112491755 - z * 0.00035151679542278315))
            half = 0.5 * x
            result = half + half * _tanh_fast(u, FORM)
    return result


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    """d activation / dx, fp32: of the exact activation, whichever form ran."""
    if ACTIVATION == RELU:
        result = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == SILU:
        s = 1.0 / (1.0 + tl.exp2(x * -LOG2E))
        result = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == TANH:
        t = tanh(x)
        result = 1.0 - t * t
    else:
        result = 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * SQRT_HALF_OVER_PI * tl.exp2(x * x * (-0.5 * LOG2E))
    return result


@triton.jit
def _round_tf32(x):
    """The nearest number of ten bits after the point, ties away from zero; NaN and infinities as they are."""
    nearest = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)


@triton.jit
def _nearest(x, dtype: tl.constexpr):
    """x in this type; in tf32 for fp32."""
    if dtype == tl.float32:
        result = _round_tf32(x.to(tl.float32))
    else:
        result = x.to(dtype)
    return result


@triton.jit
def split(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """x in PARTS parts of this type, tf32 for fp32; parts that are not asked for repeat the first."""
    x0 = _nearest(x, dtype)
    x1 = x0
    x2 = x0
    if PARTS > 1:
        rest = x - x0.to(tl.float32)
        x1 = _nearest(rest, dtype)
        if PARTS > 2:
            x2 = _nearest(rest - x1.to(tl.float32), dtype)
    return x0, x1, x2


@triton.jit
def scale_of(largest):
    """(s, 2^-14 / s), s a power of two: s largest lies in [2^14, 2^15), or below where largest < 2^-98."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 29)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, ((exponent - 28) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled_parts(x):
    """(x0, x1) in fp16: x = x0 + x1 / LOW, for x that is scaled to fp16's range."""
    x0 = x.to(tl.float16)
    return x0, ((x - x0.to(tl.float32)) * _LOW).to(tl.float16)


@triton.jit
def operand(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """(x0, x1, x2, unscale): x [R, K] in parts; if they are scaled, 2^-14 / scale of each row [R, 1], otherwise 1.

    W's packed scales have 2^14 in return, so that sums overflow before them only where fp32's own nearly do.
    """
    if PARTS == 2 and dtype == tl.float16:
        scale, unscale = scale_of(tl.max(tl.abs(x), 1).to(tl.float32))
        x0, x1 = scaled_parts(x.to(tl.float32) * scale[:, None])
        x2 = x0
        unscale = unscale[:, None]
    else:
        x0, x1, x2 = split(x, dtype, PARTS)
        unscale = 1.0
    return x0, x1, x2, unscale


@triton.jit
def dot_parts(x0, x1, x2, w0, w1, w2, total, PARTS: tl.constexpr):
    """total + x w, both in parts."""
    if PARTS == 1:
        total = tl.dot(x0, w0, total, input_precision="tf32")
    else:
        if PARTS == 3:
            out = tl.dot(x0, w2, input_precision="tf32")
            out = tl.dot(x2, w0, out, input_precision="tf32")
            out = tl.dot(x1, w1, out, input_precision="tf32")
            out = tl.dot(x0, w1, out, input_precision="tf32")
        else:
            out = tl.dot(x0, w1, input_precision="tf32")
        out = tl.dot(x1, w0, out, input_precision="tf32")
        total += tl.dot(x0, w0, out, input_precision="tf32")
    return total


@triton.jit
def dot_scaled(x0, x1, unscale, w0, w1, total):
    """total + unscale (x w), both in two scaled parts; w's scale is the caller's."""
    low = tl.dot(x1, w0, tl.dot(x0, w1)) * (1.0 / _LOW)
    return total + tl.dot(x0, w0, low) * unscale


@triton.jit
def product(x0, x1, x2, unscale, w, part_stride, total, PARTS: tl.constexpr):
    """total + x W^T, fp32: x [R, K] as ``operand`` gives it, w pointers [K, N] to W's first part."""
    w0 = tl.load(w)
    w1 = w0
    w2 = w0
    if PARTS > 1:
        w1 = tl.load(w + part_stride)
    if PARTS > 2:
        w2 = tl.load(w + 2 * part_stride)
    if PARTS == 2 and x0.dtype == tl.float16:
        total = dot_scaled(x0, x1, unscale, w0, w1, total)
    else:
        total = dot_parts(x0, x1, x2, w0, w1, w2, total, PARTS)
    return total


@triton.jit
def load_vector(ptr, N: tl.constexpr, AHEAD: tl.constexpr):
    """[N] contiguous numbers, one per column of a tile; AHEAD: in a pipelined loop over layers.

    Triton lets every thread load all its own columns where there are fewer numbers than threads. In a pipelined
    loop each number then becomes a copy to shared memory in version 3.6: 40 per thread and layer for the biases of
    D = 64, H = 128. There, repeats make the numbers as many as the threads, so that one copy serves. Operands in
    two parts leave no shared memory for repeats.
    """
    values = tl.load(ptr + tl.arange(0, max(N, _THREADS) if AHEAD else N) % N)
    for _ in tl.static_range(4):  # N is at least 16
        if values.shape[0] > N:
            values, _ = tl.split(tl.trans(tl.reshape(values, (2, values.shape[0] // 2))))
    return values


@triton.jit
def _linear(
    x,
    w_ptr,
    part_stride,
    b_ptr,
    scale_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """x W^T + b: W [N, K]."""
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    SCALED: tl.constexpr = PARTS == 2 and w_ptr.dtype.element_ty == tl.float16
    x0, x1, x2, unscale = operand(x, w_ptr.dtype.element_ty, PARTS)
    total = _begun(b_ptr, ROWS, N, SCALED, AHEAD)
    total = product(x0, x1, x2, unscale, w_ptr + n[None, :] * K + k[:, None], part_stride, total, PARTS)
    return _ended(total, b_ptr, scale_ptr, N, SCALED, AHEAD)


@triton.jit
def _begun(b_ptr, ROWS: tl.constexpr, N: tl.constexpr, SCALED: tl.constexpr, AHEAD: tl.constexpr):
    """What a sum begins with: the bias; 0 where the sum is yet to be multiplied by W's scales."""
    if SCALED:
        total = tl.zeros((ROWS, N), tl.float32)
    else:
        total = tl.broadcast_to(load_vector(b_ptr, N, AHEAD)[None, :], (ROWS, N))
    return total


@triton.jit
def _ended(total, b_ptr, scale_ptr, N: tl.constexpr, SCALED: tl.constexpr, AHEAD: tl.constexpr):
    """The sum as ``_begun`` began it, with W's scales and the bias."""
    if SCALED:
        total = total * load_vector(scale_ptr, N, AHEAD)[None, :] + load_vector(b_ptr, N, AHEAD)[None, :]
    return total


@triton.jit
def _linear_pair(
    x,
    w_ptr,
    part_stride,
    b_ptr,
    scale_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
):
    """activation(x V^T + a) W^T + b, CHUNK columns of what lies between at a time: V [HIDDEN, K], W [N, HIDDEN]."""
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    c = tl.arange(0, CHUNK)
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    SCALED: tl.constexpr = PARTS == 2 and dtype == tl.float16
    x0, x1, x2, x_unscale = operand(x, dtype, PARTS)
    AHEAD: tl.constexpr = STAGES == 1 and PARTS == 1
    total = _begun(b_ptr + HIDDEN, ROWS, N, SCALED, AHEAD)
    second_ptr = w_ptr + HIDDEN * K
    for first in tl.range(0, HIDDEN, CHUNK, num_stages=STAGES):
        at = first + c
        h = _begun(b_ptr + first, ROWS, CHUNK, SCALED, AHEAD)
        h = product(x0, x1, x2, x_unscale, w_ptr + at[None, :] * K + k[:, None], part_stride, h, PARTS)
        h = _ended(h, b_ptr + first, scale_ptr + first, CHUNK, SCALED, AHEAD)
        h = activate(h, ACTIVATION, FORM)
        h0, h1, h2, unscale = operand(h, dtype, PARTS)
        w = second_ptr + n[None, :] * HIDDEN + at[:, None]
        total = product(h0, h1, h2, unscale, w, part_stride, total, PARTS)
    return _ended(total, b_ptr + HIDDEN, scale_ptr + HIDDEN, N, SCALED, AHEAD)


@triton.jit
def conditioner(
    x,
    w_ptr,
    part_stride,
    b_ptr,
    scale_ptr,
    N_LINEAR: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
):
    """(shift, raw) [ROWS, HALF] of x [ROWS, HALF]: an MLP of 1 to 4 linear layers.

    Matrices in turn at w_ptr, biases in turn at b_ptr; the last layer's rows are (shift_i, raw_i)
    in turn, so that its one product splits into both. An odd first layer stands alone, the
    others go in pairs: a layer's whole output is held as operands only between pairs.
    """
    OUT: tl.constexpr = 2 * HALF
    if N_LINEAR == 1:
        out = _linear(x, w_ptr, part_stride, b_ptr, scale_ptr, ROWS, HALF, OUT, PARTS, STAGES == 1 and PARTS == 1)
    elif N_LINEAR == 2:
        out = _linear_pair(
            x, w_ptr, part_stride, b_ptr, scale_ptr, ROWS, HALF, HIDDEN, OUT, CHUNK, STAGES, PARTS, ACTIVATION, FORM
        )
    else:
        h = _linear_pair(
            x,
            w_ptr,
            part_stride,
            b_ptr,
            scale_ptr,
            ROWS,
            HALF,
            HIDDEN,
            HIDDEN,
            CHUNK,
            STAGES,
            PARTS,
            ACTIVATION,
            FORM,
        )
        h = activate(h, ACTIVATION, FORM)
        w_ptr += HIDDEN * HALF + HIDDEN * HIDDEN
        b_ptr += 2 * HIDDEN
        scale_ptr += 2 * HIDDEN
        if N_LINEAR == 3:
            out = _linear(
                h, w_ptr, part_stride, b_ptr, scale_ptr, ROWS, HIDDEN, OUT, PARTS, STAGES == 1 and PARTS == 1
            )
        else:
            out = _linear_pair(
                h,
                w_ptr,
                part_stride,
                b_ptr,
                scale_ptr,
                ROWS,
                HIDDEN,
                HIDDEN,
                OUT,
                CHUNK,
                STAGES,
                PARTS,
                ACTIVATION,
                FORM,
            )
    return tl.split(tl.reshape(out, (ROWS, HALF, 2)))


def activation_form(x: Tensor, precision: str) -> int:
    """EXACT in "exact" and "high", FAST in "tf32" and "fast"; on NVIDIA's GPUs EXACT_PTX and PTX."""
    nvidia = x.is_cuda and torch.version.hip is None
    return (0 if precision in ("exact", "high") else 2) + int(nvidia)
