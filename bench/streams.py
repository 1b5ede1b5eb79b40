"""``python -m linfast.bench.streams``: rows per second that ``sample_stream`` writes into memory.

A Linearizer of 64 features, sampled in one step, 8 couplings, hidden 128; its CUDA graph replayed, and each block
launched from Python. One line of JSON each.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence

import torch

import linfast as lf

from .arguments import default_device, device_from
from .cases.common import perturb
from .timing import time_interleaved

__all__ = ["main"]

FEATURES, DEPTH, HIDDEN, RANK = 64, 8, (128, 128), 8
BLOCK, ROWS = {"cpu": 2**8, "cuda": 2**14}, {"cpu": 2**10, "cuda": 2**23}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the lines and return 0."""
    parser = argparse.ArgumentParser(description="rows per second of sample_stream")
    parser.add_argument("--device", type=device_from, default=default_device())
    device: torch.device = parser.parse_args(arguments).device
    torch.manual_seed(0)
    f = lf.Linearizer(lf.coupling_flow(FEATURES, DEPTH, HIDDEN), lf.TimeLowRank(FEATURES, RANK)).to(device)
    perturb(f)
    block, rows = BLOCK[device.type], ROWS[device.type]
    out = torch.empty(rows, FEATURES)
    for name, captured in (("launched", False), ("captured", True)):

        def run(count: int, captured: bool = captured) -> None:
            lf.sample_stream(f, count, block, out[:count], block_size=block, cuda_graph=captured, progress=False)

        run(block)  # compiles and captures
        timing = time_interleaved({name: functools.partial(run, rows)}, rounds=1, warmup=0)[name]
        print(json.dumps({"stream": name, "rows_per_s": 1e3 * rows / timing.ms[0]}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
