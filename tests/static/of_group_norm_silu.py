"""Static cases of group_norm_silu: both kernels, each tile budget, whole groups and walked ones, both layouts."""

from __future__ import annotations

from typing import Any

from linfast.kernels.group_norm_silu import choose_tile, choose_tile_backward

from tests.static.cases import StaticCase

_POINTERS = {
    "_group_norm_silu_kernel": ("x", "weight", "bias", "scale", "shift", "y", "mean", "rstd"),
    "_group_norm_silu_backward_kernel": (
        *("x", "weight", "bias", "scale", "shift", "mean", "rstd", "grad", "dx", "sum", "sum_h"),
    ),
}
_VIEWS = {"_group_norm_silu_kernel": "xy", "_group_norm_silu_backward_kernel": "xgd"}
_FP32 = ("weight", "bias", "mean", "rstd", "sum", "sum_h")

# (channels a group, positions): 1024, 4096, 8192 and 16384 elements, and more than any tile.
_GROUPS = ((16, 64), (4, 1024), (8, 1024), (16, 1024), (16, 4096), (2, 65536))


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    return [case for kernel in _POINTERS for case in _of_kernel(kernel)]


def _of_kernel(kernel: str) -> list[StaticCase]:
    return [
        *(_case(kernel, *group) for group in _GROUPS),
        *(_case(kernel, *group, dtype=dtype) for group in _GROUPS[-3:-1] for dtype in ("fp16", "bf16")),
        *(_case(kernel, *group, channels_last=True) for group in _GROUPS[:-1]),
        _case(kernel, 12, 1240),
        _case(kernel, 64, 1),
        _case(kernel, 16, 1024, affine=False, embedded=False),
        _case(kernel, 16, 4096, embedded=False, activation=False),
    ]


def _case(
    kernel: str,
    per_group: int,
    count: int,
    channels_last: bool = False,
    dtype: str = "fp32",
    affine: bool = True,
    embedded: bool = True,
    activation: bool = True,
) -> StaticCase:
    backward = "backward" in kernel
    tile = (choose_tile_backward if backward else choose_tile)(per_group, count, channels_last or count == 1)
    one_tile = tile.rows >= per_group and tile.columns >= count
    absent = (() if affine else ("weight_ptr", "bias_ptr")) + (() if embedded else ("scale_ptr", "shift_ptr"))
    signature = {f"{name}_ptr": f"*{'fp32' if name in _FP32 else dtype}" for name in _POINTERS[kernel]}
    constexprs: dict[str, Any] = dict.fromkeys(absent)
    signature |= {"count": "i32", "stride_sb": "i32", "stride_sc": "i32"}
    constexprs |= {"stride_sc": 1} if embedded else {}
    for view in _VIEWS[kernel]:
        signature |= {f"stride_{view}{axis}": "i32" for axis in "bcp"}
        constexprs[f"stride_{view}{'c' if channels_last or count == 1 else 'p'}"] = 1
    constexprs |= {"count": 1, **{f"stride_{view}p": 1 for view in _VIEWS[kernel]}} if count == 1 else {}
    signature |= {} if backward else {"eps": "fp32"}
    constexprs |= {"ACTIVATION": activation, "ONE_TILE": one_tile, "INT64": False, "PER_GROUP": per_group}
    constexprs |= {"CHANNELS": tile.rows, "POSITIONS": tile.columns}
    constexprs |= {"SUMS": True, "INPUT": True} if backward else {}
    signature |= dict.fromkeys(constexprs, "constexpr")
    runs = "contiguous" if count % 16 == 0 and not channels_last else "channels_last" if channels_last else "uneven"
    options = [
        *([] if affine else ["no affine"]),
        *([] if embedded else ["no embedding"]),
        *([] if activation else ["no activation"]),
    ]
    return StaticCase(
        op="group_norm_silu",
        kernel=kernel,
        config=" ".join((f"{per_group}x{count}", f"tile {tile.rows}x{tile.columns}", runs, dtype, *options)),
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*"))
        + tuple(
            name
            for name, kind in signature.items()
            if kind == "i32"
            and (name != "count" or count % 16 == 0)
            and (count % 16 == 0 or not name.endswith("c"))
        ),
    )
