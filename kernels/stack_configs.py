"""Decides by target, precision and size which kernels run a coupling stack, and with which tile.

    stack     one launch for all layers: the rows stay on chip from the first layer to the last
    layers    one launch for each linear layer: a product with its activation, or with the coupling
    library   cuBLAS products, each layer's coupling one fused kernel

Registers are the limit, 255 per thread. In a stack a thread holds ROWS (2 P + H + 2 P) / threads fp32 values: both
halves of its rows, the sums of a hidden layer and those of the output; and the hidden layer's parts as operands.
Chunks of the weights lie in shared memory. A small batch gets a tile of fewer rows, so that more multiprocessors
have work; the last bits of a row's result may depend on the tile. tests/static compiles every entry for its target
and checks that it fits shared memory and spills no registers, except as tests/static/allowed.py lists with reasons
for Triton 3.6 and 3.7.
"""

from __future__ import annotations

import functools
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


# Of an A100, an H100 or H200, a B200 and an MI300X: for the interpreter, and where code is compiled without a GPU.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# Tiles for small batches: fewer rows per program, so that more multiprocessors work. Then one program's chain of
# layers is the time, and not how often L2 is read: each program reads a layer's 57 KB, at 3.1 KB per clock for all
# of them together, 2,500 clocks for 132. In "fast" at D = 64, H = 128 on an H100, by the model of docs/roofline.md:
#
#     rows                            16       64      128
#     clocks per layer             2,000    2,000    3,600
#     of 132 programs              2,500    2,500    3,600
#     batches                   <= 2,112 <= 8,448     more
#     milliseconds, 16 layers      0.022    0.022    0.037
#     of 132 programs              0.026    0.026    0.037
#
# With three stages 64 rows take no longer than 16 or 32. With two, for n = 4, they take 3,000 clocks.
#
# A layer's weights are loaded while the layer before runs. With mma.sync that takes three stages: two have one
# buffer, which is filled only after its layer. 4 warps, not 8: each warp reads all rows' operands from shared
# memory.
_FEW_WHOLE = StackConfig(rows=16, num_warps=4, chunk=0, layer_stages=3, chunk_stages=1)
_HALF_WHOLE = StackConfig(rows=64, num_warps=4, chunk=0, layer_stages=2, chunk_stages=1)
_HALF_AHEAD = StackConfig(rows=64, num_warps=4, chunk=0, layer_stages=3, chunk_stages=1)
# Elsewhere chunks are loaded ahead: of 64 columns, so that a layer waits for L2 half as often as with 32. With 4
# warps H = 256 spills.
_FEW = StackConfig(rows=16, num_warps=8, chunk=64, layer_stages=1, chunk_stages=2)
# 8 waves of 64 threads would leave 256 registers per thread, and spill.
_CDNA_FEW = StackConfig(rows=16, num_warps=4, chunk=64, layer_stages=1, chunk_stages=2)


@dataclass(frozen=True)
class StackEntry:
    """A tile, and the largest padded D and hidden width, number of linear layers and kind of maps that it supports.

    ``linearizer`` says whether a whole Linearizer of such stacks fits one program too. ``smaller`` are tiles of
    fewer rows, fewest first, for batches that would leave multiprocessors without a program.
    """

    features: int
    hidden: int
    n_linear: int
    maps: int
    config: StackConfig
    linearizer: bool = True
    smaller: tuple[StackConfig, ...] = (_FEW,)

    def config_of(self, batch: int, multiprocessors: int) -> StackConfig:
        """The tile of the fewest rows with at most one program per multiprocessor; ``config`` where none has."""
        for config in self.smaller:
            if batch <= config.rows * multiprocessors:
                return config
        return self.config


@dataclass(frozen=True)
class LayersConfig:
    """A program's tile where each linear layer is a launch; the same for every batch.

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


# All weights of a layer are in shared memory (57 KB in bf16 at D = 64, H = 128, 115 KB in two parts) while the
# next layer's are loaded; two parts fill all of it. 128 rows in place of 64 halve the traffic of weights from L2.
# Not for dense maps: their own loop would keep Triton from pipelining the loop over layers.
_WHOLE = StackConfig(rows=128, num_warps=8, chunk=0, layer_stages=2, chunk_stages=1)
# With two stages Triton copies the next layer's weights after this one's last product and waits for them at once;
# with three they have a whole layer's time. Three layers of bf16 weights fit up to n = 3.
_AHEAD = StackConfig(rows=128, num_warps=8, chunk=0, layer_stages=3, chunk_stages=1)
# Chunks of 32 hidden columns: 64 sums per thread at H = 256, past which wgmma spills.
_WIDE = StackConfig(rows=64, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
# fp32 operands are twice as long: with chunks of 32 columns at H = 256 two registers spill.
_WIDE_16 = StackConfig(rows=64, num_warps=8, chunk=16, layer_stages=1, chunk_stages=2)
# As _WIDE with half the traffic of weights, and a chunk's time to load the next: at H = 128 threads have enough
# registers for 128 rows, and shared memory is enough for three stages.
_TALL = StackConfig(rows=128, num_warps=8, chunk=32, layer_stages=1, chunk_stages=3)
# Products of 32 rows: mma.sync in place of wgmma and tcgen05, with a quarter of the registers. Where 64 rows spill,
# or where operands in two parts exceed sm_100's tensor memory.
_NARROW = StackConfig(rows=32, num_warps=8, chunk=32, layer_stages=1, chunk_stages=2)
# Four warps: on mma.sync eight share 32 columns of a chunk in such a way that each product is made twice.
_FOUR_WARPS = StackConfig(rows=64, num_warps=4, chunk=32, layer_stages=1, chunk_stages=2)
_NARROW_FOUR = StackConfig(rows=32, num_warps=4, chunk=32, layer_stages=1, chunk_stages=2)
# On gfx942 they are waves of 64 threads, with 512 registers per thread.
_CDNA = StackEntry(64, 128, 4, DENSE, _FOUR_WARPS, smaller=(_CDNA_FEW,))

_FAST_WHOLE = (
    StackEntry(64, 128, 3, DIAGONAL, _AHEAD, smaller=(_FEW_WHOLE, _HALF_AHEAD)),
    StackEntry(64, 128, 4, DIAGONAL, _WHOLE, smaller=(_FEW_WHOLE, _HALF_WHOLE)),
)
# Operands in two parts: "high", and "exact" with scales.
_TWO_PARTS_80 = (StackEntry(64, 128, 3, DIAGONAL, _FOUR_WARPS), StackEntry(64, 128, 4, DENSE, _NARROW_FOUR))
_TWO_PARTS_90 = (
    StackEntry(64, 128, 3, DIAGONAL, _WHOLE, smaller=(_FEW, _FOUR_WARPS)),
    StackEntry(64, 128, 4, DENSE, _TALL, smaller=(_FEW, _NARROW)),
)
_TWO_PARTS_100 = (
    StackEntry(64, 128, 3, DIAGONAL, _WIDE, linearizer=False),
    StackEntry(64, 128, 4, DENSE, _NARROW),
)

# The first entry that supports the sizes is taken.
CONFIGS: dict[tuple[str, str], tuple[StackEntry, ...]] = {
    ("sm_80", "fast"): (
        StackEntry(64, 128, 4, DENSE, _WIDE),
        StackEntry(128, 256, 4, DIAGONAL, _WIDE),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_80", "tf32"): (StackEntry(64, 128, 4, DENSE, _WIDE), StackEntry(128, 256, 4, DENSE, _NARROW)),
    ("sm_80", "high"): _TWO_PARTS_80,
    ("sm_80", "exact"): _TWO_PARTS_80,
    ("sm_90", "fast"): (
        *_FAST_WHOLE,
        StackEntry(64, 128, 4, DENSE, _WIDE),
        StackEntry(128, 256, 4, DIAGONAL, _WIDE),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_90", "tf32"): (
        StackEntry(64, 128, 3, DIAGONAL, _TALL, smaller=(_FEW, _WIDE)),
        StackEntry(64, 128, 4, DENSE, _WIDE),
        StackEntry(128, 256, 3, NO_MAPS, _WIDE_16, linearizer=False),
        StackEntry(128, 256, 4, DENSE, _NARROW, linearizer=False),  # two launches take less: docs/roofline.md
    ),
    ("sm_90", "high"): _TWO_PARTS_90,
    ("sm_90", "exact"): _TWO_PARTS_90,
    ("sm_100", "fast"): (
        *_FAST_WHOLE,
        StackEntry(64, 128, 4, DENSE, _WIDE, linearizer=False),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_100", "tf32"): (
        StackEntry(64, 128, 3, DENSE, _WIDE, linearizer=False),
        StackEntry(128, 256, 4, DENSE, _NARROW),
    ),
    ("sm_100", "high"): _TWO_PARTS_100,
    ("sm_100", "exact"): _TWO_PARTS_100,
    ("gfx942", "fast"): (
        _CDNA,
        StackEntry(128, 256, 3, DIAGONAL, _FOUR_WARPS, smaller=(_CDNA_FEW,)),
    ),
    ("gfx942", "high"): (_CDNA,),
    ("gfx942", "exact"): (_CDNA,),
}

# Of operands in parts a thread holds two sums of a tile and the parts of x: 207 to 222 registers at 128 columns.
_PARTS = LayersConfig(columns=128, last_columns=128, depth=32)
# 256 columns read x half as often from L2, which is the limit (kernels/coupling_layers.py). A coupling's epilogue
# holds shift, log-scale and the moved half at once, and spills 96 to 659 bytes at 256 columns.
_ONE_PART = LayersConfig(columns=256, last_columns=128, depth=64)
_TF32 = LayersConfig(columns=256, last_columns=128, depth=32)
# mma.sync and a larger share of L2's rate than of memory's: 256 columns gain nothing.
_AMPERE = LayersConfig(columns=128, last_columns=128, depth=64)
_CDNA_LAYERS = LayersConfig(columns=128, last_columns=128, depth=32, stages=2)

# The largest padded D, hidden width and number of linear layers that run layer by layer. By the counts in
# kernels/coupling_layers.py this takes less time than the library at large batches, except for "tf32" on sm_100,
# where L2 alone takes 3.0 ms and the library 2.8. In "fast" there both take 1.6, and fused launches are fewer.
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
    ("sm_100", "exact"): _PARTS,
    ("gfx942", "fast"): _CDNA_LAYERS,
    ("gfx942", "high"): _CDNA_LAYERS,
    ("gfx942", "exact"): _CDNA_LAYERS,
}

# The widest hidden layers of a residual network in one launch (kernels/residual_stack.py), whose program holds two
# [ROWS, H] and the parts of a third in registers.
LARGEST_RESIDUAL = 128

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


def multiprocessors(x: Tensor) -> int:
    """Those of x's GPU; without a GPU those of the one whose tiles Triton's interpreter runs."""
    return _of_gpu(x.device.index) if x.device.type == "cuda" else _without_gpu()


def _without_gpu() -> int:
    return MULTIPROCESSORS[_target("cpu", None) or ""]


@functools.lru_cache(64)
def _of_gpu(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


# As torch.compiler.assume_constant_result marks it, but without importing Dynamo.
_target._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mode_on(target: str | None, precision: str) -> str:
    """The mode that runs: "high" in place of "tf32" on gfx942, which has no tf32 tiles."""
    return "high" if precision == "tf32" and target == "gfx942" else precision


def entry_for(
    D: int, H: int, n_linear: int, precision: str, target: str | None, maps: int = NO_MAPS, linearizer: bool = False
) -> StackEntry | None:
    """The tiles of a stack in one launch; None where no entry supports these sizes.

    H is the widest hidden layer, ``maps`` the densest kind of map between layers. With ``linearizer`` they are the
    tiles of two such stacks and A in one launch.
    """
    width, hidden = 2 * padded_hidden((D + 1) // 2), padded_hidden(H)
    for entry in CONFIGS.get((target or "", precision), ()):
        fits = width <= entry.features and hidden <= entry.hidden and n_linear <= entry.n_linear
        if fits and maps <= entry.maps and (entry.linearizer or not linearizer):
            return entry
    return None


def tiles_for(
    D: int, H: int, n_linear: int, precision: str, target: str | None, maps: int = NO_MAPS,
    gradients: bool = False,
) -> StackEntry | LayersConfig | None:  # fmt: skip
    """The tiles of one launch, where there are none that of a launch per linear layer, or None for the library.

    The library also where ``gradients`` are required: each program of the fused backward holds gradients of all
    weights, which leaves memory for few programs at the sizes that run layer by layer.
    """
    one = entry_for(D, H, n_linear, precision, target, maps)
    if one is not None or gradients:
        return one
    sizes = (2 * padded_hidden((D + 1) // 2), padded_hidden(H), n_linear)
    fits = all(size <= most for size, most in zip(sizes, LARGEST_LAYERS, strict=True)) and maps == NO_MAPS
    return LAYERS.get((target or "", precision)) if fits else None
