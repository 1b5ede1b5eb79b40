"""Gradients of the coupling stack for all rows and layers in one launch, then a sum over the programs.

The steps of a stack, maps z' = M z + c and couplings, are first recomputed in order and then differentiated, last
to first. For a run of rows, a tile of it at a time

    S   every step's input, from x rather than by inverting y, which would add rounding errors
    B   for a coupling with input z = [k | m] and g = dL/dz' (h_0 = k, p_i = h_{i-1} W_i^T + b_i):
        h_i = act(p_i) and act'(p_i); in the last product's epilogue (shift, raw) = p_n, (dm, dshift, dlog_s) as in
        kernels/math.py, d_n = dshift_j, dlog_s_j log_s'(raw_j) alternating
        d_i = (d_{i+1} W_{i+1}) act'(p_i), down to d_1; dk = g's kept half + d_1 W_1
        dW_i += d_i^T h_{i-1}, db_i += sum_b d_i; for a map dM += g^T z, dc += sum_b g, and g <- g M

A program has its own scratch memory and its own sums of the weights' gradients: no atomics, the same bits every
time. It takes a run of tiles through one step after another, so that a step's weights and sums stay in L2 from one
tile to the next, and then its next run. Rows past B repeat the last one, with a gradient of 0. Activations are
exact in every mode. In "fast" gradients as operands are bf16 even where x is fp16, which has no numbers below 6e-8.

D = 64, H = 128, n = 3, depth 8, B = 2^20 on an H100; counted in the compiled code, not measured:

                                                                     fast            exact
    bytes of L2 per row and layer: S, h and act', d, dW              2.6 3.1 2.8 3.7  4.5 5.6 5.2 5.7 KB
    of all, at 5.5 TB/s                                              19 ms           32 ms
    device memory: inputs and gradients of steps 10.5, x, dx and
    dL/dy 0.8, sums of gradients 1.8 KB per row, at 3.35 TB/s        4 ms            4 ms
    products, 122,880 per row and layer with 9% in padding, bf16     2.6 ms          16 ms
    issue: instructions per warp, tile of 128 rows and layer         15,000: 8.5 ms  35,000: 20 ms
    prediction                                                       25 ms           42 ms

L2 is the limit: every h_i, act'_i and d_i passes through it, and in tiles of 64 columns twice or more. Few rows
wait for one phase after another: 23 products per layer, about 0.7 us each, 0.13 ms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_products import TYPES
from .stack_backward_grid import StackPass, grid_of
from .stack_backward_tiles import coupling_backward, coupling_forward, load_tile, map_step, store_tile
from .stack_configs import multiprocessors, target_of
from .stack_spec import spec_of


@triton.jit(do_not_specialize=["n_batch", "n_steps", "run"])
def _coupling_stack_backward_kernel(
    x_ptr, grad_ptr, grad_log_det_ptr, dx_ptr, weights_ptr, matrices_ptr, z_ptr, h_ptr, slope_ptr, d_ptr,
    partials_ptr, n_batch, run, n_first, n_second, n_steps, half, hidden, row_size, matrices_stride, matrix_size,
    map_offset, partials_stride, stride_xb, stride_xd, stride_gb, stride_gd, stride_log_det, bound, floor,
    N_LINEAR: tl.constexpr, ACTIVATION: tl.constexpr, KIND: tl.constexpr, SCALE_FIRST: tl.constexpr,
    MOVES_SECOND: tl.constexpr, INVERSE: tl.constexpr, MAPS: tl.constexpr, HEAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEPT: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr, D_TYPE: tl.constexpr,
    MAP_PARTS: tl.constexpr, MAP_TYPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    width = 2 * half
    z_ptr += program * ((n_steps + 1) * run * width)
    h_ptr += program * (ROWS * (half + (N_LINEAR - 1) * hidden))
    slope_ptr += program * (ROWS * (N_LINEAR - 1) * hidden)
    d_ptr += program * (ROWS * (width + (N_LINEAR - 1) * hidden))
    turns = tl.cdiv(tl.cdiv(n_batch, run) - tl.program_id(0), tl.num_programs(0))
    for turn in tl.range(0, turns, num_stages=1, disable_licm=True):
        start = (program + turn * tl.num_programs(0)) * run
        n_tiles = tl.cdiv(tl.minimum(n_batch - start, run), ROWS).to(tl.int32)
        for tile in tl.range(0, n_tiles, num_stages=1, disable_licm=True):
            first = start + tile * ROWS
            load_tile(
                x_ptr, grad_ptr, z_ptr, tile * ROWS, n_steps * run + tile * ROWS, first, n_batch, n_first, n_second,
                half, stride_xb, stride_xd, stride_gb, stride_gd, ROWS, COLUMNS,
            )  # fmt: skip
        tl.debug_barrier()
        for phase in tl.range(0, 2 * n_steps - 1, num_stages=1, disable_licm=True):
            is_backward = phase >= n_steps - 1
            step = tl.where(is_backward, 2 * n_steps - 2 - phase, phase)
            place = (n_steps - 1 - step if INVERSE else step) + HEAD
            row = place // 2 if MAPS > 0 else place
            layer = row - HEAD
            row_ptr = weights_ptr + row.to(tl.int64) * row_size
            w_ptr = matrices_ptr + row.to(tl.int64) * matrices_stride
            needs_before = is_backward
            if dx_ptr is None:
                needs_before = is_backward & (step > 0)
            if partials_ptr is None:
                gradient_ptr = None
                bias_gradient_ptr = None
                map_gradient_ptr = None
            else:
                gradient_ptr = partials_ptr + program * partials_stride + row.to(tl.int64) * row_size
                bias_gradient_ptr = gradient_ptr + matrix_size
                map_gradient_ptr = gradient_ptr + map_offset
            for tile in tl.range(0, n_tiles, num_stages=1, disable_licm=True):
                again = (turn > 0) | (tile > 0)
                first = start + tile * ROWS
                z_row = step * run + tile * ROWS
                next_row = z_row + run
                is_map = place < 0
                if MAPS > 0:
                    is_map = place % 2 == 1
                    if is_map:
                        map_step(
                            z_ptr, z_row, next_row, row_ptr + map_offset, map_gradient_ptr, half, is_backward,
                            needs_before, again, MAPS == 2, ROWS, COLUMNS, DEPTH, STAGES, MAP_PARTS, MAP_TYPE,
                        )  # fmt: skip
                if not is_map:
                    moves_first = (layer + MOVES_SECOND) % 2 == 0
                    moved = tl.where(moves_first, 0, half)
                    coupling_forward(
                        z_ptr, z_row, next_row, w_ptr, row_ptr + matrix_size, h_ptr, slope_ptr, d_ptr,
                        bias_gradient_ptr, grad_log_det_ptr, stride_log_det, first, n_batch, half, hidden, moved,
                        tl.where(moves_first, n_first, n_second), is_backward, again, bound, floor,
                        N_LINEAR, ACTIVATION, KIND, SCALE_FIRST, INVERSE,
                        ROWS, COLUMNS, KEPT, DEPTH, STAGES, PARTS, TYPE,
                    )  # fmt: skip
                    if is_backward:
                        coupling_backward(
                            z_ptr, z_row, next_row, w_ptr, h_ptr, slope_ptr, d_ptr, gradient_ptr, bias_gradient_ptr,
                            half, hidden, moved, needs_before, again,
                            N_LINEAR, ROWS, COLUMNS, KEPT, DEPTH, STAGES, PARTS, D_TYPE,
                        )  # fmt: skip
        if dx_ptr is not None:
            for tile in tl.range(0, n_tiles, num_stages=1, disable_licm=True):
                first = start + tile * ROWS
                store_tile(dx_ptr, z_ptr, tile * ROWS, first, n_batch, n_first, n_second, half, ROWS, COLUMNS)
        tl.debug_barrier()  # before the next run overwrites what other threads read


def launch_coupling_stack_backward(
    x: Tensor, weights: Tensor, operands: Tensor, _: Tensor, grad: Tensor | None, grad_log_det: Tensor | None,
    *constants: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dweights, None, None), None where not needed; operands are rounded copies, without gradients."""
    spec, (needs_x, needs_weights, _, _) = spec_of(*constants[:-1]), constants[-1]
    dx = x.new_empty(x.shape) if needs_x else None
    if x.shape[0] == 0:
        return dx, torch.zeros_like(weights) if needs_weights else None, None, None
    stack, n_steps = StackPass(weights, operands, spec, x.is_cuda), len(spec.steps(weights))
    tile, programs, run = grid_of(x.shape[0], stack, multiprocessors(x), target_of(x))
    rows, hidden, matrices = tile["ROWS"], (spec.n_linear - 1) * spec.hidden, stack.matrices
    sizes = spec.half + hidden, hidden, 2 * spec.half + hidden
    scratch = [
        weights.new_empty(programs, rows * size, dtype=dtype)
        for size, dtype in zip(sizes, stack.scratch_dtypes, strict=True)
    ]
    z = weights.new_empty(programs, n_steps + 1, run, 2 * spec.half)
    partials = weights.new_empty(programs, *weights.shape) if needs_weights else None
    columns = min(tile["COLUMNS"], *spec.widths[1:])
    forward, gradients, maps = stack.forward_mode, stack.gradient_mode, stack.map_mode
    _coupling_stack_backward_kernel[(programs,)](
        x, grad, grad_log_det, dx, weights, matrices, z, *scratch, partials, x.shape[0], run, *spec.sizes, n_steps,
        spec.half, spec.hidden, spec.row_size, matrices.stride(0), spec.matrix_size, spec.map_offset,
        weights.numel(), *x.stride(), *((0, 0) if grad is None else grad.stride()),
        0 if grad_log_det is None else grad_log_det.stride(0), spec.bound, spec.floor, N_LINEAR=spec.n_linear,
        ACTIVATION=spec.activation, KIND=spec.kind, SCALE_FIRST=spec.scale_first,
        MOVES_SECOND=int(spec.moves_second), INVERSE=spec.inverse, MAPS=spec.maps, HEAD=int(spec.head),
        PARTS=forward.parts, TYPE=TYPES[forward.dtype], D_TYPE=TYPES[gradients.dtype], MAP_PARTS=maps.parts,
        MAP_TYPE=TYPES[maps.dtype],
        **{**tile, "COLUMNS": columns, "KEPT": min(columns, spec.half), "DEPTH": min(tile["DEPTH"], *spec.widths)},
    )  # fmt: skip
    if partials is None:
        return dx, None, None, None
    dweights = partials.sum(0)
    dweights[:, spec.scales_offset :] = 0.0  # no program writes there
    if spec.head:
        dweights[0, : spec.map_offset] = 0.0  # a head has no conditioner
    return dx, dweights, None, None
