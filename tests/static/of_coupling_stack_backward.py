"""Static cases of the coupling stack's gradient: every kernel in every mode on the one tile, at its widest.

Activations, scale maps and the narrowest tile are compared in "exact", which takes the most registers.
"""

from __future__ import annotations

from typing import Any

from linfast.kernels.row_products import ADD, MULTIPLY, SET, TILE, tile_for

from linfast.ops.activations import ACTIVATION_NAMES
from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
from tests.static.cases import StaticCase

_FP32, _BF16 = 0, 2
# A mode's parts and their type, and what a hidden layer is kept in.
_MODES = {
    "fast": (1, _BF16, "bf16"),
    "tf32": (1, _FP32, "fp32"),
    "high": (2, _BF16, "fp32"),
    "exact": (3, _BF16, "fp32"),
}
_COUPLING_STRIDES = ("stride_moved", "stride_grad", "stride_d")


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    return [
        *(case for mode in _MODES for case in _of_mode(mode)),
        *(_hidden("exact", activation=name) for name in ACTIVATION_NAMES if name != "silu"),
        *(_coupling("exact", kind=kind) for kind in SCALE_MAP_KINDS if kind != "smooth"),
        _hidden("exact", width=16),
        _outer("exact", width=16),
    ]


def _of_mode(mode: str) -> list[StaticCase]:
    return [
        _hidden(mode),
        _coupling(mode),
        *(_linear(mode, combine) for combine in (ADD, MULTIPLY)),
        *([_linear(mode, SET)] if mode in ("high", "exact") else []),
        _outer(mode),
    ]


def _hidden(mode: str, activation: str = "silu", width: int = 64) -> StaticCase:
    return _product(
        "coupling_stack_backward", "_hidden_kernel", mode, f"{activation} {width}",
        {"bias_ptr": "*fp32", "h_ptr": f"*{_MODES[mode][2]}", "slope_ptr": "*fp32", "stride_h": "i32"},
        {"ACTIVATION": ACTIVATION_NAMES.index(activation)}, kept=True, width=width,
    )  # fmt: skip


def _coupling(mode: str, kind: str = "smooth") -> StaticCase:
    fp32 = ("bias", "moved", "grad", "grad_log_det", "d")
    signature = {f"{name}_ptr": "*fp32" for name in fp32} | dict.fromkeys(("n_moved", *_COUPLING_STRIDES), "i32")
    constexprs = {
        "stride_log_det": 1, "KIND": ScaleMap(kind).constexpr_id, "SCALE_FIRST": False, "INVERSE": False,
        "LOG_DET": True,
    }  # fmt: skip
    signature |= {"bound": "fp32", "floor": "fp32"}
    return _product("coupling_stack_backward", "_coupling_kernel", mode, kind, signature, constexprs, kept=False)


def _linear(mode: str, combine: int) -> StaticCase:
    words = {SET: "a map", ADD: "add", MULTIPLY: "multiply"}
    return _product(
        "row_products", "_linear_kernel", mode, words[combine],
        {"bias_ptr": "*fp32", "out_ptr": "*fp32", "stride_out": "i32"},
        {"BIAS": combine == SET, "COMBINE": combine}, kept=True, transposed=combine != SET,
    )  # fmt: skip


def _product(
    op: str,
    kernel: str,
    mode: str,
    name: str,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    kept: bool,
    transposed: bool = False,
    width: int = 64,
) -> StaticCase:
    """x W with W [K, N] a matrix's transpose, or with ``transposed`` the matrix; x is fp32 where ``kept``."""
    operand = "bf16" if mode == "fast" else "fp32"
    signature = {"x_ptr": "*fp32" if kept else f"*{operand}", "w_ptr": f"*{operand}"} | signature
    one, other = ("stride_wn", "stride_wk") if transposed else ("stride_wk", "stride_wn")
    signature |= dict.fromkeys(("n_rows", "n_inner", "stride_x", other), "i32")
    return _case(op, kernel, mode, name, signature, constexprs | {one: 1}, tile_for(width, width))


def _outer(mode: str, width: int = 64) -> StaticCase:
    signature = {
        "d_ptr": "*fp32",
        "x_ptr": f"*{_MODES[mode][2]}",
        "partial_ptr": "*fp32",
        "partial_bias_ptr": "*fp32",
    }
    sizes = ("n_rows", "rows_a_split", "n_columns", "stride_d", "stride_x", "stride_split")
    tile = tile_for(TILE.depth, width) | {"ROWS": width}
    return _case(
        "row_products", "_outer_kernel", mode, f"{width}", signature | dict.fromkeys(sizes, "i32"), {}, tile
    )


def _case(
    op: str,
    kernel: str,
    mode: str,
    name: str,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    tile: dict[str, int],
) -> StaticCase:
    parts, type_, _ = _MODES[mode]
    num_warps = tile.pop("num_warps")
    constexprs = constexprs | tile | {"PARTS": parts, "TYPE": type_}
    unaligned = ("n_rows", "n_moved", "bound", "floor")
    return StaticCase(
        op=op,
        kernel=kernel,
        config=f"{mode} {name}",
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=num_warps,
        aligned=tuple(n for n in signature if n not in unaligned),
        uses=("row_products", "mlp"),
        matrix_units=True,
    )
