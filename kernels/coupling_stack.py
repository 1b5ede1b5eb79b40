"""A stack of affine couplings with MLP conditioners in one launch; linearizer_stack.py uses the same layers.

a and b are the halves of x; one is the moved half m and the other the kept half k, alternating by layer. (W, c) is
an affine map after a layer, where there is one:

    forward, layer l = 0 .. L - 1      (t, r) = MLP_l(k)   m <- couple(m, t, log_s(r))   x <- W_l x + c_l
    inverse, layer l = L - 1 .. 0      x <- V_l x + d_l   (t, r) = MLP_l(k)   m <- uncouple(m, t, log_s(r))

(V, d) is the inverse map, which an inverse stack's weights contain in place of (W, c). log|det| of the couplings is
+-sum(log_s), fp32; that of the maps does not depend on x and is added outside. Shapes: x [B, D], y [B, D] of x's
dtype; weights as kernels/stack_spec.py lays them out.

A program holds ROWS rows of x as two fp32 halves from the first layer to the last. An iteration is one layer and
selects the moved half by parity. Swapping the halves instead would carry a dependence over two iterations, and
Triton would no longer load the weights asynchronously. Forward and inverse share the loop body, so that shift and
log-scale have the same bits in both. Bytes: x, y and log|det| once; the weights once per program, from L2.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coupling_layers import launch_layers
from .launch import ceil_div
from .math import couple, log_scale
from .mlp import activation_form, conditioner, load_vector, operand, product
from .stack_configs import LayersConfig, StackConfig, StackEntry, entry_for, multiprocessors, target_of, tiles_for
from .stack_spec import MAP_PARTS, STACK_PARTS, StackSpec, spec_of


@triton.jit
def apply_map(
    a,
    b,
    operands_ptr,
    part_stride,
    values_ptr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    DENSE: tl.constexpr,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr = False,
):
    """[a | b] -> W [a | b] + c: a matrix from its parts, or a diagonal; values_ptr is the map in fp32, then c."""
    i = tl.arange(0, HALF)
    if DENSE:
        WIDTH: tl.constexpr = 2 * HALF
        dtype: tl.constexpr = operands_ptr.dtype.element_ty
        SCALED: tl.constexpr = PARTS == 2 and dtype == tl.float16
        bias_ptr = values_ptr + WIDTH * WIDTH
        a0, a1, a2, a_unscale = operand(a, dtype, PARTS)
        b0, b1, b2, b_unscale = operand(b, dtype, PARTS)
        first = a
        second = b
        # A loop, so that one half's products are done before the other's weights take registers.
        for half in tl.range(0, 2, num_stages=1):
            w = operands_ptr + (half * HALF + i)[None, :] * WIDTH + i[:, None]
            out = product(a0, a1, a2, a_unscale, w, part_stride, tl.zeros((ROWS, HALF), tl.float32), PARTS)
            out = product(b0, b1, b2, b_unscale, w + HALF, part_stride, out, PARTS)
            if SCALED:
                out *= tl.load(bias_ptr + WIDTH + half * HALF + i)[None, :]
            first = tl.where(half == 0, out, first)
            second = tl.where(half == 1, out, second)
    else:
        bias_ptr = values_ptr + 2 * HALF
        first = a * load_vector(values_ptr, HALF, AHEAD)[None, :]
        second = b * load_vector(values_ptr + HALF, HALF, AHEAD)[None, :]
    if BIAS:
        first += load_vector(bias_ptr, HALF, AHEAD)[None, :]
        second += load_vector(bias_ptr + HALF, HALF, AHEAD)[None, :]
    return first, second


@triton.jit
def run_layers(
    a,
    b,
    weights_ptr,
    operands_ptr,
    map_operands_ptr,
    n_layers,
    part_stride,
    row_stride,
    map_part_stride,
    n_first,
    n_second,
    bound,
    floor,
    N_LINEAR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    MOVES_SECOND: tl.constexpr,
    INVERSE: tl.constexpr,
    LOG_DET: tl.constexpr,
    MAPS: tl.constexpr,
    HEAD: tl.constexpr,
    MATRIX_SIZE: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    MAP_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    MAP_PARTS: tl.constexpr,
    LAYER_STAGES: tl.constexpr,
    CHUNK_STAGES: tl.constexpr,
):
    """(a, b, log_det) after every layer; see the top of this file."""
    MAP_SIZE: tl.constexpr = 4 * HALF * HALF
    DENSE: tl.constexpr = MAPS == 2
    SCALES_OFFSET: tl.constexpr = ROW_SIZE - (N_LINEAR - 1) * HIDDEN - 2 * HALF
    AHEAD: tl.constexpr = LAYER_STAGES > 1 and PARTS == 1 and not DENSE
    log_det = tl.zeros((ROWS,), tl.float32)
    if HEAD and not INVERSE:
        a, b = apply_map(
            a, b, map_operands_ptr, map_part_stride, weights_ptr + MAP_OFFSET, ROWS, HALF, DENSE, True, MAP_PARTS
        )
    for i in tl.range(0, n_layers, num_stages=LAYER_STAGES):
        if INVERSE:
            layer = n_layers - 1 - i
        else:
            layer = i
        row = layer + HEAD
        row_ptr = weights_ptr + row * ROW_SIZE
        if MAPS and INVERSE:
            a, b = apply_map(
                a, b, map_operands_ptr + row * MAP_SIZE, map_part_stride, row_ptr + MAP_OFFSET,
                ROWS, HALF, DENSE, True, MAP_PARTS, AHEAD,
            )  # fmt: skip
        moves_first = (layer + MOVES_SECOND) % 2 == 0
        kept = tl.where(moves_first, b, a)
        moved = tl.where(moves_first, a, b)
        shift, raw = conditioner(
            kept, operands_ptr + row * row_stride, part_stride, row_ptr + MATRIX_SIZE,
            row_ptr + SCALES_OFFSET, N_LINEAR, ROWS, HALF, HIDDEN, CHUNK, CHUNK_STAGES, PARTS, ACTIVATION, FORM,
        )  # fmt: skip
        log_s = log_scale(raw, bound, floor, KIND, FORM)
        if LOG_DET:
            inside = tl.arange(0, HALF) < tl.where(moves_first, n_first, n_second)
            log_det += tl.sum(tl.where(inside[None, :], log_s, 0.0), 1)
        moved = couple(moved, shift, log_s, SCALE_FIRST, INVERSE, FORM)
        a = tl.where(moves_first, moved, kept)
        b = tl.where(moves_first, kept, moved)
        if MAPS and not INVERSE:
            a, b = apply_map(
                a, b, map_operands_ptr + row * MAP_SIZE, map_part_stride, row_ptr + MAP_OFFSET,
                ROWS, HALF, DENSE, True, MAP_PARTS, AHEAD,
            )  # fmt: skip
    if HEAD and INVERSE:
        a, b = apply_map(
            a, b, map_operands_ptr, map_part_stride, weights_ptr + MAP_OFFSET, ROWS, HALF, DENSE, True, MAP_PARTS
        )
    if INVERSE:
        log_det = -log_det
    return a, b, log_det


@triton.jit
def _halves_at(
    x_ptr,
    n_batch,
    n_first,
    n_second,
    stride_b,
    stride_d,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    INT64: tl.constexpr,
):
    """(pointers, mask) of a program's tile of the first half, and of the second."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    r = tl.arange(0, ROWS)
    i = tl.arange(0, HALF)
    inside = (r < n_batch - start)[:, None]
    if INT64:
        r = r.to(tl.int64)
        i = i.to(tl.int64)
    x_ptr += start * stride_b
    first = x_ptr + r[:, None] * stride_b + i[None, :] * stride_d
    second = x_ptr + r[:, None] * stride_b + (n_first + i)[None, :] * stride_d
    return first, inside & (i < n_first)[None, :], second, inside & (i < n_second)[None, :]


@triton.jit
def load_halves(
    x_ptr,
    n_batch,
    n_first,
    n_second,
    stride_b,
    stride_d,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    INT64: tl.constexpr,
):
    first, first_inside, second, second_inside = _halves_at(
        x_ptr, n_batch, n_first, n_second, stride_b, stride_d, ROWS, HALF, INT64
    )
    a = tl.load(first, mask=first_inside, other=0.0).to(tl.float32)
    b = tl.load(second, mask=second_inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_halves(
    y_ptr,
    a,
    b,
    n_batch,
    n_first,
    n_second,
    stride_b,
    stride_d,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    INT64: tl.constexpr,
):
    first, first_inside, second, second_inside = _halves_at(
        y_ptr, n_batch, n_first, n_second, stride_b, stride_d, ROWS, HALF, INT64
    )
    tl.store(first, a.to(y_ptr.dtype.element_ty), mask=first_inside)
    tl.store(second, b.to(y_ptr.dtype.element_ty), mask=second_inside)


@triton.jit(do_not_specialize=["n_batch", "n_layers"])
def _coupling_stack_kernel(
    x_ptr,
    y_ptr,
    log_det_ptr,
    weights_ptr,
    operands_ptr,
    map_operands_ptr,
    n_batch,
    n_first,
    n_second,
    n_layers,
    part_stride,
    row_stride,
    map_part_stride,
    stride_xb,
    stride_xd,
    stride_yb,
    bound,
    floor,
    N_LINEAR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    MOVES_SECOND: tl.constexpr,
    INVERSE: tl.constexpr,
    LOG_DET: tl.constexpr,
    MAPS: tl.constexpr,
    HEAD: tl.constexpr,
    MATRIX_SIZE: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    MAP_OFFSET: tl.constexpr,
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
    a, b, log_det = run_layers(
        a, b, weights_ptr, operands_ptr, map_operands_ptr, n_layers, part_stride, row_stride, map_part_stride,
        n_first, n_second, bound, floor,
        N_LINEAR, ACTIVATION, FORM, KIND, SCALE_FIRST, MOVES_SECOND, INVERSE, LOG_DET, MAPS, HEAD,
        MATRIX_SIZE, ROW_SIZE, MAP_OFFSET, ROWS, HALF, HIDDEN, CHUNK, PARTS, MAP_PARTS, LAYER_STAGES, CHUNK_STAGES,
    )  # fmt: skip
    store_halves(y_ptr, a, b, n_batch, n_first, n_second, stride_yb, 1, ROWS, HALF, INT64)
    if LOG_DET:
        start = tl.program_id(0).to(tl.int64) * ROWS
        r = tl.arange(0, ROWS)
        tl.store(log_det_ptr + start + r, log_det, mask=r < n_batch - start)


def stack_options(x: Tensor, *specs: StackSpec) -> dict[str, Any]:
    """Constexpr arguments and num_warps of a launch of one stack, or of a Linearizer's two."""
    target = target_of(x)
    entry, of_tiles = _options_without_x(target, specs)
    options = of_tiles[entry.config_of(x.shape[0], multiprocessors(x))]
    form, int64 = activation_form(x, specs[0].precision), reaches_past_int32(x, options["ROWS"])
    return {**options, "FORM": form, "INT64": int64}


@functools.lru_cache(256)
def _options_without_x(
    target: str | None, specs: tuple[StackSpec, ...]
) -> tuple[StackEntry, dict[StackConfig, dict[str, Any]]]:
    """The entry for target and specs, and the options of each of its tiles that depend on nothing else.

    Two stacks share all options that do not end in _X or _Y.
    """
    spec, is_linearizer = specs[0], len(specs) == 2
    sizes, maps = (spec.features, spec.hidden, spec.n_linear), max([each.maps for each in specs])
    entry = entry_for(*sizes, spec.precision, target, maps, is_linearizer)
    if entry is None:
        raise ValueError(f"no tile for a launch of {spec} on {target}")
    own: dict[str, int] = {}
    for each, side in zip(specs, ("_X", "_Y") if is_linearizer else ("",), strict=True):
        own |= {
            f"MOVES_SECOND{side}": int(each.moves_second), f"MAPS{side}": each.maps, f"HEAD{side}": int(each.head),
            f"ROW_SIZE{side}": each.row_size,
        }  # fmt: skip
    own |= {
        "N_LINEAR": spec.n_linear, "MATRIX_SIZE": spec.matrix_size, "MAP_OFFSET": spec.map_offset,
        "HALF": spec.half, "HIDDEN": spec.hidden, "PARTS": STACK_PARTS[spec.precision],
        "MAP_PARTS": MAP_PARTS, "ACTIVATION": spec.activation, "KIND": spec.kind,
        "SCALE_FIRST": spec.scale_first,
    }  # fmt: skip
    return entry, {config: {**own, **_of_tile(config, spec)} for config in (*entry.smaller, entry.config)}


def _of_tile(config: StackConfig, spec: StackSpec) -> dict[str, int]:
    return {
        "ROWS": config.rows, "num_warps": config.num_warps, "CHUNK": min(config.chunk or spec.hidden, spec.hidden),
        "LAYER_STAGES": config.layer_stages, "CHUNK_STAGES": config.chunk_stages,
    }  # fmt: skip


@functools.lru_cache(256)
def _tiles(target: str | None, spec: StackSpec) -> StackEntry | LayersConfig | None:
    return tiles_for(spec.features, spec.hidden, spec.n_linear, spec.precision, target, spec.maps)


def reaches_past_int32(x: Tensor, rows: int) -> bool:
    """Whether an offset within a tile of this many rows exceeds int32."""
    return rows * x.stride(0) + x.shape[1] * x.stride(1) >= 2**31


def launch_coupling_stack(
    x: Tensor, weights: Tensor, operands: Tensor, map_operands: Tensor, *constants: Any
) -> tuple[Tensor, Tensor]:
    """(y [B, D] contiguous, log|det| of the couplings [B] fp32; [0] where not requested)."""
    spec = spec_of(*constants)
    y = x.new_empty(x.shape)
    total = x.new_empty(x.shape[0] if spec.log_det else 0, dtype=torch.float32)
    if x.shape[0] == 0:
        return y, total
    tiles = _tiles(target_of(x), spec)
    if isinstance(tiles, LayersConfig):
        launch_layers(x, y, total, weights, operands, spec, tiles, reaches_past_int32(x, tiles.rows))
        return y, total
    options = stack_options(x, spec)
    _coupling_stack_kernel[(ceil_div(x.shape[0], options["ROWS"]),)](
        x, y, total, weights, operands, map_operands, x.shape[0], *spec.sizes, spec.n_layers(weights),
        operands.stride(0), operands.stride(1), map_operands.stride(0), x.stride(0), x.stride(1), y.stride(0),
        spec.bound, spec.floor, INVERSE=spec.inverse, LOG_DET=spec.log_det, **options,
    )  # fmt: skip
    return y, total
