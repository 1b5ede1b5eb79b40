"""Gradients of the coupling stack in one launch, and one sum over the programs.

TODO
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div
from .row_products import TYPES, Mode
from .stack_backward_tiles import coupling_backward, coupling_forward, load_tile, map_step, store_tile
from .stack_spec import N_PARTS, StackSpec, map_parts, spec_of

# A program's tile: its rows, the columns of a product, the depth of a step and the stages of its loads. Eight warps
# leave 255 registers per thread to the one program of a multiprocessor; with four, small tiles spill on sm_100. 128
# rows, because the weights and their partial sums pass through L2 once per tile. 64 columns: 32 sums per thread.
LARGE = {"ROWS": 128, "COLUMNS": 64, "DEPTH": 32, "STAGES": 2, "num_warps": 8}
# Where a tile of 128 rows for every multiprocessor would leave some of them idle.
SMALL = {**LARGE, "ROWS": 32}

# The most tiles of a run, and the scratch memory of all programs.
TILES_A_RUN = 8
SCRATCH_BYTES = 2**30


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


@dataclass(frozen=True)
class StackPass:
    """The weights of the op, their spec, and whether its kernels run on a GPU."""

    weights: Tensor
    operands: Tensor
    spec: StackSpec
    on_gpu: bool

    @property
    def matrices(self) -> Tensor:
        """The conditioners' matrices, a row per layer; in modes of one part rounded, as in the forward."""
        return self.operands[0] if N_PARTS[self.spec.precision] == 1 else self.weights

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
    def scratch_dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of h, act' and d: in "fast" those of the operands, and fp16 for act', which lies between -0.2 and 1.2."""
        if self.spec.precision != "fast":
            return torch.float32, torch.float32, torch.float32
        return self.operands.dtype, torch.float16, self.gradient_mode.dtype


class Grid(NamedTuple):
    """How the rows are shared among programs.

    Args:
        tile: a program's tile.
        programs: how many run.
        run: rows that a program takes through the whole stack before it takes others, a multiple of the tile's.
    """

    tile: dict[str, int]
    programs: int
    run: int


def grid_of(batch: int, stack: StackPass, multiprocessors: int) -> Grid:
    """Few programs or short runs where SCRATCH_BYTES requires it; see the top of this file."""
    spec, layers = stack.spec, stack.spec.n_linear - 1
    tile = LARGE if batch >= LARGE["ROWS"] * multiprocessors else SMALL
    rows = tile["ROWS"]
    programs = min(ceil_div(batch, rows), multiprocessors)
    h, slope, d = [dtype.itemsize for dtype in stack.scratch_dtypes]
    of_layer = h * spec.half + 2 * d * spec.half + (h + slope + d) * layers * spec.hidden
    of_tile = 8 * rows * spec.half * (len(spec.steps(stack.weights)) + 1)
    fixed = 4 * stack.weights.numel() + rows * of_layer
    tiles = min(TILES_A_RUN, ceil_div(ceil_div(batch, rows), programs))
    tiles = max(1, min(tiles, (SCRATCH_BYTES // programs - fixed) // of_tile))
    programs = max(1, min(programs, SCRATCH_BYTES // (fixed + tiles * of_tile)))
    return Grid(tile, min(programs, ceil_div(batch, tiles * rows)), tiles * rows)


@functools.lru_cache(64)
def _multiprocessors(kind: str, index: int | None) -> int:
    """Those of the GPU; two under Triton's interpreter."""
    return torch.cuda.get_device_properties(index).multi_processor_count if kind == "cuda" else 2


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
    tile, programs, run = grid_of(x.shape[0], stack, _multiprocessors(x.device.type, x.device.index))
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
    if spec.head:
        dweights[0, : spec.map_offset] = 0.0  # a head has no conditioner
    return dx, dweights, None, None
