"""Shared @triton.jit arithmetic, in fp32: scale maps, and the affine coupling and its gradient.

exp2(x log2(e)) is one instruction, but errs by |x| roundings; ``exp`` reduces its argument first and errs by one.
Functions take a FORM: EXACT, the default, and EXACT_PTX are accurate; FAST and PTX are for modes whose products
err by more, "tf32" and "fast". There exp is exp2(x log2(e)) and flushes results below 2^-126 to zero; an
exponential and its inverse then cancel to within 2 |x| + 4 roundings. EXACT_PTX and PTX divide by NVIDIA's
approximate reciprocal.
Clamps are comparisons, which unlike tl.minimum and tl.maximum leave NaN unchanged, as torch's clamp does.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Forms of a formula: accurate, or as "tf32" and "fast" allow; in Triton's operations or with NVIDIA's instructions.
EXACT = tl.constexpr(0)
EXACT_PTX = tl.constexpr(1)
FAST = tl.constexpr(2)
PTX = tl.constexpr(3)

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # ln 2 in 12 bits: its product with n is exact
LN2_LOW = tl.constexpr(-2.12194440e-4)
TWO_OVER_PI = tl.constexpr(0.6366197723675814)
SIGMOID_SHIFT = tl.constexpr(2.0)

# The ids of linfast.scale_maps; tests check that they agree.
CLAMP = tl.constexpr(1)
SMOOTH = tl.constexpr(2)
TANH = tl.constexpr(3)
ARCTAN = tl.constexpr(4)
SIGMOID = tl.constexpr(5)
SOFTPLUS = tl.constexpr(6)


@triton.jit
def exp(x, FORM: tl.constexpr = EXACT):
    """e^x; accurate: 2^n e^r, x = n ln 2 + r, 0 <= r < ln 2 (Cody and Waite), about one rounding for any x."""
    if FORM <= EXACT_PTX:
        n = tl.floor(x * LOG2E)
        n = tl.where(n < -150.0, -150.0, tl.where(n > 127.0, 127.0, n))
        r = (x - n * LN2_HIGH) - n * LN2_LOW
        result = tl.exp2(r * LOG2E) * tl.exp2(n)
    elif FORM == PTX:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2E], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.exp2(x * LOG2E)
    return result


@triton.jit
def divide(x, y, FORM: tl.constexpr = EXACT):
    """x / y to two roundings; NVIDIA's reciprocal is 0 where |y| exceeds 2^126."""
    if FORM % 2 == EXACT_PTX:  # the forms with NVIDIA's instructions are odd
        result = x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = x / y
    return result


@triton.jit
def log1p_exp_minus(x, FORM: tl.constexpr = EXACT):
    """log(1 + exp(-x)) for x >= 0, exact where exp(-x) is below 1's resolution."""
    u = exp(-x, FORM)
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * divide(u, tl.where(w == 1.0, 1.0, w - 1.0), FORM))


@triton.jit
def softplus(x, FORM: tl.constexpr = EXACT):
    return tl.where(x > 0.0, x, 0.0) + log1p_exp_minus(tl.abs(x), FORM)


@triton.jit
def sigmoid(x, FORM: tl.constexpr = EXACT):
    return divide(1.0, 1.0 + exp(-x, FORM), FORM)


@triton.jit
def tanh(x, FORM: tl.constexpr = EXACT):
    """Cephes' single-precision tanh: a polynomial below 0.625, where the quotient would cancel."""
    a = tl.abs(x)
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = (p - 3.33332819422e-1) * z * x + x
    # The roundings of exp2 count e^-2a times.
    far = 1.0 - divide(2.0, tl.exp2(a * (2.0 * LOG2E)) + 1.0, FORM)
    return tl.where(a < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def atan(x, FORM: tl.constexpr = EXACT):
    """Cephes' single-precision arctangent: reduced to [-tan(pi/8), tan(pi/8)], then a polynomial."""
    a = tl.abs(x)
    high = a > 2.414213562373095
    middle = (a > 0.4142135623730950) & (a <= 2.414213562373095)
    above, below = tl.where(high, -1.0, a - 1.0), tl.where(high, a, a + 1.0)
    reduced = tl.where(high | middle, divide(above, below, FORM), a)
    offset = tl.where(high, 1.5707963267948966, tl.where(middle, 0.7853981633974483, 0.0))
    z = reduced * reduced
    p = ((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1
    result = offset + (p * z * reduced + reduced)
    return tl.where(x < 0.0, -result, result)


@triton.jit
def log_scale(raw, bound, floor, KIND: tl.constexpr, FORM: tl.constexpr = EXACT):
    """log s(raw); see linfast.scale_maps for each kind's formula."""
    if KIND == CLAMP:
        result = tl.where(raw > bound, bound, tl.where(raw < -bound, -bound, raw))
    elif KIND == SMOOTH:
        result = divide(raw, 1.0 + divide(tl.abs(raw), bound, FORM), FORM)
    elif KIND == TANH:
        result = bound * tanh(raw, FORM)
    elif KIND == ARCTAN:
        result = bound * TWO_OVER_PI * atan(raw, FORM)
    elif KIND == SIGMOID:
        shifted = raw + SIGMOID_SHIFT
        result = tl.where(floor == 0.0, -softplus(-shifted, FORM), tl.log(sigmoid(shifted, FORM) + floor))
    elif KIND == SOFTPLUS:
        value = softplus(raw, FORM) + floor
        result = tl.log(tl.where(value > bound, bound, value))
    else:
        result = raw
    return result


@triton.jit
def log_scale_derivative(raw, bound, floor, KIND: tl.constexpr):
    """d log s / d raw."""
    if KIND == CLAMP:
        result = tl.where((raw > bound) | (raw < -bound), 0.0, 1.0)
    elif KIND == SMOOTH:
        root = 1.0 + tl.abs(raw) / bound
        result = 1.0 / (root * root)
    elif KIND == TANH:
        t = tanh(raw)
        result = bound * (1.0 - t * t)
    elif KIND == ARCTAN:
        result = bound * TWO_OVER_PI / (1.0 + raw * raw)
    elif KIND == SIGMOID:
        s = sigmoid(raw + SIGMOID_SHIFT)
        result = tl.where(floor == 0.0, sigmoid(-raw - SIGMOID_SHIFT), s * (1.0 - s) / (s + floor))
    elif KIND == SOFTPLUS:
        value = softplus(raw) + floor
        result = tl.where(value > bound, 0.0, sigmoid(raw) / value)
    else:
        result = tl.full(raw.shape, 1.0, tl.float32)
    return result


@triton.jit
def couple(value, shift, log_s, SCALE_FIRST: tl.constexpr, INVERSE: tl.constexpr, FORM: tl.constexpr = EXACT):
    """The coupling or its inverse on the moved half."""
    if INVERSE:
        if SCALE_FIRST:
            out = (value - shift) * exp(-log_s, FORM)
        else:
            out = value * exp(-log_s, FORM) - shift
    else:
        if SCALE_FIRST:
            out = value * exp(log_s, FORM) + shift
        else:
            out = (value + shift) * exp(log_s, FORM)
    return out


@triton.jit
def couple_backward(out, shift, log_s, grad, grad_log_det, SCALE_FIRST: tl.constexpr, INVERSE: tl.constexpr):
    """(d value, d shift, d log_s) from the output: the input is not needed."""
    if INVERSE:
        d_value = grad * exp(-log_s)
        if SCALE_FIRST:
            d_shift = -d_value
            d_log_s = -grad * out - grad_log_det
        else:
            d_shift = -grad
            d_log_s = -grad * (out + shift) - grad_log_det
    else:
        d_value = grad * exp(log_s)
        if SCALE_FIRST:
            d_shift = grad
            d_log_s = grad * (out - shift) + grad_log_det
        else:
            d_shift = d_value
            d_log_s = grad * out + grad_log_det
    return d_value, d_shift, d_log_s
