"""collapse at the size of CelebA, N = 12288, r = 8, RK4, 100 steps: seconds, memory and error; dense, extrapolated.

python -m linfast.bench.collapse_scale [N]
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

import linfast as lf

from .timing import peak_bytes

_RANK, _STEPS, _BATCH = 8, 100, 16
_SLICE = 1024  # rows of one dense product that are timed

_Result = TypeVar("_Result")


@torch.no_grad()
def main(n: int) -> None:
    torch.manual_seed(0)
    A, z = lf.TimeLowRank(n, _RANK).requires_grad_(False), torch.randn(_BATCH, n)
    weights = sum(p.numel() * p.element_size() for p in A.parameters())
    print(
        f"N = {n}, r = {_RANK}, {_STEPS} steps of RK4, {torch.get_num_threads()} thread(s); weights {_mb(weights)}"
    )
    resident = _resident()
    lf.collapse(A, _STEPS)  # warm, and before a dense matrix counts in the resident size
    grown = _resident() - resident
    exact_s, product_s = [], []
    for _ in range(3):  # in turn: what disturbs the machine disturbs both
        B, seconds = _timed(lambda: lf.collapse(A, _STEPS))
        exact_s.append(seconds)
        product_s.append(_dense_product(n))
    print(f"collapse: {min(exact_s):.2f} s (least of {[round(s, 2) for s in exact_s]}), {_form(B)}")
    tensors = peak_bytes(lambda: _first_row(lf.collapse(A, _STEPS)), (), torch.device("cpu"))
    print(f"memory: {_mb(tensors)} of tensors at the peak; resident size + {_mb(grown)}")
    dense = min(product_s) * (_STEPS - 1)
    ratios = sorted(p * (_STEPS - 1) / e for p, e in zip(product_s, exact_s, strict=True))
    print(
        f"dense, {_STEPS - 1} products, extrapolated from {_SLICE} rows of one: {dense:.0f} s and at least "
        f"{_mb(3 * 4 * n * n)}; ratio {ratios[1]:.0f} (from {ratios[0]:.0f} to {ratios[2]:.0f})"
    )
    less, seconds = _timed(lambda: lf.collapse(A, _STEPS, tol=1e-6))
    print(f"tol=1e-6: {seconds:.1f} s, {_form(less)}, truncation error {less.truncation_error:.1e}")
    f = lf.Linearizer(lf.Flow([], features=n), deepcopy(A).double())
    truth = lf.sample(f, z.double(), _STEPS, one_step=False)
    for name, operator in (("exact", B), ("tol=1e-6", less)):
        operator(z)
        y, seconds = _timed(partial(operator, z))
        error = float((y - truth).norm() / truth.norm())
        print(
            f"{name}: {_BATCH} samples in {1e3 * seconds:.1f} ms, relative error to the float64 steps {error:.1e}"
        )


def _dense_product(n: int) -> float:
    """Seconds of one N x N product, from a slice of its rows."""
    matrix, rows = torch.randn(n, n), torch.randn(min(_SLICE, n), n)
    return _timed(lambda: rows @ matrix)[1] * n / len(rows)


def _first_row(B: lf.LatentOperator) -> Tensor:
    """A tensor of no size to speak of, from B: what is measured returns tensors."""
    return next(B.buffers())[0]


def _form(B: lf.LatentOperator) -> str:
    return f"rank {B.U.shape[1]}" if isinstance(B, lf.LowRank) else type(B).__name__


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12288)
