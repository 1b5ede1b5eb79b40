"""collapse at the size of CelebA, N = 12288, r = 8, RK4, 100 steps: seconds, memory and error; dense, extrapolated.

python -m linfast.bench.collapse_scale [N]
"""

from __future__ import annotations

import functools
import resource
import sys
from copy import deepcopy
from statistics import median

import torch

import linfast as lf

from .timing import peak_bytes, time_interleaved

_RANK, _STEPS, _BATCH = 8, 100, 16
_SLICE = 1024  # rows of one dense product that are timed
_CPU = torch.device("cpu")


@torch.no_grad()
def main(n: int) -> None:
    """Print all of it."""
    torch.manual_seed(0)
    A, z = lf.TimeLowRank(n, _RANK).requires_grad_(False), torch.randn(_BATCH, n)
    weights = sum(p.nbytes for p in A.parameters()) / 1e6
    print(f"N = {n}, {_STEPS} steps, {torch.get_num_threads()} thread(s); weights {weights:.0f} MB")
    operators, collapse = {}, functools.partial(lf.collapse, A, _STEPS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    operators["exact"] = collapse()  # before a dense matrix counts in the resident size
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    matrix, rows = torch.randn(n, n), torch.randn(min(_SLICE, n), n)
    timings = time_interleaved({"collapse": collapse, "dense": lambda: rows @ matrix}, rounds=3, warmup=0)
    products = (_STEPS - 1) * n / len(rows)
    ratios = sorted(products * d / c for d, c in zip(timings["dense"].ms, timings["collapse"].ms, strict=True))
    exact, tensors = operators["exact"], peak_bytes(collapse, (), _CPU) / 1e6
    form = f"rank {exact.U.shape[1]}" if isinstance(exact, lf.LowRank) else type(exact).__name__
    print(f"collapse: {min(timings['collapse'].ms) / 1e3:.2f} s, {form}")
    print(f"memory: {tensors:.0f} MB of tensors at the peak; resident size + {grown:.0f} MB")
    print(
        f"dense, {_STEPS - 1} products, extrapolated from {len(rows)} rows of one: "
        f"{products * min(timings['dense'].ms) / 1e3:.0f} s and at least {3 * matrix.nbytes / 1e6:.0f} MB; "
        f"ratio {median(ratios):.0f} (from {ratios[0]:.0f} to {ratios[-1]:.0f})"
    )
    operators["tol=1e-6"] = lf.collapse(A, _STEPS, tol=1e-6)
    f = lf.Linearizer(lf.Flow([], features=n), deepcopy(A).double())
    truth = lf.sample(f, z.double(), _STEPS, one_step=False)
    for name, operator in operators.items():
        timing = time_interleaved({name: operator}, [(z,)], rounds=1)[name]
        error = float((timing.last_outputs - truth).norm() / truth.norm())  # type: ignore[operator]
        print(f"{name}: {_BATCH} samples in {timing.ms[0]:.1f} ms, relative error to the float64 steps {error:.1e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12288)
