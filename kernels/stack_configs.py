"""Which path a coupling stack takes, and its tile: one table by target, precision and size.

    stack     one launch for all layers: the rows stay on chip from the first layer to the last
    library   cuBLAS products, each layer's coupling one fused kernel

What decides is registers. A thread holds both halves of its rows in fp32, a hidden layer's
sums, its parts as operands, and the output's sums: ROWS (2 P + H + 2 P) / threads fp32 values
beside the operands' 255-register limit; and the weights' chunks lie in shared memory.
Every entry is compiled for its target in tests/static: shared memory within limits, and no spill but those that
tests/static/allowed.py says why they are left; Triton 3.6 spills where 3.7 does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .stack_spec import DENSE, DIAGONAL, NO_MAPS, padded_hidden


@dataclass(frozen=True)
class StackConfig:
    """A program's tile.

    Args:
        rows: of x.
        num_warps: warps.
        chunk: hidden columns at a time; 0 is all of them.
        layer_stages: how far the loop over layers loads ahead; 1 where the chunks' loop does.
        chunk_stages: how far the loop over chunks loads ahead.
    """

    rows: int
    num_warps: int
    chunk: int
    layer_stages: int
    chunk_stages: int


@dataclass(frozen=True)
class StackEntry:
    """A tile, and the largest D, padded hidden width, number of linear layers and kind of maps it is for.

    ``linearizer`` says whether a whole Linearizer of such stacks fits one program too.
    """

    features: int
    hidden: int
    n_linear: int
    maps: int
    config: StackConfig
    linearizer: bool = True


# A layer's weights whole in shared memory (57 KB in bf16 at D = 64, H = 128), the next layer's on
# their way while it runs; 128 rows halve the weights' traffic from L2. A dense map's own loop
# would stop the loop over layers from loading ahead.
_WHOLE = StackConfig(rows=128, num_warps=8, chunk=0, layer_stages=2, chunk_stages=1)
# Chunks of 32 hidden columns: 64 sums per thread at H = 256, past which wgmma spills.
_WIDE = StackConfig(rows=64, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
# fp32 operands are twice as long: with chunks of 32 columns at H = 256 two registers spill.
_WIDE_16 = StackConfig(rows=64, num_warps=8, chunk=16, layer_stages=1, chunk_stages=2)
# As _WIDE with half the weights' traffic: at H = 128 each thread has registers to spare for 128 rows.
_TALL = StackConfig(rows=128, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
# 32 rows a product: mma.sync in place of wgmma and tcgen05, a quarter of the registers. For operands
# in parts, where 64 rows spill 16 to 136 bytes on sm_90 and outgrow sm_100's tensor memory (768
# columns of 512), and for H = 256 where 64 rows spill.
_NARROW = StackConfig(rows=32, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
# Four waves of 64 threads, 512 registers per thread.
_CDNA = StackConfig(rows=64, num_warps=4, chunk=32, layer_stages=1, chunk_stages=2)

# Tried in order: the first that holds the sizes.
CONFIGS: dict[tuple[str, str], tuple[StackEntry, ...]] = {
    ("sm_80", "fast"): (
        StackEntry(64, 128, 4, DENSE, _WIDE),
        StackEntry(128, 256, 4, DIAGONAL, _WIDE),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_80", "tf32"): (StackEntry(64, 128, 4, DENSE, _WIDE), StackEntry(128, 256, 4, DENSE, _NARROW)),
    ("sm_80", "high"): (StackEntry(64, 128, 4, DENSE, _NARROW),),
    ("sm_80", "exact"): (StackEntry(64, 128, 3, DENSE, _NARROW),),
    ("sm_90", "fast"): (
        StackEntry(64, 128, 4, DIAGONAL, _WHOLE),
        StackEntry(64, 128, 4, DENSE, _WIDE),
        StackEntry(128, 256, 4, DIAGONAL, _WIDE),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_90", "tf32"): (
        StackEntry(64, 128, 3, DIAGONAL, _TALL),
        StackEntry(64, 128, 4, DENSE, _WIDE),
        StackEntry(128, 256, 3, NO_MAPS, _WIDE_16, linearizer=False),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_90", "high"): (StackEntry(64, 128, 4, DENSE, _NARROW),),
    ("sm_90", "exact"): (StackEntry(64, 128, 3, DENSE, _NARROW),),
    ("sm_100", "fast"): (
        StackEntry(64, 128, 4, DIAGONAL, _WHOLE),
        StackEntry(64, 128, 4, DENSE, _WIDE, linearizer=False),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_100", "tf32"): (
        StackEntry(64, 128, 3, DENSE, _WIDE, linearizer=False),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_100", "high"): (StackEntry(64, 128, 4, DENSE, _NARROW),),
    ("sm_100", "exact"): (StackEntry(64, 128, 3, DENSE, _NARROW),),
    ("gfx942", "fast"): (StackEntry(64, 128, 4, DENSE, _CDNA), StackEntry(128, 256, 3, DIAGONAL, _CDNA)),
    ("gfx942", "high"): (StackEntry(64, 128, 4, DENSE, _CDNA),),
    # With dense maps, or twice in a Linearizer, four registers spill.
    ("gfx942", "exact"): (StackEntry(64, 128, 3, DIAGONAL, _CDNA, linearizer=False),),
}

_TARGETS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


def target_of(x: Tensor) -> str | None:
    """The target whose table x's device uses; None for one that has no table.

    The interpreter has no target: it runs sm_90's tiles.
    """
    return _target(x.device.type, x.device.index)


def _target(kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName
        return "gfx942" if name.startswith("gfx942") else None
    return _TARGETS.get(torch.cuda.get_device_capability(index))


# What torch.compiler.assume_constant_result does, which would import Dynamo with linfast.
_target._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mode_on(target: str | None, precision: str) -> str:
    """The mode that runs: where the matrix units have no tf32, more than was asked for."""
    return "high" if precision == "tf32" and target == "gfx942" else precision


def config_for(
    D: int, H: int, n_linear: int, precision: str, target: str | None, maps: int = NO_MAPS, linearizer: bool = False
) -> StackConfig | None:
    """The tile of a one-launch stack; None where there is none.

    H is the widest hidden layer, maps the densest kind of map between layers; with
    ``linearizer`` the tile of two such stacks and A in one launch.
    """
    width, hidden = 2 * padded_hidden((D + 1) // 2), padded_hidden(H)
    for entry in CONFIGS.get((target or "", precision), ()):
        fits = width <= entry.features and hidden <= entry.hidden and n_linear <= entry.n_linear
        if fits and maps <= entry.maps and (entry.linearizer or not linearizer):
            return entry.config
    return None
