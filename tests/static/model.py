"""A model of the time of a launch of a coupling stack, from counts of its compiled code (tests/static/layers.tsv).

An iteration of the loop over layers has a bound for each unit of a multiprocessor, in clocks of one program. With
the counts of layers.tsv per row, for all rows of the program:

    issue     instructions / 4             four schedulers, which each issue one warp instruction per clock
    MUFU      32 mufu / 16                 sixteen special functions per clock
    matrix    2 products / rate            mma.sync at 0.6 of wgmma's measured rate (MMA_SYNC); tf32 at half
    shared    shared_bytes / 128           and the operands that wgmma reads there, once for 64 rows
    L2        weights / rate               the multiprocessor's share of L2's rate, at most 64 bytes per clock

The floor is the largest of them for all layers, or device memory's time for x and y. The prediction adds what does
not overlap. Matrix units and the other units work in turn: half of the time of the shorter is added to that of the
longer (IN_TURN). Where a layer waits for weights, LATENCY and the copy's time at 64 bytes per clock are added, less
the instructions that run beside the copy. Where P programs run on a multiprocessor at once, a P-th of both is
added. The core is added by its instructions, and START for a launch. Programs run in ceil(programs / SMs) rounds.

IN_TURN, LATENCY, START and MMA_SYNC are assumptions, the same for all modes and sizes; no GPU has been measured.
The other rates are of data sheets or were measured by others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.static.layers import Row

IN_TURN = 0.5
LATENCY = 500  # clocks until the first bytes from L2 when other programs read it too
START = 3e-6  # seconds: a launch, and the first access to memory
MMA_SYNC = 0.6
FP32 = 50e12  # operations per second of cuBLAS in fp32, 0.85 of what 128 units per multiprocessor could
LAYERS = 16  # 8 + 8
FLAGSHIP = 1 << 20  # rows


@dataclass(frozen=True)
class Gpu:
    """Rates per second: bytes of device memory and of L2, and operations of products by wgmma in bf16."""

    name: str
    memory: float
    sms: int = 132
    clock: float = 1.755e9
    l2: float = 5.5e12
    bf16: float = 790e12
    shared: int = 233_472  # bytes per multiprocessor
    registers: int = 65_536


H100, H200 = Gpu("H100", 3.35e12), Gpu("H200", 4.8e12)


class Prediction:
    """The seconds that a launch takes, and why: ``bounds`` by unit, ``waiting``, ``floor`` and ``time``.

    ``held_by`` names the two largest parts of ``time``, the larger one first.

    Args:
        row: of layers.tsv.
        gpu: a GPU of the row's target.
        batch: rows of x.
        layers: of all stacks together.
        bytes_per_row: of x and y in device memory.
    """

    def __init__(self, row: Row, gpu: Gpu, batch: int, layers: int = LAYERS, bytes_per_row: int = 512) -> None:
        rows, warps = int(row["rows"]), int(row["warps"])
        programs, schedulers = math.ceil(batch / rows), min(4, warps)
        active, rounds = min(programs, gpu.sms), math.ceil(programs / gpu.sms)
        at_once = min(rounds, at_a_time(row, gpu))
        n = {name: float(row[name]) for name in ("instructions", "mufu", "products", "shared_bytes", "around")}
        clocks, weights = _clocks(row, n, rows, schedulers, gpu), float(row["weights"])
        clocks["L2"] = weights / min(64, gpu.l2 / gpu.clock / active)
        groups = [max(pair, key=clocks.__getitem__) for pair in (("issue", "MUFU"), ("matrix", "shared"))]
        longer, shorter = sorted(groups, key=clocks.__getitem__, reverse=True)
        waits, beside = float(row["waits"]), float(row["beside"]) * warps / schedulers
        waiting = waits * max(0, LATENCY + weights / max(waits, 1) / 64 - beside)
        parts = {longer: clocks[longer], shorter: IN_TURN * clocks[shorter] / at_once, "waiting": waiting / at_once}
        seconds = rounds * layers / gpu.clock  # per clock of a layer
        self.bounds = {"memory": batch * bytes_per_row / gpu.memory} | {k: v * seconds for k, v in clocks.items()}
        self.waiting = parts["waiting"] * seconds
        self.floor = max(self.bounds.values())
        around = rounds * n["around"] * rows / schedulers / gpu.clock
        in_turn = sum(parts.values()) * seconds
        self.time = START + max(self.bounds["memory"], max(in_turn, self.bounds["L2"]) + around)
        transfer = max(("memory", "L2"), key=self.bounds.__getitem__)
        largest = sorted(parts, key=parts.__getitem__, reverse=True)[:2]
        self.held_by = transfer if self.bounds[transfer] > in_turn else ", ".join(largest)


def _clocks(row: Row, n: dict[str, float], rows: int, schedulers: int, gpu: Gpu) -> dict[str, float]:
    """Bounds of one program and layer, but L2's."""
    wgmma, itemsize = float(row["wgmma"]) > 0, 4 if row["type"] == "fp32" else 2
    rate = gpu.bf16 / gpu.sms / gpu.clock * 2 / itemsize * (1 if wgmma else MMA_SYNC)
    operands = n["products"] / 64 * itemsize if wgmma else 0
    return {
        "issue": n["instructions"] * rows / schedulers,
        "MUFU": n["mufu"] * rows * 32 / 16,
        "matrix": 2 * n["products"] * rows / rate,
        "shared": (n["shared_bytes"] + operands) * rows / 128,
    }


def at_a_time(row: Row, gpu: Gpu) -> int:
    """Programs that fit one multiprocessor."""
    threads, registers = 32 * int(row["warps"]), -(-int(row["registers"]) // 8) * 8
    return min(gpu.registers // (registers * threads), gpu.shared // (int(row["shared"]) + 1024), 2048 // threads)


def eager(mode: str, gpu: Gpu, fused: bool = False, D: int = 64, H: int = 128) -> float:
    """Seconds of FLAGSHIP rows in plain torch, layer by layer, with device memory at 0.9 of its rate.

    Per row and layer the products read and write 3 D / 2 + 4 H numbers, activations 4 H, and the coupling 21 D / 2:
    the bound of the scales, exp, multiplication, addition, and concatenation. ``fused``: the coupling as one
    kernel, 4 D, as by torch.compile or on the library path. Products run at FP32 in "exact" and "high".
    """
    rate = {"fast": gpu.bf16, "tf32": gpu.bf16 / 2}.get(mode, FP32)
    per_number = LAYERS * FLAGSHIP * (2 if mode == "fast" else 4) / gpu.memory / 0.9
    multiply_adds = D * H // 2 + H * H + H * D
    products = max(2 * multiply_adds * LAYERS * FLAGSHIP / rate, (3 * D / 2 + 4 * H) * per_number)
    return products + (4 * H + (4 if fused else 10.5) * D) * per_number
