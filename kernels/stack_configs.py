"""Decides by target, precision and size which kernels run a coupling stack, and with which tile.

    stack     one launch for all layers: the rows stay on chip from the first layer to the last
    layers    one launch for each linear layer: a product with its activation, or with the coupling
    library   cuBLAS products, each layer's coupling one fused kernel

Registers are the limit, 255 per thread. In a stack a thread holds ROWS (2 P + H + 2 P) / threads fp32 values: both
halves of its rows, the sums of a hidden layer and those of the output; and the hidden layer's parts as operands.
Chunks of the weights lie in shared memory. tests/static compiles every entry for its target and checks that it fits
shared memory and spills no registers, except as tests/static/allowed.py lists with reasons for Triton 3.6 and 3.7.
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
        rows: rows of x per program.
        num_warps: warps per program.
        chunk: hidden columns per step; 0 for all.
        layer_stages: pipeline stages of the loop over layers; 1 where the loop over chunks is pipelined.
        chunk_stages: pipeline stages of the loop over chunks.
    """

    rows: int
    num_warps: int
    chunk: int
    layer_stages: int
    chunk_stages: int


@dataclass(frozen=True)
class StackEntry:
    """A tile, and the largest padded D and hidden width, number of linear layers and kind of maps that it supports.

    ``linearizer`` says whether a whole Linearizer of such stacks fits one program too.
    """

    features: int
    hidden: int
    n_linear: int
    maps: int
    config: StackConfig
    linearizer: bool = True


@dataclass(frozen=True)
class LayersConfig:
    """A program's tile where each linear layer is a launch.

    Args:
        columns: of a hidden layer's output per program.
        last_columns: of the last layer's output per program.
        depth: columns of a layer's input per step.
        stages: pipeline stages of the loop over steps.
        rows: rows of x per program.
        num_warps: warps per program.
    """

    columns: int
    last_columns: int
    depth: int
    stages: int = 3
    rows: int = 128
    num_warps: int = 8


# All weights of a layer are in shared memory (57 KB in bf16 at D = 64, H = 128) while the next layer's are loaded.
# 128 rows in place of 64 halve the traffic of weights from L2. Not for dense maps: their own loop would keep Triton
# from pipelining the loop over layers.
_WHOLE = StackConfig(rows=128, num_warps=8, chunk=0, layer_stages=2, chunk_stages=1)
# Chunks of 32 hidden columns: 64 sums per thread at H = 256, past which wgmma spills.
_WIDE = StackConfig(rows=64, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
# fp32 operands are twice as long: with chunks of 32 columns at H = 256 two registers spill.
_WIDE_16 = StackConfig(rows=64, num_warps=8, chunk=16, layer_stages=1, chunk_stages=2)
# As _WIDE with half the traffic of weights: at H = 128 threads have enough registers for 128 rows.
_TALL = StackConfig(rows=128, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
# Products of 32 rows: mma.sync in place of wgmma and tcgen05, with a quarter of the registers. For operands in
# parts, where 64 rows spill 16 to 136 bytes on sm_90 and exceed sm_100's tensor memory (they need 768 columns of
# its 512), and for H = 256 where 64 rows spill.
_NARROW = StackConfig(rows=32, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
# Four waves of 64 threads, 512 registers per thread.
_CDNA = StackConfig(rows=64, num_warps=4, chunk=32, layer_stages=1, chunk_stages=2)

# The first entry that supports the sizes is taken.
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
    # With dense maps, or in a Linearizer, four registers spill.
    ("gfx942", "exact"): (StackEntry(64, 128, 3, DIAGONAL, _CDNA, linearizer=False),),
}

# Of operands in parts a thread holds two sums of a tile and the parts of x: 207 to 222 registers at 128 columns.
_PARTS = LayersConfig(columns=128, last_columns=128, depth=32)
# 256 columns read x half as often from L2, which is the limit (kernels/coupling_layers.py). A coupling's epilogue
# holds shift, log-scale and the moved half at once, and spills 96 to 659 bytes at 256 columns.
_ONE_PART = LayersConfig(columns=256, last_columns=128, depth=64)
_TF32 = LayersConfig(columns=256, last_columns=128, depth=32)
# mma.sync and a larger share of L2's rate than of memory's: 256 columns gain nothing.
_AMPERE = LayersConfig(columns=128, last_columns=128, depth=64)
# Six products at 128 columns exceed tensor memory: they need 768 of its 512 columns.
_TENSOR_MEMORY = LayersConfig(columns=64, last_columns=64, depth=32)
_CDNA_LAYERS = LayersConfig(columns=128, last_columns=128, depth=32, stages=2)

# The largest padded D, hidden width and number of linear layers that run layer by layer. By the counts in
# kernels/coupling_layers.py this takes less time than the library at large batches, except for "exact" on gfx942,
# whose fp32 matrix units, 163 TFLOP/s, take no longer than six bf16 products, and for "tf32" on sm_100, where L2
# alone takes 3.0 ms and the library 2.8. In "fast" there both take 1.6, and fused launches are fewer.
LARGEST_LAYERS = (256, 512, 4)
LAYERS: dict[tuple[str, str], LayersConfig] = {
    ("sm_80", "fast"): _AMPERE,
    ("sm_80", "tf32"): _PARTS,
    ("sm_80", "high"): _PARTS,
    ("sm_80", "exact"): _PARTS,
    ("sm_90", "fast"): _ONE_PART,
    ("sm_90", "tf32"): _TF32,
    ("sm_90", "high"): _PARTS,
    ("sm_90", "exact"): _PARTS,
    ("sm_100", "fast"): _ONE_PART,
    ("sm_100", "high"): _PARTS,
    ("sm_100", "exact"): _TENSOR_MEMORY,
    ("gfx942", "fast"): _CDNA_LAYERS,
    ("gfx942", "high"): _CDNA_LAYERS,
}

_TARGETS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


def target_of(x: Tensor) -> str | None:
    """The target whose tiles x's device uses; None for a GPU without an entry.

    Without a GPU it is sm_90, whose tiles Triton's interpreter runs.
    """
    return _target(x.device.type, x.device.index)


def _target(kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName
        return "gfx942" if name.startswith("gfx942") else None
    return _TARGETS.get(torch.cuda.get_device_capability(index))


# As torch.compiler.assume_constant_result marks it, but without importing Dynamo.
_target._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mode_on(target: str | None, precision: str) -> str:
    """The mode that runs: "high" in place of "tf32" on gfx942, which has no tf32 tiles."""
    return "high" if precision == "tf32" and target == "gfx942" else precision


def config_for(
    D: int, H: int, n_linear: int, precision: str, target: str | None, maps: int = NO_MAPS, linearizer: bool = False
) -> StackConfig | None:
    """The tile of a stack in one launch; None where no entry supports these sizes.

    H is the widest hidden layer, ``maps`` the densest kind of map between layers. With ``linearizer`` it is the
    tile of two such stacks and A in one launch.
    """
    width, hidden = 2 * padded_hidden((D + 1) // 2), padded_hidden(H)
    for entry in CONFIGS.get((target or "", precision), ()):
        fits = width <= entry.features and hidden <= entry.hidden and n_linear <= entry.n_linear
        if fits and maps <= entry.maps and (entry.linearizer or not linearizer):
            return entry.config
    return None


def layers_for(
    D: int, H: int, n_linear: int, precision: str, target: str | None, maps: int = NO_MAPS
) -> LayersConfig | None:
    """The tile of a stack that runs layer by layer, or None; arguments as in ``config_for``."""
    sizes = (2 * padded_hidden((D + 1) // 2), padded_hidden(H), n_linear)
    fits = all(size <= most for size, most in zip(sizes, LARGEST_LAYERS, strict=True)) and maps == NO_MAPS
    return LAYERS.get((target or "", precision)) if fits else None


def tile_of(
    D: int, H: int, n_linear: int, precision: str, target: str | None, maps: int = NO_MAPS
) -> StackConfig | LayersConfig | None:
    """The tile of one launch, where there is none that of a launch per linear layer, or None for the library."""
    one = config_for(D, H, n_linear, precision, target, maps)
    return layers_for(D, H, n_linear, precision, target, maps) if one is None else one
