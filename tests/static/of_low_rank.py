"""Static cases of low_rank: every tile of every kernel on dense fp32 factors; other layouts and dtypes on one."""

from __future__ import annotations

from typing import Any

from linfast.kernels.launch import power_of_two
from linfast.kernels.low_rank import MAX_SPLITS, TILES, choose_tile

from tests.static.cases import StaticCase

_ARGUMENTS = {
    "_project_kernel": (("x", "factor", "partial"), ("n_features", "n_batch_splits", "split_rows"), ("xb", "fb")),
    "_expand_kernel": (("x", "u", "partial", "y", "t"), ("n_features", "n_splits"), ("xb", "ub", "yb")),
    "_low_rank_backward_kernel": (
        ("x", "v", "t", "partial", "grad", "dx", "du", "dv"),
        ("n_in", "n_out", "n_splits"),
        ("xb", "vb", "tb", "gb"),
    ),
}
_ONES = {  # strides that are 1 for a contiguous tensor, and the factor's
    "_project_kernel": (("xn",), "f"),
    "_expand_kernel": (("xn", "yn"), "u"),
    "_low_rank_backward_kernel": (("xn", "tr", "gn"), "v"),
}
_FP32 = ("partial", "t")
# The largest rank of each tile; 128 loops over two blocks of the last one.
RANKS = [min(rank, 128) for rank, _ in TILES]


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    return [case for kernel in _ARGUMENTS for case in _of_kernel(kernel)]


def _of_kernel(kernel: str) -> list[StaticCase]:
    return [
        *(_case(kernel, rank) for rank in RANKS),
        _case(kernel, 5),
        _case(kernel, 8, dense=False),
        *(_case(kernel, 8, dtype=dtype) for dtype in ("fp16", "bf16")),
    ]


def _case(kernel: str, rank: int, dense: bool = True, dtype: str = "fp32") -> StaticCase:
    pointers, sizes, strides = _ARGUMENTS[kernel]
    ones, factor = _ONES[kernel]
    tile = choose_tile(rank)
    signature = {f"{name}_ptr": f"*{'fp32' if name in _FP32 else dtype}" for name in pointers}
    signature |= dict.fromkeys(sizes, "i32") | {f"stride_{name}": "i32" for name in strides}
    constexprs: dict[str, Any] = {f"stride_{name}": 1 for name in ones}
    signature[f"stride_{factor}n"] = "i32"
    if dense:
        constexprs[f"stride_{factor}r"] = 1
    else:
        signature[f"stride_{factor}r"] = "i32"
    constexprs |= {"RANK": rank, "DENSE": dense, "INT64": False, "ROWS": tile.rows, "RANKS": tile.ranks}
    if kernel != "_project_kernel":
        signature["alpha"] = "fp32"
        constexprs |= {"SPLITS": power_of_two(MAX_SPLITS), "ADD_X": True}
    if kernel == "_low_rank_backward_kernel":
        constexprs |= {"NEED_X": True, "NEED_U": True, "NEED_V": True}
    signature |= dict.fromkeys(constexprs, "constexpr")
    layout = ("contiguous" if rank % 4 == 0 else "odd") if dense else "strided"
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    if rank % 4 == 0:
        aligned += tuple(f"stride_{name}" for name in strides if name != "tb")
        aligned += tuple(name for name in ("n_features", "n_in", "n_out", "split_rows") if name in signature)
    return StaticCase(
        op="low_rank",
        kernel=kernel,
        config=f"{tile.rows}x{tile.ranks} rank {rank} {layout} {dtype}",
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        aligned=aligned,
    )
