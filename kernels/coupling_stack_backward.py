"""Gradients of the coupling stack in one launch, and one sum over programs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div
from .row_products import Mode
from .stack_backward_tiles import coupling_backward, coupling_forward, load_tile, map_step, store_tile
from .stack_spec import DENSE, N_PARTS, StackSpec, map_parts, spec_of

SCRATCH_BYTES = 2**30
TILES = {m: (128, 64, 8, 32, 2) for m in ("fast", "tf32", "high", "exact")}
SMALL = 32


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
    n_runs = tl.cdiv(n_batch, run)
    for turn in tl.range(0, tl.cdiv(n_runs - tl.program_id(0), tl.num_programs(0)), num_stages=1, disable_licm=True):
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
            gradient_ptr = None if partials_ptr is None else partials_ptr + program * partials_stride + row.to(tl.int64) * row_size
            bias_gradient_ptr = None if gradient_ptr is None else gradient_ptr + matrix_size
            map_gradient_ptr = None if gradient_ptr is None else gradient_ptr + map_offset
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
                            z_ptr, z_row, next_row, row_ptr + map_offset, map_gradient_ptr, half, is_backward, needs_before,
                            again, MAPS == 2, ROWS, COLUMNS, DEPTH, STAGES, MAP_PARTS, MAP_TYPE,
                        )  # fmt: skip
                if not is_map:
                    moves_first = (layer + MOVES_SECOND) % 2 == 0
                    moved = tl.where(moves_first, 0, half)
                    coupling_forward(
                        z_ptr, z_row, next_row, w_ptr, row_ptr + matrix_size, h_ptr, slope_ptr, d_ptr, bias_gradient_ptr,
                        grad_log_det_ptr, stride_log_det, first, n_batch, half, hidden, moved,
                        tl.where(moves_first, n_first, n_second),
                        is_backward, again, bound, floor, N_LINEAR, ACTIVATION, KIND, SCALE_FIRST, INVERSE,
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
                store_tile(
                    dx_ptr, z_ptr, tile * ROWS, first, n_batch, n_first, n_second, half, ROWS, COLUMNS
                )
        tl.debug_barrier()  # before the next run overwrites what other threads read


@dataclass(frozen=True)
class StackPass:
    """The weights of the op, their spec, and whether its kernels run on a GPU."""

    weights: Tensor
    operands: Tensor
    spec: StackSpec
    on_gpu: bool

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


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if torch.cuda.is_available() else 2


def launch_coupling_stack_backward(
    x: Tensor, weights: Tensor, operands: Tensor, _: Tensor, grad: Tensor | None, grad_log_det: Tensor | None,
    *constants: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    spec, (needs_x, needs_weights, _, _) = spec_of(*constants[:-1]), constants[-1]
    stack = StackPass(weights, operands, spec, x.is_cuda)
    dx = x.new_empty(x.shape) if needs_x else None
    rows, columns, warps, depth, stages = TILES[spec.precision]
    columns = min(columns, *spec.widths[1:])
    programs = _multiprocessors(x.device)
    n_steps, width, layers = len(spec.steps(weights)), 2 * spec.half, spec.n_linear - 1
    run = min(ceil_div(ceil_div(x.shape[0], programs), rows), max(1, SCRATCH_BYTES // (4 * programs * (n_steps + 1) * rows * width))) * rows
    programs = ceil_div(x.shape[0], run)
    if programs == 0:
        return dx, torch.zeros_like(weights) if needs_weights else None, None, None
    z = weights.new_empty(programs, n_steps + 1, run, width)
    fast = spec.precision == "fast"
    h = weights.new_empty(programs, rows * (spec.half + layers * spec.hidden), dtype=stack.hidden_dtype)
    slopes = weights.new_empty(programs, rows * layers * spec.hidden, dtype=torch.float16 if fast else torch.float32)
    d = weights.new_empty(programs, rows * (width + layers * spec.hidden), dtype=stack.part_dtype if fast else torch.float32)
    partials = weights.new_empty(programs, *weights.shape) if needs_weights else None
    matrices = operands[0] if N_PARTS[spec.precision] == 1 else weights
    mode, gradients, maps = stack.forward_mode.constexprs, stack.gradient_mode, stack.map_mode
    _coupling_stack_backward_kernel[(programs,)](
        x, grad, grad_log_det, dx, weights, matrices, z, h, slopes, d, partials,
        x.shape[0], run, *spec.sizes, n_steps, spec.half, spec.hidden, spec.row_size, matrices.stride(0),
        spec.matrix_size, spec.map_offset, weights.numel(), *x.stride(), *(grad.stride() if grad is not None else (0, 0)),
        grad_log_det.stride(0) if grad_log_det is not None else 0, spec.bound, spec.floor,
        N_LINEAR=spec.n_linear, ACTIVATION=spec.activation, KIND=spec.kind, SCALE_FIRST=spec.scale_first,
        MOVES_SECOND=int(spec.moves_second), INVERSE=spec.inverse, MAPS=spec.maps, HEAD=int(spec.head),
        ROWS=rows, COLUMNS=columns, KEPT=min(columns, spec.half),
        DEPTH=min(depth, spec.half), STAGES=stages, **mode, D_TYPE=gradients.constexprs["TYPE"],
        MAP_PARTS=maps.parts, MAP_TYPE=maps.constexprs["TYPE"], num_warps=warps,
    )  # fmt: skip
    dweights = None
    if partials is not None:
        dweights = partials.sum(0)
        if spec.head:
            dweights[0, : spec.map_offset] = 0
    return dx, dweights, None, None
