"""The steps of the coupling stack's backward on a tile of rows, as @triton.jit helpers.

A step is a few phases: products of tiles out of a program's scratch memory (kernels/row_products.py) that write to
it. Each phase ends with a barrier, because its threads read what others of the program wrote in the phase before.
There are three loops with products of a conditioner, x W^T, d W and d^T x, each over all its layers: every further
one would take registers for its addresses in shared memory. For the same reason loops are not left by what does
not change in them (``disable_licm``): hoisted out of all loops, the addresses of all phases would be held at once.

z [steps + 1, run, 2 P] holds the inputs of all steps of a run of rows, and past the last one dL/dy. In the backward
the gradient at a step's input takes the place of that input. Layer i = 0 .. n - 1 of a conditioner has its input at
h_i, h_0 = k [ROWS, P] and then [ROWS, H]; its gradient d_i and the slopes act'(p_i) are after those of layer i - 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import EXACT, couple, couple_backward, log_scale, log_scale_derivative
from .mlp import activate, activation_derivative
from .row_products import add_outer, add_to, tile_product


@triton.jit
def _tile_of_x(
    x_ptr, start, column, n_batch, n_first, n_second, half, stride_b, stride_d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(pointers, rows that exist, columns that exist) of a tile of x [B, D] as [first | 0 | second | 0].

    The pointers of rows past B are those of the last row.
    """
    row = start + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    i = tl.where(j < half, j, j - half)
    known = i < tl.where(j < half, n_first, n_second)
    feature = tl.where(j < half, i, n_first + i).to(tl.int64)
    at = x_ptr + (tl.minimum(row, n_batch - 1) * stride_b)[:, None] + (feature * stride_d)[None, :]
    return at, (row < n_batch)[:, None], known[None, :]


@triton.jit
def load_tile(
    x_ptr, grad_ptr, z_ptr, z_row, grad_row, start, n_batch, n_first, n_second, half, stride_xb, stride_xd,
    stride_gb, stride_gd, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of z <- x and dL/dy, padded with zeros. Rows past B repeat the last one, and their dL/dy is 0."""
    r = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    for column in tl.range(0, 2 * half, COLUMNS, num_stages=1, disable_licm=True):
        x_at, inside, known = _tile_of_x(
            x_ptr, start, column, n_batch, n_first, n_second, half, stride_xb, stride_xd, ROWS, COLUMNS
        )
        x = tl.load(x_at, mask=known, other=0.0).to(tl.float32)
        tl.store(z_ptr + (z_row + r)[:, None] * (2 * half) + (column + n)[None, :], x)
        grad = tl.zeros((ROWS, COLUMNS), tl.float32)
        if grad_ptr is not None:
            grad_at, inside, known = _tile_of_x(
                grad_ptr, start, column, n_batch, n_first, n_second, half, stride_gb, stride_gd, ROWS, COLUMNS
            )
            grad = tl.load(grad_at, mask=inside & known, other=0.0).to(tl.float32)
        tl.store(z_ptr + (grad_row + r)[:, None] * (2 * half) + (column + n)[None, :], grad)


@triton.jit
def store_tile(
    dx_ptr, z_ptr, z_row, start, n_batch, n_first, n_second, half, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dx [B, D], contiguous, <- rows of z."""
    r = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    for column in tl.range(0, 2 * half, COLUMNS, num_stages=1, disable_licm=True):
        dx = tl.load(z_ptr + (z_row + r)[:, None] * (2 * half) + (column + n)[None, :])
        at, inside, known = _tile_of_x(
            dx_ptr, start, column, n_batch, n_first, n_second, half, n_first + n_second, 1, ROWS, COLUMNS
        )
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=inside & known)


@triton.jit
def coupling_forward(
    z_ptr, z_row, next_row, w_ptr, bias_ptr, h_ptr, slope_ptr, d_ptr, bias_gradient_ptr, grad_log_det_ptr,
    stride_log_det, start, n_batch, half, hidden, moved, n_moved, is_backward, again, bound, floor,
    N_LINEAR: tl.constexpr, ACTIVATION: tl.constexpr, KIND: tl.constexpr, SCALE_FIRST: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEPT: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The coupling: rows of z at next_row from those at z_row; in the backward h, act', d_n, and dm for m."""
    FEATURES: tl.constexpr = COLUMNS // 2
    width = 2 * half
    kept = half - moved
    r = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, KEPT)
    for column in tl.range(0, half, KEPT, num_stages=1, disable_licm=True):
        x = tl.load(z_ptr + kept + (z_row + r)[:, None] * width + (column + k)[None, :])
        tl.store(h_ptr + r[:, None] * half + (column + k)[None, :], x.to(h_ptr.dtype.element_ty))
    tl.debug_barrier()
    for i in tl.range(0, N_LINEAR, num_stages=1, disable_licm=True):
        is_last = i == N_LINEAR - 1
        n_in = tl.where(i == 0, half, hidden)
        input_at = tl.where(i == 0, 0, half + (i - 1) * hidden)
        for column in tl.range(0, tl.where(is_last, width, hidden), COLUMNS, num_stages=1, disable_licm=True):
            p = tile_product(
                h_ptr + ROWS * input_at, n_in, 1, w_ptr + hidden * input_at + column * n_in, 1, n_in, n_in, COLUMNS,
                ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE, False,
            )  # fmt: skip
            p += tl.load(bias_ptr + i * hidden + column + n)[None, :]
            if is_last:
                shift, raw = tl.split(tl.reshape(p, (ROWS, FEATURES, 2)))
                f = column // 2 + tl.arange(0, FEATURES)
                here = z_ptr + (z_row + r)[:, None] * width + f[None, :]
                there = z_ptr + (next_row + r)[:, None] * width + f[None, :]
                value = tl.load(here + moved)
                log_s = log_scale(raw, bound, floor, KIND)
                value = couple(value, shift, log_s, SCALE_FIRST, INVERSE)
                if is_backward:
                    grad = tl.load(there + moved)
                    of_log_det = 0.0
                    if grad_log_det_ptr is not None:
                        at = grad_log_det_ptr + (start + r) * stride_log_det
                        of_row = tl.load(at, mask=start + r < n_batch, other=0.0).to(tl.float32)
                        of_log_det = tl.where((f < n_moved)[None, :], of_row[:, None], 0.0)
                    d_value, d_shift, d_log_s = couple_backward(
                        value, shift, log_s, grad, of_log_det, SCALE_FIRST, INVERSE
                    )
                    tl.store(here + moved, d_value)
                    d = tl.interleave(d_shift, d_log_s * log_scale_derivative(raw, bound, floor, KIND))
                    d_at = d_ptr + ROWS * i * hidden + r[:, None] * width + (column + n)[None, :]
                    tl.store(d_at, d.to(d_ptr.dtype.element_ty))
                    if bias_gradient_ptr is not None:
                        add_to(bias_gradient_ptr + i * hidden + column + n, tl.sum(d, 0), again)
                else:
                    tl.store(there + moved, value)
                    tl.store(there + kept, tl.load(here + kept))
            else:
                at = (ROWS * i + r)[:, None] * hidden + (column + n)[None, :]
                tl.store(h_ptr + ROWS * half + at, activate(p, ACTIVATION, EXACT).to(h_ptr.dtype.element_ty))
                if is_backward:
                    tl.store(slope_ptr + at, activation_derivative(p, ACTIVATION).to(slope_ptr.dtype.element_ty))
        tl.debug_barrier()


@triton.jit
def coupling_backward(
    z_ptr, z_row, next_row, w_ptr, h_ptr, slope_ptr, d_ptr, gradient_ptr, bias_gradient_ptr, half, hidden, moved,
    needs_before, again,
    N_LINEAR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEPT: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """d_i, the gradients of the conditioner's weights, and dk for k."""
    MASKED: tl.constexpr = KEPT < COLUMNS
    width = 2 * half
    kept = half - moved
    r = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    for j in tl.range(0, N_LINEAR, num_stages=1, disable_licm=True):
        i = N_LINEAR - 1 - j
        n_in = tl.where(i == 0, half, hidden)
        n_out = tl.where(j == 0, width, hidden)
        input_at = tl.where(i == 0, 0, half + (i - 1) * hidden)
        d_at = d_ptr + ROWS * i * hidden
        if (i > 0) | needs_before:
            for column in tl.range(0, n_in, COLUMNS, num_stages=1, disable_licm=True):
                d = tile_product(
                    d_at, n_out, 1, w_ptr + hidden * input_at + column, n_in, 1, n_out, n_in,
                    ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE, MASKED,
                )  # fmt: skip
                if i > 0:
                    at = (ROWS * (i - 1) + r)[:, None] * hidden + (column + n)[None, :]
                    d *= tl.load(slope_ptr + at).to(tl.float32)
                    tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty))
                    if bias_gradient_ptr is not None:
                        add_to(bias_gradient_ptr + (i - 1) * hidden + column + n, tl.sum(d, 0), again)
                else:
                    here = z_ptr + kept + (z_row + r)[:, None] * width + (column + n)[None, :]
                    there = z_ptr + kept + (next_row + r)[:, None] * width + (column + n)[None, :]
                    mask = (n < half)[None, :]
                    tl.store(here, d + tl.load(there, mask=mask, other=0.0), mask=mask)
        if gradient_ptr is not None:
            add_outer(
                d_at, n_out, h_ptr + ROWS * input_at, n_in, gradient_ptr + hidden * input_at, again,
                ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE, MASKED,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def map_step(
    z_ptr, z_row, next_row, map_ptr, gradient_ptr, half, is_backward, needs_before, again,
    DENSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The map: rows of z at next_row from those at z_row. In the backward dM, dc, and dz for z."""
    width = 2 * half
    r = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    bias_at = width * width if DENSE else width
    for column in tl.range(0, width, COLUMNS, num_stages=1, disable_licm=True):
        here = z_ptr + (z_row + r)[:, None] * width + (column + n)[None, :]
        there = z_ptr + (next_row + r)[:, None] * width + (column + n)[None, :]
        if is_backward:
            grad = tl.load(there)
            if gradient_ptr is not None:
                add_to(gradient_ptr + bias_at + column + n, tl.sum(grad, 0), again)
                if not DENSE:
                    add_to(gradient_ptr + column + n, tl.sum(grad * tl.load(here), 0), again)
            if not DENSE:
                tl.store(here, grad * tl.load(map_ptr + column + n)[None, :])
        else:
            c = tl.load(map_ptr + bias_at + column + n)[None, :]
            if DENSE:
                value = tile_product(
                    z_ptr + z_row * width, width, 1, map_ptr + column * width, 1, width, width, width,
                    ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE, False,
                )  # fmt: skip
            else:
                value = tl.load(here) * tl.load(map_ptr + column + n)[None, :]
            tl.store(there, value + c)
    if DENSE and is_backward:
        if gradient_ptr is not None:
            add_outer(
                z_ptr + next_row * width, width, z_ptr + z_row * width, width, gradient_ptr, again,
                ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE, False,
            )  # fmt: skip
        tl.debug_barrier()
        if needs_before:
            for column in tl.range(0, width, COLUMNS, num_stages=1, disable_licm=True):
                grad = tile_product(
                    z_ptr + next_row * width, width, 1, map_ptr + column, width, 1, width, width,
                    ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE, False,
                )  # fmt: skip
                tl.store(z_ptr + (z_row + r)[:, None] * width + (column + n)[None, :], grad)
    tl.debug_barrier()
