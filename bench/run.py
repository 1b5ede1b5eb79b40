"""The command line: ``python -m linfast.bench`` and ``linfast bench``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from .cases import CASES
from .environment import describe
from .harness import Case, Options, Size, measure
from .report import json_line, table

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases that ``argv`` asks for and print the table.

    Returns 0, or 1 where a provider was refused. Bad arguments exit with 2 and a message.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler logs its start and stop
    budget = args.budget or (0.2 if args.quick else 1.0)
    options = Options(args.device, args.compile)
    environment = describe(args.device)
    try:
        _append(args.json, [], mode="w")
    except OSError as error:
        parser.error(f"cannot write {args.json}: {error.strerror}")
    results = []
    for case in [CASES[name] for name in dict.fromkeys(args.case or CASES)]:
        for size in _sizes(case, args.quick, args.batch):
            print(f"measuring {case.name}", *size.values(), file=sys.stderr, flush=True)
            measured = measure(case, size, options, budget)
            results += measured
            _append(args.json, [json_line(result, environment) for result in measured])
    print(table(results, environment))
    return int(any(result.refused is not None for result in results))


def _append(path: str | None, lines: Sequence[str], mode: str = "a") -> None:
    if path is not None:
        with open(path, mode, encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def _sizes(case: Case, quick: bool, batches: Sequence[int] | None) -> list[Size]:
    """The case's sizes, with the asked batches in place of its own."""
    sizes = case.quick if quick else case.sizes
    if batches is None:
        return list(sizes)
    asked = [{**size, "batch": batch} for size in sizes for batch in batches]
    return list({tuple(size.items()): size for size in asked}.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linfast bench",
        description="Check every provider against float64, then time them in turn.",
        epilog="x base: time over the baseline's, below 1 is faster. "
        "peak MiB: memory of one call above weights and inputs. Exit status 1: a provider was refused.",
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, a short budget")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this case; may be repeated")
    parser.add_argument("--batch", nargs="+", type=_positive_int, metavar="B", help="these batch sizes only")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the eager model")
    parser.add_argument("--json", metavar="FILE", help="write one JSON line a result to FILE")
    parser.add_argument("--device", type=_device, default=_default_device(), help="such as cpu, cuda, cuda:1")
    parser.add_argument(
        "--budget", type=_seconds, metavar="SECONDS", help="timing a provider and size (1.0, quick 0.2)"
    )
    return parser


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"not a device: {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda; got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine")
    return device


def _positive_int(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds; got {text!r}")
    return value
