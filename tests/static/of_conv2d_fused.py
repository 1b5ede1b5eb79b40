"""Static cases of conv2d_fused, its weight gradient and group_statistics: every tile, mode and layout.

Forward: norm, SiLU, bias, residual and the next norm's sums, as a residual block's second convolution has
them. Transposed: none of these, as the backward has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from linfast.kernels.conv2d_configs import TILES, WEIGHT_TILES, ConvTile
from linfast.kernels.row_products import TYPES

from tests.static.cases import TARGETS, StaticCase

_FP32 = ("tiles", "mean", "rstd", "next", "partial")
_CONV_POINTERS = (
    *("x", "weight", "bias", "norm_weight", "norm_bias", "residual", "tiles", "y", "mean", "rstd", "next"),
)
_OPTIONAL = _CONV_POINTERS[2:7] + _CONV_POINTERS[8:]
_CONV_SIZES = (
    *("n_in", "n_out", "height", "width", "n_row_tiles", "groups", "n_tiles", "tile_rows", "next_groups"),
    *("stride_bb", "n_taps"),
)
_WEIGHT_POINTERS = ("x", "grad", "norm_weight", "norm_bias", "mean", "rstd", "partial")
_WEIGHT_SIZES = ("n_in", "n_out", "height", "width", "n_row_tiles", "n_steps", "steps_a_split", "groups")
# mode: (type of x and weight, parts, their type, form of SiLU on NVIDIA)
_MODES = {
    "tf32": ("fp32", 1, "float32", 2),
    "fast": ("fp32", 1, "bfloat16", 2),
    "high": ("fp32", 2, "bfloat16", 0),
    "exact": ("fp32", 3, "bfloat16", 0),
    "bf16": ("bf16", 1, "bfloat16", 2),
    "fp16": ("fp16", 1, "float16", 2),
}
_NVIDIA, _AMD = TARGETS[:3], TARGETS[3:]
_SPLIT = ("high", "exact")
_WIDTHS = (16, 32, 64, 128)


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    return [case for targets in (_NVIDIA, _AMD) for case in _of_targets(targets)]


def _of_targets(targets: tuple[str, ...]) -> list[StaticCase]:
    tiles = list(zip(_WIDTHS, (tile for _, tile in TILES), strict=True))
    weight_tiles = list(zip(_WIDTHS, (tile for _, tile in WEIGHT_TILES), strict=False))
    narrow, wide = tiles[0][1], tiles[1][1]
    modes = [mode for mode in _MODES if targets == _NVIDIA or mode != "tf32"]
    built = [
        *(_conv(tile, width, mode) for width, tile in tiles for mode in modes),
        *(_conv(tile, width, mode, transpose=True) for width, tile in tiles for mode in (modes[0], "bf16")),
        *(_conv(narrow, 16, mode, last=False) for mode in ("tf32", "bf16") if targets == _NVIDIA),
        *(_conv(wide, 32, mode, kernel=1) for mode in (modes[0], "bf16")),
        _conv(replace(narrow, rows=16), 16, modes[0]),
        *(_weight(tile, width, mode) for width, tile in weight_tiles for mode in modes),
        *(_statistics(width, dtype) for width in (16, 128) for dtype in ("fp32", "bf16")),
    ]
    return [replace(case, targets=targets, constexprs=_portable(case.constexprs, targets)) for case in built]


def _portable(constexprs: dict[str, Any], targets: tuple[str, ...]) -> dict[str, Any]:
    """SiLU in NVIDIA's own instruction on NVIDIA only."""
    if targets == _NVIDIA or "FORM" not in constexprs:
        return constexprs
    return constexprs | {"FORM": min(constexprs["FORM"], 1)}


def _view(letter: str, last: bool) -> dict[str, int | None]:
    """Strides of a view; None is a run-time number."""
    strides: dict[str, int | None] = {f"stride_{letter}{axis}": None for axis in "bchw"}
    return strides | {f"stride_{letter}{'c' if last else 'w'}": 1}


def _conv(
    tile: ConvTile, width: int, mode: str, *, transpose: bool = False, last: bool = True, kernel: int = 3
) -> StaticCase:
    dtype, parts, part_dtype, form = _MODES[mode]
    strides = _view("x", last) | _view("r", last) | _view("y", last) | {"stride_wo": None, "stride_wc": None}
    strides |= {"stride_wu": None, "stride_wv": None, "stride_bo": 1}
    strides |= {"stride_wo": 1} if transpose else {"stride_wc": 1} if last else {"stride_wv": 1}
    constexprs: dict[str, Any] = {name: value for name, value in strides.items() if value is not None}
    constexprs |= {f"{name}_ptr": None for name in _OPTIONAL} if transpose else {}
    constexprs |= _product(kernel, parts, part_dtype, -1 if transpose else form, tile)
    constexprs |= {"n_taps": 1} if kernel == 1 else {}
    constexprs |= {"PER_GROUP": 1, "PADDED": 1} if transpose else {"PER_GROUP": 4, "PADDED": 4}
    sizes = dict.fromkeys(_CONV_SIZES, "i32") | {"eps": "fp32", "alpha": "fp32"}
    words = ["transposed" if transpose else "forward", f"{kernel}x{kernel}", f"C={width}"]
    return _case(
        "conv2d_fused", "_conv2d_fused_kernel", [*words, "channels_last" if last else "NCHW", mode],
        _CONV_POINTERS, dtype, sizes, strides, constexprs, tile, mode, last,
    )  # fmt: skip


def _weight(tile: ConvTile, width: int, mode: str) -> StaticCase:
    dtype, parts, part_dtype, form = _MODES[mode]
    strides = _view("x", True) | _view("g", True)
    constexprs: dict[str, Any] = {name: value for name, value in strides.items() if value is not None}
    constexprs |= _product(3, parts, part_dtype, form, tile)
    sizes = dict.fromkeys(_WEIGHT_SIZES, "i32")
    words = ["3x3", f"C={width}", "channels_last", mode]
    return _case(
        "conv2d_fused_backward", "_conv2d_weight_kernel", words, _WEIGHT_POINTERS, dtype, sizes, strides,
        constexprs, tile, mode, True,
    )  # fmt: skip


def _statistics(width: int, dtype: str) -> StaticCase:
    strides = _view("x", True)
    tile = ConvTile(8192 // width, width, 0, 0, 8, 8)
    constexprs: dict[str, Any] = {"stride_xc": 1, "INT64": False, "PER_GROUP": 4, "PADDED": 4}
    constexprs |= {"ROWS": tile.rows, "COLUMNS": tile.columns}
    sizes = dict.fromkeys(("n_groups", "n_positions", "width", "n_row_tiles"), "i32")
    return _case(
        "group_statistics", "_group_statistics_kernel", [f"C={width}", "channels_last", dtype], ("x", "tiles"),
        dtype, sizes, strides, constexprs, tile, "", True,
    )  # fmt: skip


def _product(kernel: int, parts: int, part_dtype: str, form: int, tile: ConvTile) -> dict[str, Any]:
    constexprs = {"KERNEL": kernel, "PARTS": parts, "TYPE": TYPES[getattr(torch, part_dtype)], "FORM": form}
    constexprs |= {"INT64": False, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return constexprs | {"DEPTH": tile.depth, "STAGES": tile.stages}


def _case(
    op: str,
    kernel: str,
    words: list[str],
    pointers: tuple[str, ...],
    dtype: str,
    sizes: dict[str, str],
    strides: dict[str, int | None],
    constexprs: dict[str, Any],
    tile: ConvTile,
    mode: str,
    last: bool,
) -> StaticCase:
    signature = {f"{name}_ptr": f"*{'fp32' if name in _FP32 else dtype}" for name in pointers}
    signature |= sizes | dict.fromkeys(strides, "i32") | dict.fromkeys(constexprs, "constexpr")
    odd = (
        "groups",
        "n_groups",
        "next_groups",
        "n_tiles",
        "n_row_tiles",
        "n_steps",
        "steps_a_split",
        "height",
        "n_taps",
    )
    # Of torch's own layout of a weight only the channels' strides differ from one, by 9 and 9 C.
    odd += () if last else ("stride_wc", "stride_wu")
    extents = f"{tile.rows}x{tile.columns}" + (f"x{tile.depth}" if tile.depth else "")
    return StaticCase(
        op=op,
        kernel=kernel,
        config=" ".join((extents, *words)),
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps if mode not in _SPLIT else tile.split_warps,
        aligned=tuple(
            n for n, type_ in signature.items() if n not in odd and (type_ == "i32" or type_.startswith("*"))
        ),
        uses=("group_statistics", "mlp", "row_products", *(("conv2d_fused",) if "backward" in op else ())),
        matrix_units=bool(mode),
    )
