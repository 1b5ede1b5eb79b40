"""Static cases of affine_coupling: every tile both ways in fp32, every scale map and other dtype on one tile."""

from __future__ import annotations

from typing import Any

from linfast.kernels.affine_coupling import TILES

from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
from tests.static.cases import StaticCase

_BOUNDS = ("n_rows", "n_outer", "outer_moved", "inner_moved", "outer_kept", "inner_kept")
_POINTERS = {
    "_affine_coupling_kernel": ("moved", "kept", "shift", "raw", "y_moved", "y_kept", "partial"),
    "_affine_coupling_backward_kernel": (
        *("y", "shift", "raw", "grad_moved", "grad_kept", "grad_log_det"),
        *("dx_moved", "dx_kept", "dshift", "draw"),
    ),
}
_VIEWS = {"_affine_coupling_kernel": "xpy", "_affine_coupling_backward_kernel": "ypgxq"}


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    return [case for kernel in _POINTERS for case in _of_kernel(kernel)]


def _of_kernel(kernel: str) -> list[StaticCase]:
    widest = TILES[-1][1]
    return [
        *(_case(kernel, tile, inverse=inverse) for _, tile in TILES for inverse in (False, True)),
        *(_case(kernel, widest, kind=kind, scale_first=True) for kind in SCALE_MAP_KINDS),
        *(_case(kernel, widest, dtype=dtype) for dtype in ("fp16", "bf16")),
    ]


def _case(
    kernel: str,
    tile: Any,
    inverse: bool = False,
    kind: str = "smooth",
    dtype: str = "fp32",
    scale_first: bool = False,
) -> StaticCase:
    fp32_pointers = ("partial", "grad_log_det")
    signature = {f"{name}_ptr": f"*{'fp32' if name in fp32_pointers else dtype}" for name in _POINTERS[kernel]}
    signature |= dict.fromkeys(_BOUNDS, "i32")
    constexprs: dict[str, Any] = {}
    for view in _VIEWS[kernel]:
        signature |= {f"stride_{view}b": "i32", f"stride_{view}o": "i32", f"stride_{view}i": "constexpr"}
        constexprs[f"stride_{view}i"] = 1
    if "backward" in kernel:
        signature["stride_hb"] = "constexpr"
        constexprs["stride_hb"] = 1
    signature |= {"bound": "fp32", "floor": "fp32"}
    constexprs |= {
        "KIND": ScaleMap(kind).constexpr_id,
        "SCALE_FIRST": scale_first,
        "INVERSE": inverse,
        "LOG_DET": True,
        "INT64": False,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }
    signature |= {name: "constexpr" for name in constexprs if name not in signature}
    direction = "inverse" if inverse else "forward"
    order = "scale first" if scale_first else "shift first"
    return StaticCase(
        op="affine_coupling",
        kernel=kernel,
        config=f"{tile.rows}x{tile.columns} contiguous {direction} {kind} {order} {dtype}",
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        aligned=tuple(name for name, kind_ in signature.items() if kind_.startswith("*"))
        + tuple(f"stride_{view}{axis}" for view in _VIEWS[kernel] for axis in "bo")
        + ("inner_moved", "inner_kept"),
    )
