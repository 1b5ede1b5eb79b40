"""Static cases of coupling_stack and linearizer_stack: every tile of the table on the target it ships for.

An entry is compiled three times at its largest sizes: forward with three linear layers and no
maps, which is the common flow; inverse with as many layers and as dense maps as it is for; and
as a Linearizer with a dense A. Activations are compared on one tile each of "fast" and "exact".
"""

from __future__ import annotations

from typing import Any

from linfast.kernels.stack_configs import CONFIGS, StackEntry
from linfast.kernels.stack_layout import N_PARTS, NO_MAPS, StackLayout, map_parts

from linfast.ops.activations import ACTIVATION_NAMES
from tests.static.cases import StaticCase

_USES = ("mlp", "coupling_stack", "stack_layout")
_MAP_NAMES = ("no maps", "diagonal maps", "dense maps")
_SMOOTH = 2
_SIZES = ("n_batch", "n_first", "n_second")


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    entries = [(target, mode, entry) for (target, mode), entries in CONFIGS.items() for entry in entries]
    shown = [(t, m, entries[0]) for (t, m), entries in CONFIGS.items() if t == "sm_90" and m in ("fast", "exact")]
    return [
        *(_stack(*key, inverse=False, n_linear=min(3, key[2].n_linear), maps=NO_MAPS) for key in entries),
        *(_stack(*key, inverse=True, n_linear=key[2].n_linear, maps=key[2].maps) for key in entries),
        *(_linearizer(*key) for key in entries if key[2].linearizer),
        *(
            _stack(*key, inverse=False, n_linear=3, maps=NO_MAPS, activation=name)
            for key in shown
            for name in ACTIVATION_NAMES
            if name != "silu"
        ),
    ]


def _stack(
    target: str, mode: str, entry: StackEntry, inverse: bool, n_linear: int, maps: int, activation: str = "silu"
) -> StaticCase:
    layout = StackLayout(entry.features, n_linear, entry.hidden, maps, False)
    signature = _pointers("x", "y", "log_det", "weights", "operands", "map_operands", mode=mode)
    signature |= dict.fromkeys((*_SIZES, "n_layers", "part_stride", "row_stride", "map_part_stride"), "i32")
    signature |= {"stride_xb": "i32", "stride_yb": "i32", "bound": "fp32", "floor": "fp32"}
    constexprs = _constexprs(target, mode, entry, layout, activation) | {
        "MOVES_SECOND": 0, "INVERSE": inverse, "LOG_DET": True, "MAPS": maps, "HEAD": 0, "ROW_SIZE": layout.row_size
    }  # fmt: skip
    name = f"{'inverse' if inverse else 'forward'} n={n_linear} {_MAP_NAMES[maps]} {activation}"
    return _case("coupling_stack", target, mode, entry, name, signature, constexprs)


def _linearizer(target: str, mode: str, entry: StackEntry) -> StaticCase:
    layout = StackLayout(entry.features, min(3, entry.n_linear), entry.hidden, NO_MAPS, False)
    stacks = [f"{name}_{side}" for side in "xy" for name in ("weights", "operands", "map_operands")]
    signature = _pointers("x", "y", *stacks, "core", "core_operands", mode=mode)
    strides = [f"{name}_{side}" for side in "xy" for name in ("part_stride", "row_stride", "map_part_stride")]
    signature |= dict.fromkeys((*_SIZES, "n_layers_x", "n_layers_y", *strides, "core_part_stride"), "i32")
    signature |= {"stride_xb": "i32", "stride_yb": "i32"}
    signature |= {f"{name}_{side}": "fp32" for side in "xy" for name in ("bound", "floor")}
    sides = {f"{name}_{side}": 0 for side in "XY" for name in ("MOVES_SECOND", "MAPS", "HEAD")}
    sides |= dict.fromkeys(("ROW_SIZE_X", "ROW_SIZE_Y"), layout.row_size)
    constexprs = _constexprs(target, mode, entry, layout, "silu") | sides | {"DENSE": True}
    return _case("linearizer_stack", target, mode, entry, "linearizer n=3 silu", signature, constexprs)


def _pointers(*names: str, mode: str) -> dict[str, str]:
    def kind(name: str) -> str:
        if "map_operands" in name or "core_operands" in name:
            return "*bf16"
        return "*bf16" if "operands" in name and mode != "tf32" else "*fp32"

    return {f"{name}_ptr": kind(name) for name in names}


def _constexprs(target: str, mode: str, entry: StackEntry, layout: StackLayout, activation: str) -> dict[str, Any]:
    config, fast = entry.config, mode in ("tf32", "fast")
    return {
        "stride_xd": 1, "N_LINEAR": layout.n_linear, "ACTIVATION": ACTIVATION_NAMES.index(activation),
        "FORM": (1 if target == "gfx942" else 2) if fast else 0, "KIND": _SMOOTH, "SCALE_FIRST": False,
        "MATRIX_SIZE": layout.matrix_size, "MAP_OFFSET": layout.map_offset, "ROWS": config.rows,
        "HALF": layout.half, "HIDDEN": layout.hidden, "CHUNK": config.chunk or layout.hidden,
        "PARTS": N_PARTS[mode], "MAP_PARTS": map_parts(mode), "LAYER_STAGES": config.layer_stages,
        "CHUNK_STAGES": config.chunk_stages, "INT64": False,
    }  # fmt: skip


def _case(
    op: str,
    target: str,
    mode: str,
    entry: StackEntry,
    name: str,
    signature: dict[str, str],
    constexprs: dict[str, Any],
) -> StaticCase:
    config = entry.config
    tile = f"{config.rows}x{config.chunk or entry.hidden} w{config.num_warps}"
    limits = f"to {_MAP_NAMES[entry.maps]} n={entry.n_linear}"
    unaligned = ("n_batch", "n_layers", "n_layers_x", "n_layers_y")
    return StaticCase(
        op=op,
        kernel=f"_{op}_kernel",
        config=f"D={entry.features} H={entry.hidden} {mode} {name} {tile} {limits}",
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=config.num_warps,
        aligned=tuple(n for n, kind in signature.items() if kind != "fp32" and n not in unaligned),
        uses=_USES,
        targets=(target,),
        matrix_units=True,
    )
