"""A first check of every kernel on a GPU: one line of JSON with its verdict, as soon as it is known.

    python -m tests.gpu.smoke op:coupling_stack      small, odd edges: each direction, mode and dtype, gradients
    python -m tests.gpu.smoke case:coupling_stack    sizes that are timed (fewer rows): each direction and mode
    python -m tests.gpu.smoke models                 streams, densities and accelerated models
    python -m tests.gpu.smoke op:low_rank --part 1/4 the second quarter of its lines, in turn

The truth is float64 in plain torch. The tolerances are fixed here, far above rounding and far
below the error of a wrong kernel; exact budgets are in the tests. On a CPU the kernels are interpreted
(TRITON_INTERPRET=1), at tiny sizes and without bf16. The exit status is 1 where a verdict is wrong.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from linfast.bench.cases import CASES, common
from linfast.bench.cases.common import in_precision
from linfast.bench.harness import Case, Options, Size
from linfast.bench.rounding import relative_error
from linfast.bench.standard import Verdict, judge, own_standard

import linfast as lf
from linfast.precision import PRECISIONS
from tests.machine_code.cases import all_cases
from tests.machine_code.check import exact, outputs_and_gradients, values_of
from tests.machine_code.variants import Variant, variants

# Relative L2 by mode, and by dtype.
TOLERANCES = {**common.TOLERANCES, "fp16": 1e-2, "bf16": 5e-2}
MOST_ROWS = 2**14  # or pixels of a timed size: several processes share the card, and float64 takes its time
ON_GPU = torch.cuda.is_available()
# They have no kernels of their own.
_OTHERS = ("autoregressive", "collapse", "reversible", "peers", "libraries", "streams")
_CASES = tuple(case for case in CASES if case not in _OTHERS)
NAMES = (
    *(f"op:{name}" for name in dict.fromkeys(case.op for case in all_cases())),
    *(f"case:{c}" for c in _CASES),
    "models",
)

Line = tuple[str, Callable[[], Verdict]]


def small(op: str) -> Iterator[Line]:
    """One size of the op, with all outputs and gradients."""
    for variant in variants([case for case in all_cases() if case.op == op], smoke=True):
        if ON_GPU or variant.dtype != "bf16":
            yield variant.name, lambda variant=variant: _small(variant)


def _small(variant: Variant) -> Verdict:
    values = [value.to(_device()) for value in values_of(variant)]
    allowed = TOLERANCES[variant.dtype if variant.dtype != "fp32" else variant.mode or "exact"]
    if variant.dtype == "fp16" and variant.mode:  # products of gradients are bf16's
        allowed = TOLERANCES["fast"]
    with lf.backend("triton"):
        got = outputs_and_gradients(variant, values)
    truth, size = exact(variant, values)
    if [o.shape for o in got] != [t.shape for t in truth]:
        return Verdict(None, allowed, f"outputs of shapes {[tuple(o.shape) for o in got]}")
    # A gradient that is zero is a difference of terms as large as these.
    scales = [1.0 if t.any() else variant.case.cancels * size for t in truth]
    errors = [relative_error(o, t) / scale for o, t, scale in zip(got, truth, scales, strict=True)]
    worst = max(errors, key=lambda error: (error != error, error))
    return Verdict(worst, allowed, None if worst <= allowed else f"error {worst:.2g}, allowed {allowed:.2g}")


def timed(case: Case) -> Iterator[Line]:
    """Each direction, dtype and mode of the benchmark's case, at a size that is timed."""
    for size in _sizes(case):
        narrow, chosen = size.get("dtype", "float32") != "float32", "precision" in size
        for mode in PRECISIONS if _has_modes(case.name) and not narrow and not chosen else ("",):
            name = " ".join([case.name, *map(str, size.values()), mode]).strip()
            yield name, lambda size=size, mode=mode: _timed(case, size, mode)


def _has_modes(name: str) -> bool:
    """Whether torch's settings select its precision: an op with that parameter, or a model of such ops."""
    return not hasattr(lf.ops, name) or "precision" in inspect.signature(getattr(lf.ops, name)).parameters


def _sizes(case: Case) -> list[Size]:
    """One size per direction, dtype and precision: the first that is timed, or one derived from it."""
    base = dict(case.sizes["gpu" if ON_GPU else "tiny"][0])
    base["batch"] = max(1, min(int(base["batch"]), MOST_ROWS // int(base.get("side", 1)) ** 2))
    every = [size for sizes in case.sizes.values() for size in sizes]
    axes = {
        key: dict.fromkeys(size[key] for size in every)
        for key in ("direction", "dtype", "precision")
        if key in base
    }
    if "precision" in axes:
        axes["precision"] = dict.fromkeys(PRECISIONS)
    if "dtype" in axes:
        axes["dtype"] = dict.fromkeys(("float32", "bfloat16") if ON_GPU else ("float32", "float16"))
    sizes: list[dict[str, Any]] = [base]
    for key, values in axes.items():
        sizes = [{**size, key: value} for size in sizes for value in values]
    return list(sizes)


def _timed(case: Case, size: Size, mode: str) -> Verdict:
    problem = case.build(size, Options(_device(), kernels=True))
    dtypes = {"bfloat16": "bf16", "float16": "fp16"}
    allowed = TOLERANCES[dtypes.get(str(size.get("dtype")), mode or str(size.get("precision", "exact")))]
    standard = own_standard(problem.truth, problem.inputs[:1], allowed)
    ours = next(provider for provider in problem.providers if provider.name == "linfast")
    with in_precision(mode):
        return judge(ours.call, problem.inputs[:1], standard)


def lines(name: str) -> Iterator[Line]:
    """The checks of one of ``NAMES``."""
    kind, _, what = name.partition(":")
    if kind == "models":
        from tests.gpu.models import models

        return models(_device())
    return small(what) if kind == "op" else timed(CASES[what])


def look(name: str, call: Callable[[], Verdict]) -> bool:
    """Print the verdict; returns whether it was right."""
    start = time.perf_counter()
    try:
        verdict = call()
    except Exception as error:  # a check that raises gets a line as well
        verdict = Verdict(None, None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    found = {"smoke": name, "error": verdict.error, "allowed": verdict.allowed, "wrong": verdict.refused}
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({**{k: _finite(v) for k, v in found.items()}, "seconds": seconds}), flush=True)
    return verdict.refused is None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.smoke", description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="of N processes that share the lines, this one"
    )
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    if ON_GPU:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    else:
        from tests import interpreter

        interpreter.install()
    warnings.simplefilter("ignore")  # of plain torch's functions without a deterministic version
    # NaN in fresh memory reveals a kernel that does not write all of its output.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    right = [
        look(name, call)
        for each in options.names
        for name, call in itertools.islice(lines(each), part, None, parts)
    ]
    print(f"{sum(right)} right, {len(right) - sum(right)} wrong", flush=True)
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
