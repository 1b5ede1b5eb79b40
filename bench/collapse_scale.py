"""collapse at CelebA's size beside the dense products that it replaces: ``python -m linfast.bench.collapse_scale``.

N = 12288, rank 8, 100 RK4 steps. All dense products would take minutes, so a part of one is timed and multiplied.
"""

from __future__ import annotations

import torch

import linfast as lf

from .timing import peak_bytes, ratio, time_interleaved

N, RANK, STEPS = 12288, 8, 100
SLICE = 1024  # rows of one dense product that are timed


@torch.no_grad()
def main() -> None:
    """Print seconds, memory and the ratio."""
    torch.manual_seed(0)
    A = lf.TimeLowRank(N, RANK).requires_grad_(False)
    matrix, rows = torch.randn(N, N), torch.randn(SLICE, N)
    calls = {"collapse": lambda: lf.collapse(A, STEPS), "dense": lambda: rows @ matrix}
    timings = time_interleaved(calls, rounds=3, warmup=0)
    dense, collapse = timings["dense"].ms, timings["collapse"].ms
    peak = peak_bytes(calls["collapse"], (), torch.device("cpu"))
    products = (STEPS - 1) * N / SLICE
    print(f"collapse: {min(collapse) / 1e3:.2f} s, {peak / 1e6:.0f} MB of tensors at the peak")
    print(f"dense, {STEPS - 1} products, extrapolated: {products * min(dense) / 1e3:.0f} s")
    print(f"dense / collapse: {products * ratio(dense, collapse):.0f}, the median of {len(dense)}")


if __name__ == "__main__":
    main()
