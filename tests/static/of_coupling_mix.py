"""Static cases of coupling_mix: every tile of every kernel, layouts and directions, fp32 and half precision."""

from __future__ import annotations

from typing import Any

from linfast.kernels.channel_mix import MixTile
from linfast.kernels.coupling_mix import DOTS, UNROLLED
from linfast.kernels.coupling_mix_backward import BACKWARD_DOTS

from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
from tests.static.cases import StaticCase

_COUPLED = ("shift", "raw")
_POINTERS = {
    "_coupling_mix_unrolled_kernel": ("x", *_COUPLED, "weight", "bias", "y", "partial"),
    "_coupling_mix_dot_kernel": (
        *("moved", "kept", *_COUPLED, "weight_moved", "weight_kept", "bias", "y", "partial"),
    ),
    "_coupling_mix_backward_unrolled_kernel": (
        *("x", *_COUPLED, "weight", "grad", "h", "dx", "dshift", "draw", "u"),
    ),
    "_coupling_mix_backward_dot_kernel": (
        *("moved", "kept", *_COUPLED, "weight_moved", "weight_kept", "grad", "h", "dx_moved", "dx_kept"),
        *("dshift", "draw", "u_moved", "u_kept"),
    ),
}
_FP32_POINTERS = ("partial", "h")
_OTHER_DTYPES = ("fp16", "bf16")


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    unrolled, dot, backward_unrolled, backward_dot = _POINTERS
    last = DOTS[2][1]
    return [
        *(case for kernel, table in ((unrolled, UNROLLED), (backward_unrolled, UNROLLED))
          for case in _of_unrolled(kernel, table)),
        *(case for kernel, table in ((dot, DOTS), (backward_dot, BACKWARD_DOTS))
          for case in _of_dot(kernel, table)),
        *(_case(dot, last, kind=kind, scale_first=True) for kind in SCALE_MAP_KINDS),
        *(_case(backward_dot, BACKWARD_DOTS[-1][1], kind=kind, scale_first=True) for kind in SCALE_MAP_KINDS),
        _case(backward_dot, BACKWARD_DOTS[-1][1], keep_u=False),
    ]  # fmt: skip


def _of_unrolled(kernel: str, table: tuple[tuple[int, MixTile], ...]) -> list[StaticCase]:
    tiles = [(min(widest, 15), tile) for widest, tile in table]
    return [
        *(_case(kernel, tile, channels) for channels, tile in [*tiles, (12, table[-1][1])]),
        *(_case(kernel, *reversed(tiles[-1]), dtype=dtype) for dtype in _OTHER_DTYPES),
        _case(kernel, *reversed(tiles[0]), inverse=True),
    ]


def _of_dot(kernel: str, table: tuple[tuple[int, MixTile], ...]) -> list[StaticCase]:
    return [
        *(_case(kernel, tile, last=last) for _, tile in table for last in (False, True)),
        *(_case(kernel, tile, dtype=dtype) for _, tile in table for dtype in _OTHER_DTYPES),
        _case(kernel, table[-1][1], inverse=True),
    ]


def _case(
    kernel: str,
    tile: MixTile,
    channels: int = 0,
    last: bool = False,
    dtype: str = "fp32",
    inverse: bool = False,
    kind: str = "smooth",
    scale_first: bool = False,
    keep_u: bool = True,
) -> StaticCase:
    """``channels`` of the unrolled kernels, which are compiled for each."""
    backward = "backward" in kernel
    signature = {f"{p}_ptr": f"*{'fp32' if p in _FP32_POINTERS else dtype}" for p in _POINTERS[kernel]}
    signature |= dict.fromkeys(("n_columns", "n_positions"), "i32") | {"bound": "fp32", "floor": "fp32"}
    constexprs: dict[str, Any] = {"stride_wc": 1, "stride_hb" if backward else "stride_bo": 1}
    signature["stride_wo"] = "i32"
    for view in "xpgdq" if backward else "xpy":
        signature |= {f"stride_{view}{axis}": "i32" for axis in "bcp"}
        constexprs[f"stride_{view}{'c' if last else 'p'}"] = 1
    constexprs |= {"KIND": ScaleMap(kind).constexpr_id, "SCALE_FIRST": scale_first, "INVERSE": inverse}
    constexprs |= {"LOG_DET": True, "MERGED": last, "INT64": False, "COLUMNS": tile.columns}
    constexprs |= {"KEEP_U": keep_u} if backward else {"BIAS": True, "GROUP": min(16, tile.columns)}
    if channels:
        constexprs |= {"N_IN": channels, "N_OUT": channels, "MOVES_SECOND": False}
        name = f"C={channels} x{tile.columns}"
    else:
        signature |= dict.fromkeys(("n_moved", "n_kept", "n_out"), "i32")
        constexprs |= {"HALF": dtype != "fp32", "OUTPUTS": tile.outputs, "DEPTH": tile.depth}
        name = f"{tile.outputs}x{tile.columns}x{tile.depth}"
    signature |= dict.fromkeys(constexprs, "constexpr")
    words = [name, "channels_last" if last else "contiguous", "inverse" if inverse else "forward", kind]
    words += ["scale first" if scale_first else "shift first", *([] if keep_u else ["dx only"]), dtype]
    unaligned = ("stride_wo", "bound", "floor") if channels else ("bound", "floor")
    return StaticCase(
        op="coupling_mix_backward" if backward else "coupling_mix",
        kernel=kernel,
        config=" ".join(words),
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        aligned=tuple(n for n, type_ in signature.items() if type_ != "constexpr" and n not in unaligned),
        uses=("affine_coupling", "channel_mix", *(("coupling_mix",) if backward else ())),
        matrix_units=not channels and dtype != "fp32",
    )
