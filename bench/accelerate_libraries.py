"""What ``accelerate`` does to each library's flow, beside a copy of the original and torch.compile of it.

    python -m linfast.bench.accelerate_libraries [--batch 1 64 4096 65536] [--only normflows] [--json FILE]

Vectors of 64 features, 8 couplings, conditioners 32-128-128-64; one thread on a CPU. The accelerated model is
a copy with the same weights, whose outputs and gradients are compared with the original's before anything is
timed. Then the original, the accelerated model, a second copy of the original and the compiled original run in
turns; times are medians by the clock and by the CPU time of the process; ratios are medians over the rounds of
time / original's, below 1 where something is gained. The copy's ratio is the noise: "slower" is said where
accelerated is above it by more than 0.04. torch.compile is asked for one graph (fullgraph); where it cannot give
one, the table says so.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import linfast as lf
from linfast.precision import full_precision
from linfast.tables import aligned

from .arguments import default_device, device_from
from .cases.common import perturb
from .environment import describe
from .library_models import LIBRARIES, Run
from .moved import plain_torch
from .rounding import relative_error
from .timing import ratio, time_interleaved

__all__ = ["main", "measure"]

FEATURES, DEPTH, HIDDEN = 64, 8, (128, 128)
CHECKED_ROWS = 256
# Relative L2 in float32, where a ReLU at its kink may go the other way; float64 is the tests' business.
OUTPUTS_WITHIN, GRADIENTS_WITHIN = 1e-5, 1e-3
SLOWER = 0.04
HEADER = (
    *("library", "batch", "direction", "original", "accelerated", "compiled"),
    *("ratio", "by CPU time", "copy's", "by CPU time", "compiled's", ""),
)

Call = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and return 0, or 1 where an accelerated model was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[65536])
    parser.add_argument("--rounds", type=int, help="of each call (default: what --budget allows, at least 5)")
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="for timing each call (1.0)")
    parser.add_argument("--only", default="", metavar="TEXT", help="libraries whose name has it")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", type=device_from, default=default_device())
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per library, batch and direction")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[Sequence[str]] = [HEADER]
    wrong = False
    for name in (name for name in LIBRARIES if args.only in name):
        for batch in args.batch:
            options = {"rounds": args.rounds, "budget": args.budget}
            for record in measure(name, batch, compiles=args.compile, device=args.device, **options):
                wrong = wrong or "wrong" in record
                rows.append(_row(record))
                print("  ".join(rows[-1]), flush=True)
                if args.json:
                    with Path(args.json).open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**record, **describe(args.device)}) + "\n")
    print("\n" + aligned(rows, 3))
    return int(wrong)


def measure(
    name: str,
    batch: int,
    rounds: int | None,
    compiles: bool,
    device: torch.device,
    budget: float = 0.0,
) -> list[dict[str, Any]]:
    """One record per direction; where the library is not installed, one record that says so."""
    torch.manual_seed(0)
    torch.compiler.reset()
    size = {"library": name, "batch": batch, "features": FEATURES, "depth": DEPTH, "hidden": HIDDEN[0]}
    try:
        model, forward, inverse = LIBRARIES[name](FEATURES, DEPTH, HIDDEN)
    except ImportError as error:
        return [{**size, "missing": str(error)}]
    perturb(model)
    model = model.to(device)
    fast, same = copy.deepcopy(model), copy.deepcopy(model)
    report = lf.accelerate(fast)
    size["runs"] = "; ".join(dict.fromkeys(row.runs or row.note for row in report.rows))
    x, records = torch.randn(batch, FEATURES, device=device), []
    runs = {"forward": forward, "inverse": inverse, "training": forward}
    for direction, run in runs.items():
        train = direction == "training"
        errors = _errors(run, model, fast, torch.randn(min(batch, CHECKED_ROWS), FEATURES, device=device))
        if errors[0] > OUTPUTS_WITHIN or errors[1] > GRADIENTS_WITHIN:
            records.append({**size, "direction": direction, "wrong": errors})
            continue
        models = {"original": model, "accelerated": fast, "copy": same}
        calls, breaks = {which: _call(run, each, x, train) for which, each in models.items()}, None
        if compiles:
            try:
                calls["compiled"] = _compiled(run, model, x, train)
            except Exception as error:
                breaks = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:90]
        timings = time_interleaved(calls, device=device, budget=budget * len(calls), rounds=rounds, capture=False)
        record: dict[str, Any] = {**size, "direction": direction, "errors": errors, "breaks": breaks}
        for which, timing in timings.items():
            base = timings["original"]
            record |= {
                f"{which}_wall_ms": median(timing.ms),
                f"{which}_cpu_ms": median(timing.cpu_ms),
                f"{which}_wall_ratio": ratio(timing.ms, base.ms),
                f"{which}_cpu_ratio": ratio(timing.cpu_ms, base.cpu_ms),
            }
        records.append({**record, "rounds": len(timings["original"].ms)})
    return records


def _call(run: Run, model: nn.Module, x: Tensor, train: bool) -> Call:
    def forward() -> object:
        with torch.no_grad():
            return run(model, x)

    def step() -> object:
        model.zero_grad(set_to_none=True)
        return _loss(run(model, x)).backward()

    return step if train else forward


def _compiled(run: Run, model: nn.Module, x: Tensor, train: bool) -> Call:
    """The original compiled as one graph; raises where torch.compile cannot make it one."""
    graph = torch.compile(functools.partial(run, model), fullgraph=True, dynamic=False)
    call = _call(lambda _, x: graph(x), model, x, train)
    call()
    return call


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """Half the mean square of the first output, less the mean of the log-determinants."""
    return 0.5 * outputs[0].square().mean() - sum((o.mean() for o in outputs[1:]), start=outputs[0].new_zeros(()))


def _errors(run: Run, model: nn.Module, fast: nn.Module, x: Tensor) -> tuple[float, float]:
    """The largest relative L2 difference of an output, and that of all gradients together."""
    outputs, gradients = [], []
    for each, backend in ((model, plain_torch()), (fast, nullcontext())):
        each.zero_grad(set_to_none=True)
        with full_precision(), backend:
            values = run(each, x)
            _loss(values).backward()
        outputs.append([value.detach() for value in values])
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
        each.zero_grad(set_to_none=True)
    worst = max(relative_error(a, b) for a, b in zip(outputs[1], outputs[0], strict=True))
    return worst, relative_error(gradients[1], gradients[0])


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    about = record["library"], str(record["batch"]), record.get("direction", "")
    if "missing" in record:
        return *about, "not installed", *[""] * 8
    if "wrong" in record:
        return *about, f"refused: differs by {record['wrong']}", *[""] * 8
    times = {which: record.get(f"{which}_wall_ms") for which in ("original", "accelerated", "compiled")}
    ratios = [record[f"{which}_{clock}_ratio"] for which in ("accelerated", "copy") for clock in ("wall", "cpu")]
    slower = ratios[1] > max(1.0, ratios[3]) + SLOWER
    return (
        *about,
        *("" if ms is None else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms" for ms in times.values()),
        *(f"{value:.2f}" for value in ratios),
        f"{record['compiled_wall_ratio']:.2f}" if times["compiled"] else record["breaks"] or "",
        "slower" if slower else "",
    )


if __name__ == "__main__":
    raise SystemExit(main())
