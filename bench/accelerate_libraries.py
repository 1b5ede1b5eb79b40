"""What ``accelerate`` does to each library's flow: time before, after, and of torch.compile of the original.

    python -m linfast.bench.accelerate_libraries [--batch 65536] [--only normflows] [--json FILE]

Vectors of 64 features, 8 couplings, conditioners 32-128-128-64; one thread on a CPU. The accelerated model is
a copy with the same weights; before anything is timed its outputs and gradients are compared with the
original's. Then original, accelerated and compiled run in turns (A B C A B C ...); times are medians, by
the wall clock and, on a CPU, by the process's own CPU time, which other processes disturb less; ratios are
medians of each round's accelerated / original, below 1 where accelerate gains. torch.compile is asked for
one graph (fullgraph); where it cannot, the table says why and nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import linfast as lf
from linfast.dispatch import plain_torch
from linfast.precision import full_precision
from linfast.tables import aligned

from .arguments import _default_device, _device
from .environment import describe
from .library_models import LIBRARIES, Run
from .timing import in_turns

__all__ = ["main", "measure"]

FEATURES, DEPTH, HIDDEN = 64, 8, (128, 128)
CHECKED_ROWS = 256
# Relative L2 in float32, where a ReLU at its kink may go the other way; float64 is the tests' business.
OUTPUTS_WITHIN, GRADIENTS_WITHIN = 1e-5, 1e-3
SPREAD = 0.05
HEADER = ("library", "direction", "original", "accelerated", "compiled", "ratio", "by CPU time", "compiled's")

Call = Callable[[], object]
Times = Sequence[tuple[float, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where an accelerated model was wrong."""
    parser = argparse.ArgumentParser(description="accelerate beside the originals and torch.compile of them")
    parser.add_argument("--batch", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="kinds whose name holds this; may be repeated"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", type=_device, default=_default_device())
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a library and direction")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines: list[tuple[str, ...]] = [HEADER]
    wrong = False
    for name in LIBRARIES:
        if args.only and not any(text in name for text in args.only):
            continue
        for record in measure(name, args.batch, args.rounds, args.compile, args.device):
            wrong = wrong or "wrong" in record
            lines.append(_row(record))
            print("  ".join(lines[-1]), flush=True)
            if args.json:
                with Path(args.json).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**record, **describe(args.device)}) + "\n")
        gc.collect()
    print("\n" + aligned(lines, 2))
    return int(wrong)


def measure(name: str, batch: int, rounds: int, compiles: bool, device: torch.device) -> list[dict[str, Any]]:
    """A record a direction."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    size = {"library": name, "batch": batch, "features": FEATURES, "depth": DEPTH, "hidden": HIDDEN[0]}
    try:
        model, forward, inverse = LIBRARIES[name](FEATURES, DEPTH, HIDDEN)
    except ImportError as error:
        return [{**size, "missing": str(error)}]
    model = _moved(model).to(device)
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast)
    size["runs"] = "; ".join(dict.fromkeys(row.runs or row.note for row in report.rows))
    x = torch.randn(batch, FEATURES, device=device)
    records = []
    for direction, run in (("forward", forward), ("inverse", inverse), ("training", forward)):
        train = direction == "training"
        errors = _errors(run, model, fast, x[:CHECKED_ROWS])
        if errors[0] > OUTPUTS_WITHIN or errors[1] > GRADIENTS_WITHIN:
            records.append({**size, "direction": direction, "wrong": errors})
            continue
        calls = {"original": _call(run, model, x, train), "accelerated": _call(run, fast, x, train)}
        breaks = None
        if compiles:
            try:
                calls["compiled"] = _compiled(run, model, x, train)
            except Exception as error:
                breaks = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:90]
        times = in_turns(calls, rounds, functools.partial(_finish, device))
        records.append({**size, "direction": direction, "errors": errors, "breaks": breaks, **_summary(times)})
    return records


def _moved(model: nn.Module) -> nn.Module:
    """With no weight left at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(SPREAD * torch.randn_like(parameter))
    return model


def _call(run: Run, model: nn.Module, x: Tensor, train: bool) -> Call:
    def forward() -> object:
        with torch.no_grad():
            return run(model, x)

    def step() -> object:
        model.zero_grad(set_to_none=True)
        return _loss(run(model, x)).backward()

    return step if train else forward


def _compiled(run: Run, model: nn.Module, x: Tensor, train: bool) -> Call:
    """The original as one graph, compiled; raises where it is not one."""
    graph = torch.compile(functools.partial(run, model), fullgraph=True, dynamic=False)
    call = _call(lambda _, x: graph(x), model, x, train)
    call()
    return call


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """Half the mean square of the first, less the mean of the log-determinants."""
    return 0.5 * outputs[0].square().mean() - sum((o.mean() for o in outputs[1:]), start=outputs[0].new_zeros(()))


def _errors(run: Run, model: nn.Module, fast: nn.Module, x: Tensor) -> tuple[float, float]:
    """Largest relative L2 difference of an output, and that of the gradients together."""
    outputs, gradients = [], []
    for each, backend in ((model, plain_torch()), (fast, nullcontext())):
        each.zero_grad(set_to_none=True)
        with full_precision(), backend:
            values = run(each, x)
            _loss(values).backward()
        outputs.append([value.detach() for value in values])
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
        each.zero_grad(set_to_none=True)
    worst = max(_relative(a, b) for a, b in zip(outputs[1], outputs[0], strict=True))
    return worst, _relative(gradients[1], gradients[0])


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30)) if actual.any() else 0.0


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(times: Mapping[str, Times]) -> dict[str, Any]:
    """Medians in milliseconds, and of the rounds' ratios to the original."""
    result: dict[str, Any] = {"rounds": len(times["original"])}
    for name, taken in times.items():
        for i, clock in enumerate(("wall", "cpu")):
            result[f"{name}_{clock}_ms"] = 1e3 * median(t[i] for t in taken)
            pairs = zip(taken, times["original"], strict=True)
            result[f"{name}_{clock}_ratio"] = median(t[i] / max(base[i], 1e-9) for t, base in pairs)
    return result


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    name, direction = record["library"], record.get("direction", "")
    if "missing" in record:
        return name, direction, "not installed", *[""] * 5
    if "wrong" in record:
        return name, direction, f"refused: differs by {record['wrong']}", *[""] * 5
    compiled = "compiled_wall_ms" in record
    return (
        name,
        direction,
        f"{record['original_wall_ms']:.0f} ms",
        f"{record['accelerated_wall_ms']:.0f} ms",
        f"{record['compiled_wall_ms']:.0f} ms" if compiled else "breaks" if record["breaks"] else "",
        f"{record['accelerated_wall_ratio']:.2f}",
        f"{record['accelerated_cpu_ratio']:.2f}",
        f"{record['compiled_wall_ratio']:.2f}" if compiled else record["breaks"] or "",
    )


if __name__ == "__main__":
    raise SystemExit(main())
