"""Gradients of the coupling stack, computed for one run of rows after another.

The steps of a stack, maps z' = M z + c and couplings, are first recomputed in order and then differentiated, last
to first. For each run of rows

    S   every step's input, from x rather than by inverting y, which would add rounding errors: by the forward's
        kernel, one layer at a time; a dense map is one product
    B1  for a coupling with input z = [k | m] and g = dL/dz' (h_0 = k, p_i = h_{i-1} W_i^T + b_i):
        h_i = act(p_i) and act'(p_i) are stored; in the last product's epilogue (shift, raw) = p_n,
        (dm, dshift, dlog_s) as in kernels/math.py, d_n = dshift_j, dlog_s_j log_s'(raw_j) alternating;
        dm overwrites g's moved half
    B2  d_i = (d_{i+1} W_{i+1}) act'(p_i) overwrites act'(p_i), down to d_1; d_1 W_1 is added to g's kept half
    W   dW_i = d_i^T h_{i-1}, db_i = sum_b d_i; for a map dM = g^T z, dc = sum_b g, and g <- g M

B1 and B2 are one launch per linear layer, in which a program computes a tile of rows and columns
(kernels/row_products.py), so that no size spills; W needs the values between linear layers in memory anyway.
Activations are exact in every mode. z and g are [R, 2 P] fp32, contiguous, padded with zeros that stay zeros.

Scratch memory for R rows: every step's input [R, 2 P] fp32; for one layer at a time h_i [R, H], fp32 or in "fast"
its 16-bit dtype, act'_i [R, H] and d_n [R, 2 P] fp32, so that db sums unrounded numbers. They take
R (8 P (steps + 3) + (n - 1) H (4 + w)) bytes, w = 2 in "fast" and 4 otherwise, and are written once and read at
most twice. SCRATCH_BYTES limits R, so that they do not grow with B; partial sums of dW_i are extra. In "fast"
gradients as operands are bf16 even where x is fp16, because fp16 has no numbers below 6e-8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coupling_stack import launch_coupling_stack
from .launch import ceil_div
from .math import couple, couple_backward, log_scale, log_scale_derivative
from .mlp import EXACT, activate, activation_derivative
from .row_products import ADD, MULTIPLY, Mode, launch_linear, launch_outer, n_splits, rows_product, tile_for
from .stack_spec import DENSE, N_PARTS, NO_MAPS, StackSpec, map_parts, spec_of

# The scratch memory of one step, 1.8 KB per row in "fast" at D = 64, H = 128, n = 3, fits in an L2 of 40 MB.
ROWS_AT_A_TIME = 16384
# Most scratch memory of a run: the inputs of a deep stack's steps, 256 B per row each at D = 64, shorten runs.
SCRATCH_BYTES = 2**27
_FEWEST_ROWS = 1024


@dataclass(frozen=True)
class StackPass:
    """The weights of the op, their spec, and whether its kernels run on a GPU."""

    weights: Tensor
    operands: Tensor
    spec: StackSpec
    on_gpu: bool

    def matrices(self, row: int) -> list[Tensor]:
        """The conditioner's matrices, [out, in]; in modes of one part rounded, as in the forward's products."""
        spec, shapes = self.spec, self.spec.matrix_shapes
        held = self.operands[0, row] if N_PARTS[spec.precision] == 1 else self.weights[row, : spec.matrix_size]
        return [m.view(shape) for m, shape in zip(held.split([a * b for a, b in shapes]), shapes, strict=True)]

    @property
    def part_dtype(self) -> torch.dtype:
        """bf16, for its range; fp32, which means tf32, under Triton's interpreter, which has no bf16 arithmetic."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def forward_mode(self) -> Mode:
        parts = N_PARTS[self.spec.precision]
        return Mode(parts, self.operands.dtype if parts == 1 else self.part_dtype)

    @property
    def gradient_mode(self) -> Mode:
        precision = self.spec.precision
        return Mode(N_PARTS[precision], torch.float32 if precision == "tf32" else self.part_dtype)

    @property
    def map_mode(self) -> Mode:
        return Mode(map_parts(self.spec.precision), self.part_dtype)

    @property
    def hidden_dtype(self) -> torch.dtype:
        return self.operands.dtype if self.spec.precision == "fast" else torch.float32

    def rows_at_a_time(self) -> int:
        """The rows of a run, for which SCRATCH_BYTES suffice; see the top of this file."""
        spec, steps = self.spec, len(self.spec.steps(self.weights))
        hidden = (spec.n_linear - 1) * spec.hidden * (4 + self.hidden_dtype.itemsize)
        bytes_per_row = 8 * spec.half * (steps + 3) + hidden
        return min(ROWS_AT_A_TIME, max(_FEWEST_ROWS, SCRATCH_BYTES // bytes_per_row))


class Scratch:
    """Memory for one layer's h_i, act'_i (then d_i) and d_n, and for partial sums of a row of weight gradients."""

    def __init__(self, z: Tensor, stack: StackPass) -> None:
        rows, (*hidden, n_out) = z.shape[0], stack.spec.widths[1:]
        self.h = [z.new_empty(rows, n, dtype=stack.hidden_dtype) for n in hidden]
        self.slopes = [z.new_empty(rows, n) for n in hidden]
        self.d = z.new_empty(rows, n_out)
        self.partials = z.new_empty(n_splits(rows), stack.spec.row_size)


@triton.jit(do_not_specialize=["n_rows"])
def _hidden_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    slope_ptr,
    n_rows,
    n_inner,
    stride_x,
    stride_wk,
    stride_wn,
    stride_h,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """h = act(x W + b), and act' there."""
    p, r, n = rows_product(
        x_ptr, w_ptr, n_rows, n_inner, stride_x, stride_wk, stride_wn, ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE
    )
    p += tl.load(bias_ptr + n)[None, :]
    at = r[:, None] * stride_h + n[None, :]
    inside = (r < n_rows)[:, None]
    tl.store(h_ptr + at, activate(p, ACTIVATION, EXACT).to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(slope_ptr + at, activation_derivative(p, ACTIVATION), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _coupling_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    moved_ptr,
    grad_ptr,
    grad_log_det_ptr,
    d_ptr,
    n_rows,
    n_inner,
    n_moved,
    stride_x,
    stride_wk,
    stride_wn,
    stride_moved,
    stride_grad,
    stride_log_det,
    stride_d,
    bound,
    floor,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    LOG_DET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """(shift, raw) = x W + b, the coupling and its gradient: grad <- d moved, and d (shift, raw)."""
    FEATURES: tl.constexpr = COLUMNS // 2
    out, r, n = rows_product(
        x_ptr, w_ptr, n_rows, n_inner, stride_x, stride_wk, stride_wn, ROWS, COLUMNS, DEPTH, STAGES, PARTS, TYPE
    )
    out += tl.load(bias_ptr + n)[None, :]
    shift, raw = tl.split(tl.reshape(out, (ROWS, FEATURES, 2)))
    i = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = (r < n_rows)[:, None]
    grad_ptr += r[:, None] * stride_grad + i[None, :]
    value = tl.load(moved_ptr + r[:, None] * stride_moved + i[None, :], mask=inside, other=0.0)
    grad = tl.load(grad_ptr, mask=inside, other=0.0)
    log_s = log_scale(raw, bound, floor, KIND)
    out = couple(value, shift, log_s, SCALE_FIRST, INVERSE)
    grad_log_det = 0.0
    if LOG_DET:
        of_row = tl.load(grad_log_det_ptr + r * stride_log_det, mask=r < n_rows, other=0.0).to(tl.float32)
        grad_log_det = tl.where((i < n_moved)[None, :], of_row[:, None], 0.0)
    d_value, d_shift, d_log_s = couple_backward(out, shift, log_s, grad, grad_log_det, SCALE_FIRST, INVERSE)
    d = tl.interleave(d_shift, d_log_s * log_scale_derivative(raw, bound, floor, KIND))
    tl.store(grad_ptr, d_value, mask=inside)
    tl.store(d_ptr + r[:, None] * stride_d + n[None, :], d, mask=inside)


def _inputs(stack: StackPass, z: Tensor) -> list[Tensor]:
    """S: the input of each step, [R, 2 P]."""
    inputs, spec = [z], stack.spec
    of_padded = replace(spec, features=2 * spec.half, maps=NO_MAPS, head=False, log_det=False)
    for layer, row in spec.steps(stack.weights)[:-1]:
        if layer is None:
            z = _apply_map(stack, z, row)
        else:
            alone = replace(of_padded, moves_second=not spec.moves_first(layer))
            weights, operands = stack.weights[row : row + 1], stack.operands[:, row : row + 1]
            z, _ = launch_coupling_stack(z, weights, operands, stack.operands, *alone.constants)
        inputs.append(z)
    return inputs


def _apply_map(stack: StackPass, z: Tensor, row: int) -> Tensor:
    _, _, matrix, bias = stack.spec.unpack(stack.weights[row])
    if stack.spec.maps != DENSE:
        return torch.addcmul(bias, z, matrix)
    return launch_linear(z, matrix.mT, torch.empty_like(z), stack.map_mode, bias)


def _map_backward(
    stack: StackPass, z: Tensor, g: Tensor, row: int, dweights: Tensor | None, needs_before: bool, scratch: Scratch
) -> Tensor:
    """Gradient of the map's input (g itself if not needed); adds the gradient of the map to its row of dweights."""
    at = stack.spec.map_offset
    _, _, matrix, _ = stack.spec.unpack(stack.weights[row])
    dense = stack.spec.maps == DENSE
    if dweights is not None and dense:
        launch_outer(g, z, scratch.partials, at, at + matrix.numel(), stack.map_mode)
        dweights[row, at:] += scratch.partials[:, at:].sum(0)
    elif dweights is not None:
        dweights[row, at:] += torch.cat(((g * z).sum(0), g.sum(0)))
    if not needs_before:
        return g
    return launch_linear(g, matrix, torch.empty_like(g), stack.map_mode) if dense else g * matrix


def _recompute(
    stack: StackPass, z: Tensor, g: Tensor, grad_log_det: Tensor | None, layer: int, row: int, scratch: Scratch
) -> None:
    """B1: writes the conditioner's h_i and act'_i, d_n, and dm over g's moved half."""
    spec = stack.spec
    (kept, moved), (_, grad) = spec.halves(z, layer), spec.halves(g, layer)
    _, biases, _, _ = spec.unpack(stack.weights[row])
    *hidden, last = stack.matrices(row)
    x, mode = kept, stack.forward_mode.constexprs
    for w, bias, h, slope in zip(hidden, biases, scratch.h, scratch.slopes, strict=False):
        tile = tile_for(w.shape[1], w.shape[0])
        _hidden_kernel[(ceil_div(z.shape[0], tile["ROWS"]), w.shape[0] // tile["COLUMNS"])](
            x, w, bias, h, slope, z.shape[0], w.shape[1], x.stride(0), 1, w.stride(0), h.stride(0),
            ACTIVATION=spec.activation, **mode, **tile,
        )  # fmt: skip
        x = h
    tile, d = tile_for(last.shape[1], last.shape[0]), scratch.d
    gradients = grad if grad_log_det is None else grad_log_det
    _coupling_kernel[(ceil_div(z.shape[0], tile["ROWS"]), last.shape[0] // tile["COLUMNS"])](
        x, last, biases[-1], moved, grad, gradients, d, z.shape[0], last.shape[1],
        spec.moved_size(layer), x.stride(0), 1, last.stride(0), moved.stride(0),
        grad.stride(0), gradients.stride(0), d.stride(0), spec.bound, spec.floor, KIND=spec.kind,
        SCALE_FIRST=spec.scale_first, INVERSE=spec.inverse, LOG_DET=grad_log_det is not None, **mode, **tile,
    )  # fmt: skip


def _coupling_backward(
    stack: StackPass, z: Tensor, g: Tensor, layer: int, row: int, dweights: Tensor | None, needs_kept: bool,
    scratch: Scratch,
) -> None:  # fmt: skip
    """B2 and W, after B1: completes g's kept half, and adds to the conditioner's row of dweights."""
    mode, d = stack.gradient_mode, scratch.d
    kept, g_kept = stack.spec.halves(z, layer)[0], stack.spec.halves(g, layer)[0]
    inputs, matrices = [kept, *scratch.h], stack.matrices(row)
    w_at, b_at = stack.spec.matrix_size, stack.spec.map_offset  # where the next matrix and bias begin
    for i in reversed(range(len(matrices))):
        w_at, b_at = w_at - matrices[i].numel(), b_at - len(matrices[i])
        if dweights is not None:
            launch_outer(d, inputs[i], scratch.partials, w_at, b_at, mode)
        if i:
            d = launch_linear(d, matrices[i], scratch.slopes[i - 1], mode, combine=MULTIPLY)
        elif needs_kept:
            launch_linear(d, matrices[i], g_kept, mode, combine=ADD)
    if dweights is not None:
        at = slice(0, stack.spec.map_offset)
        dweights[row, at] += scratch.partials[:, at].sum(0)


def _run_of_rows(
    stack: StackPass, z: Tensor, g: Tensor, grad_log_det: Tensor | None, dweights: Tensor | None, needs_x: bool
) -> Tensor:
    """dL/dz [R, 2 P] of one run; overwrites g. Unless ``needs_x``, the work for dL/dz alone is omitted."""
    scratch = Scratch(z, stack)
    inputs = _inputs(stack, z)
    for i, (layer, row) in reversed(list(enumerate(stack.spec.steps(stack.weights)))):
        if layer is None:
            g = _map_backward(stack, inputs[i], g, row, dweights, needs_x or i > 0, scratch)
        else:
            _recompute(stack, inputs[i], g, grad_log_det, layer, row, scratch)
            _coupling_backward(stack, inputs[i], g, layer, row, dweights, needs_x or i > 0, scratch)
    return g


def launch_coupling_stack_backward(
    x: Tensor, weights: Tensor, operands: Tensor, _: Tensor, grad: Tensor | None, grad_log_det: Tensor | None,
    *constants: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dweights, None, None), None where not needed; operands are rounded copies, without gradients."""
    spec, (needs_x, needs_weights, _, _) = spec_of(*constants[:-1]), constants[-1]
    stack = StackPass(weights, operands, spec, x.is_cuda)
    dx, dweights = x.new_empty(x.shape), torch.zeros_like(weights) if needs_weights else None
    step = stack.rows_at_a_time()
    for start in range(0, x.shape[0], step):
        run = slice(start, start + step)
        z = spec.pad(x[run].to(weights.dtype))
        g = torch.zeros_like(z) if grad is None else spec.pad(grad[run].to(weights.dtype))
        log_det = None if grad_log_det is None else grad_log_det[run]
        dx[run] = spec.unpad(_run_of_rows(stack, z, g, log_det, dweights, needs_x))
    return dx if needs_x else None, dweights, None, None
