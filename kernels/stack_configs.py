"""Which path a coupling stack takes, and its tile: one table by target, precision and size.

    stack     one launch for all layers: the rows stay on chip from the first layer to the last
    library   cuBLAS products, each layer's coupling one fused kernel

What decides is registers. A thread holds both halves of its rows in fp32, a hidden layer's
sums, its parts as operands, and the output's sums: ROWS (2 P + H + 2 P) / threads fp32 values
beside the operands' 255-register limit; and the weights' chunks lie in shared memory.
Every entry is compiled for its target in tests/static: no spill, shared memory within limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .stack_layout import padded_half, padded_hidden

__all__ = ["CONFIGS", "StackConfig", "StackEntry", "config_for", "stack_path", "target_of"]


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
    """The largest D, padded hidden width and number of linear layers that a tile is for."""

    features: int
    hidden: int
    n_linear: int
    config: StackConfig


# All weights of a layer in shared memory, the next layer's on their way.
_WHOLE = StackConfig(rows=64, num_warps=4, chunk=0, layer_stages=2, chunk_stages=1)
# Half the accumulators a thread, for two warpgroups on one wgmma of 64 rows.
_WIDE = StackConfig(rows=64, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
_WIDE_16 = StackConfig(rows=64, num_warps=8, chunk=16, layer_stages=1, chunk_stages=2)
_TF32 = StackConfig(rows=64, num_warps=4, chunk=32, layer_stages=1, chunk_stages=2)
# 32 rows: mma.sync in place of wgmma, a quarter of the registers for operands in parts.
_NARROW = StackConfig(rows=32, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)

# Tried in order.
CONFIGS: dict[tuple[str, str], tuple[StackEntry, ...]] = {
    ("sm_90", "fast"): (StackEntry(64, 128, 4, _WHOLE), StackEntry(128, 256, 4, _WIDE)),
    ("sm_90", "tf32"): (StackEntry(64, 128, 4, _TF32), StackEntry(128, 256, 3, _WIDE_16)),
    ("sm_90", "high"): (StackEntry(64, 128, 4, _NARROW),),
    ("sm_90", "exact"): (StackEntry(64, 128, 3, _NARROW),),
}
# CDNA3's matrix units have no tf32 that Triton gives: more than was asked for, then.
for _key in [key for key in CONFIGS if key[1] == "high" and key[0] == "gfx942"]:
    CONFIGS["gfx942", "tf32"] = CONFIGS[_key]

_TARGETS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


def target_of(x: Tensor) -> str | None:
    """The target whose table x's device uses; None for one that has no table.

    The interpreter has no target: it runs sm_90's tiles.
    """
    if not x.is_cuda:
        return "sm_90"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(x.device).gcnArchName
        return "gfx942" if name.startswith("gfx942") else None
    return _TARGETS.get(torch.cuda.get_device_capability(x.device))


def config_for(D: int, H: int, n_linear: int, precision: str, target: str | None) -> StackConfig | None:
    """The tile of a one-launch stack; None where there is none."""
    half, hidden = padded_half(D), padded_hidden(H)
    for entry in CONFIGS.get((target or "", precision), ()):
        if 2 * half <= max(entry.features, 32) and hidden <= entry.hidden and n_linear <= entry.n_linear:
            return entry.config
    return None


def stack_path(D: int, H: int, n_linear: int, precision: str, target: str | None) -> str:
    """ "stack" or "library": see the top of this file. H is the widest hidden layer."""
    return "library" if config_for(D, H, n_linear, precision, target) is None else "stack"
