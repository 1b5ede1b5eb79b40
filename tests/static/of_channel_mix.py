"""Static cases of channel_mix: every tile on NCHW and channels_last, exact fp32 and half precision."""

from __future__ import annotations

from typing import Any

from linfast.kernels.channel_mix import DOTS, UNROLLED, WEIGHTS, MixTile

from tests.static.cases import StaticCase

_FP32_POINTERS = ("dweight", "dbias")
_OPTIONS = {"MERGED": False, "INT64": False, "BIAS": True}


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    unrolled = [(min(widest, 15), tile) for widest, tile in UNROLLED]
    return [
        *(_unrolled(channels, tile) for channels, tile in [*unrolled, (3, UNROLLED[0][1]), (12, UNROLLED[1][1])]),
        *(_unrolled(*unrolled[1], dtype=dtype) for dtype in ("fp16", "bf16")),
        *(_dot(tile, last) for _, tile in DOTS for last in (False, True)),
        *(_dot(tile, dtype=dtype) for _, tile in DOTS for dtype in ("fp16", "bf16")),
        _dot(DOTS[2][1], transposed=True),
        *(_weight(tile, last) for _, tile in WEIGHTS for last in (False, True)),
        *(_weight(tile, dtype=dtype) for _, tile in WEIGHTS for dtype in ("fp16", "bf16")),
    ]


def _unrolled(channels: int, tile: MixTile, dtype: str = "fp32") -> StaticCase:
    constexprs = {**_OPTIONS, "N_IN": channels, "N_OUT": channels, "COLUMNS": tile.columns}
    name = f"C={channels} x{tile.columns} contiguous"
    return _case("_channel_mix_unrolled_kernel", name, "xy", False, False, tile, dtype, constexprs)


def _dot(tile: MixTile, last: bool = False, dtype: str = "fp32", transposed: bool = False) -> StaticCase:
    constexprs = {**_OPTIONS, "HALF": dtype != "fp32", "OUTPUTS": tile.outputs, "COLUMNS": tile.columns}
    constexprs["DEPTH"] = tile.depth
    name = f"{tile.outputs}x{tile.columns}x{tile.depth} {'channels_last' if last else 'contiguous'}"
    name += " transposed" if transposed else ""
    return _case("_channel_mix_dot_kernel", name, "xy", last, transposed, tile, dtype, constexprs)


def _weight(tile: MixTile, last: bool = False, dtype: str = "fp32") -> StaticCase:
    constexprs = {**_OPTIONS, "HALF": dtype != "fp32", "WEIGHT": True, "OUTPUTS": tile.outputs}
    constexprs["COLUMNS"] = tile.columns
    name = f"{tile.outputs}x{tile.columns} {'channels_last' if last else 'contiguous'}"
    return _case("_channel_mix_weight_kernel", name, "xg", last, False, tile, dtype, constexprs)


def _case(
    kernel: str,
    name: str,
    views: str,
    last: bool,
    transposed: bool,
    tile: MixTile,
    dtype: str,
    constexprs: dict[str, Any],
) -> StaticCase:
    pointers = ("x", "grad", "dweight", "dbias") if "weight" in kernel else ("x", "weight", "bias", "y")
    constexprs = {**constexprs, "MERGED": last}
    signature = {f"{p}_ptr": f"*{'fp32' if p in _FP32_POINTERS else dtype}" for p in pointers}
    signature |= dict.fromkeys(("n_columns", "n_positions"), "i32")
    if "unrolled" not in kernel:
        signature |= {"n_in": "i32", "n_out": "i32"}
    if "weight" in kernel:
        signature["n_chunks"] = "i32"
    else:
        signature |= {"stride_wo": "i32", "stride_wc": "i32", "stride_bo": "i32"}
        constexprs |= {"stride_bo": 1, "stride_wo" if transposed else "stride_wc": 1}
    for view in views:
        signature |= {f"stride_{view}{axis}": "i32" for axis in "bcp"}
        constexprs[f"stride_{view}{'c' if last else 'p'}"] = 1
    signature |= dict.fromkeys(constexprs, "constexpr")
    unaligned = ("n_chunks", *(() if tile.outputs >= 16 and "C=" not in name else ("stride_wo",)))
    return StaticCase(
        op="channel_mix",
        kernel=kernel,
        config=f"{name} {dtype}",
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        aligned=tuple(n for n, kind in signature.items() if kind != "constexpr" and n not in unaligned),
        matrix_units=dtype != "fp32" and "unrolled" not in kernel,
    )
