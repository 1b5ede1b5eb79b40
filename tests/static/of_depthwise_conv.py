"""Static cases of depthwise_conv: both kernels, both layouts, kernels from 1 x 1 to 9 x 9."""

from __future__ import annotations

from typing import Any

from linfast.kernels.depthwise_conv import choose_tile

from tests.static.cases import StaticCase

_POINTERS = {
    "_depthwise_conv_kernel": ("x", "weight", "y"),
    "_depthwise_conv_weight_kernel": ("x", "grad", "partial"),
}
_VIEWS = {"_depthwise_conv_kernel": "xy", "_depthwise_conv_weight_kernel": "xg"}


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    return [case for kernel in _POINTERS for case in _of_kernel(kernel)]


def _of_kernel(kernel: str) -> list[StaticCase]:
    return [
        *(_case(kernel, (k, k), layout) for k in (1, 3, 4, 5, 7, 9) for layout in ("NCHW", "channels_last")),
        *(_case(kernel, (7, 7), layout, transpose=True) for layout in ("NCHW", "channels_last")),
        *(_case(kernel, (3, 3), "NCHW", dtype=dtype) for dtype in ("fp16", "bf16")),
        _case(kernel, (5, 2), "NCHW", channels=3, pixels=64),
    ]


def _case(
    kernel: str,
    size: tuple[int, int],
    layout: str,
    dtype: str = "fp32",
    transpose: bool = False,
    channels: int = 64,
    pixels: int = 4096,
) -> StaticCase:
    tile = choose_tile(channels, pixels, layout == "channels_last")
    signature = {f"{name}_ptr": f"*{'fp32' if name == 'partial' else dtype}" for name in _POINTERS[kernel]}
    signature |= dict.fromkeys(("n_blocks", "n_channels", "height", "width"), "i32")
    constexprs: dict[str, Any] = {}
    for view in _VIEWS[kernel]:
        signature |= {f"stride_{view}{axis}": "i32" for axis in "bchw"}
        constexprs[f"stride_{view}{'c' if layout == 'channels_last' else 'w'}"] = 1
    if "weight" in _POINTERS[kernel]:
        signature["kh"] = "i32"
        signature |= {f"stride_w{axis}": "i32" for axis in "bcuv"}
        constexprs["stride_wv"] = 1
    constexprs |= {"KH": size[0]} if "weight" not in _POINTERS[kernel] else {"kh": 1} if size[0] == 1 else {}
    constexprs |= {"KW": size[1], "TRANSPOSE": transpose, "INT64": False}
    constexprs |= {"CHANNELS": tile.rows, "PIXELS": tile.columns}
    signature |= dict.fromkeys(constexprs, "constexpr")
    strides = tuple(f"stride_{view}{axis}" for view in _VIEWS[kernel] for axis in "bchw")
    return StaticCase(
        op="depthwise_conv",
        kernel=kernel,
        config=f"{size[0]}x{size[1]} tile {tile.rows}x{tile.columns} {layout} {dtype}"
        + (" transpose" if transpose else ""),
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*"))
        + tuple(name for name in strides if signature[name] == "i32")
        + ("n_channels", "width"),
    )
