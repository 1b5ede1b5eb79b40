"""A whole Linearizer of coupling stacks in one launch: y = g_y^-1(A g_x(x)), x [B, D] and y [B, D].

A program holds a tile of rows on chip and applies g_x's layers, A (a matrix in parts, or a diagonal) and the
inverses of g_y's layers. Both stacks run ``run_layers`` of kernels/coupling_stack.py; they may share tensors.
Bytes: x and y once; the weights of both stacks and A once per program, from L2.

Gradients, with z = g_x(x), w = A z and v the vector-Jacobian product of g_y^-1 at w with dL/dy: dA = v^T z (summed
over samples), and dx is the vector-Jacobian product of g_x at x with A^T v. z and w are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .coupling_stack import apply_map, launch_coupling_stack, load_halves, run_layers, stack_options, store_halves
from .coupling_stack_backward import launch_coupling_stack_backward
from .launch import ceil_div
from .stack_spec import specs_of


@triton.jit(do_not_specialize=["n_batch", "n_layers_x", "n_layers_y"])
def _linearizer_stack_kernel(
    x_ptr,
    y_ptr,
    weights_x_ptr,
    operands_x_ptr,
    map_operands_x_ptr,
    core_ptr,
    core_operands_ptr,
    weights_y_ptr,
    operands_y_ptr,
    map_operands_y_ptr,
    n_batch,
    n_first,
    n_second,
    n_layers_x,
    n_layers_y,
    part_stride_x,
    row_stride_x,
    map_part_stride_x,
    core_part_stride,
    part_stride_y,
    row_stride_y,
    map_part_stride_y,
    stride_xb,
    stride_xd,
    stride_yb,
    bound_x,
    floor_x,
    bound_y,
    floor_y,
    N_LINEAR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    MOVES_SECOND_X: tl.constexpr,
    MOVES_SECOND_Y: tl.constexpr,
    MAPS_X: tl.constexpr,
    HEAD_X: tl.constexpr,
    MAPS_Y: tl.constexpr,
    HEAD_Y: tl.constexpr,
    DENSE: tl.constexpr,
    MATRIX_SIZE: tl.constexpr,
    MAP_OFFSET: tl.constexpr,
    ROW_SIZE_X: tl.constexpr,
    ROW_SIZE_Y: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    MAP_PARTS: tl.constexpr,
    LAYER_STAGES: tl.constexpr,
    CHUNK_STAGES: tl.constexpr,
    INT64: tl.constexpr,
):
    a, b = load_halves(x_ptr, n_batch, n_first, n_second, stride_xb, stride_xd, ROWS, HALF, INT64)
    a, b, _ = run_layers(
        a, b, weights_x_ptr, operands_x_ptr, map_operands_x_ptr, n_layers_x, part_stride_x, row_stride_x,
        map_part_stride_x, n_first, n_second, bound_x, floor_x,
        N_LINEAR, ACTIVATION, FORM, KIND, SCALE_FIRST, MOVES_SECOND_X, False, False, MAPS_X, HEAD_X,
        MATRIX_SIZE, ROW_SIZE_X, MAP_OFFSET, ROWS, HALF, HIDDEN, CHUNK, PARTS, MAP_PARTS,
        LAYER_STAGES, CHUNK_STAGES,
    )  # fmt: skip
    a, b = apply_map(a, b, core_operands_ptr, core_part_stride, core_ptr, ROWS, HALF, DENSE, False, MAP_PARTS)
    a, b, _ = run_layers(
        a, b, weights_y_ptr, operands_y_ptr, map_operands_y_ptr, n_layers_y, part_stride_y, row_stride_y,
        map_part_stride_y, n_first, n_second, bound_y, floor_y,
        N_LINEAR, ACTIVATION, FORM, KIND, SCALE_FIRST, MOVES_SECOND_Y, True, False, MAPS_Y, HEAD_Y,
        MATRIX_SIZE, ROW_SIZE_Y, MAP_OFFSET, ROWS, HALF, HIDDEN, CHUNK, PARTS, MAP_PARTS,
        LAYER_STAGES, CHUNK_STAGES,
    )  # fmt: skip
    store_halves(y_ptr, a, b, n_batch, n_first, n_second, stride_yb, 1, ROWS, HALF, INT64)


def launch_linearizer_stack(x: Tensor, *arguments: Any) -> Tensor:
    """y [B, D], contiguous."""
    tensors, (spec_x, spec_y) = arguments[:8], specs_of(arguments[8:])
    weights_x, operands_x, map_operands_x, _, core_operands, weights_y, operands_y, map_operands_y = tensors
    y = x.new_empty(x.shape)
    if x.shape[0] == 0:
        return y
    options = stack_options(x, spec_x, spec_y)
    _linearizer_stack_kernel[(ceil_div(x.shape[0], options["ROWS"]),)](
        x, y, *tensors, x.shape[0], *spec_x.sizes, spec_x.n_layers(weights_x), spec_y.n_layers(weights_y),
        operands_x.stride(0), operands_x.stride(1), map_operands_x.stride(0), core_operands.stride(0),
        operands_y.stride(0), operands_y.stride(1), map_operands_y.stride(0),
        x.stride(0), x.stride(1), y.stride(0), spec_x.bound, spec_x.floor, spec_y.bound, spec_y.floor,
        DENSE=core_operands.numel() > 0, **options,
    )  # fmt: skip
    return y


def launch_linearizer_stack_backward(x: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """(dx, dweights_x, None, None, dcore, None, dweights_y, None, None), by the stacks' own backward."""
    stack_x, core, stack_y, grad = arguments[:3], arguments[3], arguments[5:8], arguments[8]
    (spec_x, spec_y), needs = specs_of(arguments[9:-1]), arguments[-1]
    dtype, A = x.dtype, spec_x.core_matrix(core)
    backward: Any = launch_coupling_stack_backward
    x, grad = x.to(core.dtype), grad.to(core.dtype)  # as the one launch, which holds z and w in fp32
    z = launch_coupling_stack(x, *stack_x, *spec_x.constants)[0]
    padded_z = spec_x.pad(z)
    w = spec_x.unpad(padded_z * A if A.ndim == 1 else padded_z @ A.mT)
    dw, dweights_y, *none_y = backward(w, *stack_y, grad, None, *spec_y.constants, [True, needs[6], False, False])
    padded_dw = spec_x.pad(dw)
    if A.ndim == 1:
        dA, dz = (padded_dw * padded_z).sum(0), padded_dw * A
    else:
        dA, dz = (padded_dw.mT @ padded_z).flatten(), padded_dw @ A
    dcore = torch.cat((dA, padded_dw.sum(0)))[None] if needs[4] else None
    if dcore is not None:
        dcore = F.pad(dcore, (0, core.shape[1] - dcore.shape[1]))  # the scales
    dz = spec_x.unpad(dz)
    dx, dweights_x, *none_x = backward(x, *stack_x, dz, None, *spec_x.constants, [needs[0], needs[1], False, False])
    return dx if dx is None else dx.to(dtype), dweights_x, *none_x, dcore, None, dweights_y, *none_y
