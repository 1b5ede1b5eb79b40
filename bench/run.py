"""The command line: ``python -m linfast.bench`` and ``linfast bench``."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Sequence

import torch

from linfast._command import Parser, refuse_existing

from .cases import CASES, sizes, words
from .compare import run_compare
from .environment import Environment, ceilings, describe, free_bytes
from .harness import SCALES, Options, Result, Size, UsageError, measure
from .plots import NAMES, SUFFIXES, draw
from .report import json_line, table
from .trace import run_profile

_BUDGETS = {"tiny": 0.2, "quick": 0.2, "gpu": 0.15, "full": 1.0}
_PLOTS = "linfast-bench"
_CALLS = 25  # at least, per provider: the check, two rounds of warm-up, five timed rounds, memory, float64
_LIMIT = 20.0  # seconds that all calls at one size may take
_MEMORY_SHARE = 0.5  # of free memory; inputs, float64 outputs and graphs need more than a call's peak


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases that ``argv`` asks for and print the table.

    Returns 0, or 1 where a provider was refused or, with --compare, something got slower.
    Bad arguments exit with 2 and a message.
    """
    arguments = parser()
    args = arguments.parse_args(argv)
    args.case = list(dict.fromkeys(args.case or CASES))
    args.budget = args.budget or _BUDGETS[args.sizes]
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler logs its start and stop
    try:
        if not any(sizes(CASES[name], args) for name in args.case):
            raise UsageError(f"--only {args.only}: no size of these cases has it")
        if args.compare is not None:
            return run_compare(args)
        plots = None if args.profile else _plots(args)
        if not args.overwrite:
            refuse_existing(_files(args, plots), "--overwrite replaces it")
        if args.profile is not None:
            return run_profile(args)
        return _run(args, plots)
    except BrokenPipeError:
        raise
    except (OSError, UsageError) as error:
        is_file = isinstance(error, OSError) and error.filename is not None
        arguments.error(f"cannot write {error.filename}: {error.strerror}" if is_file else str(error))  # type: ignore[union-attr]


def too_large(size: Size, measured: Sequence[Result], limit: float, device: torch.device) -> str | None:
    """Why a size is left out, or None: its cost is predicted as that of the nearest smaller size, times its growth.

    A smaller size has the same words and no larger number. Growth is taken as proportional to every number. For
    widths that is too little, so that a size in doubt is measured.

    Args:
        limit: seconds that the least number of calls of all providers may take.
    """
    timed = [(_growth(result.size, size), result) for result in measured if result.p50_ms is not None]
    nearest = min((growth for growth, _ in timed), default=math.inf)
    if nearest == math.inf:
        return None
    at = [result for growth, result in timed if growth == nearest]
    seconds = 1e-3 * nearest * _CALLS * sum(result.p50_ms or 0.0 for result in at)
    peak = nearest * max(result.peak_bytes or 0 for result in at)
    if seconds > limit:
        return f"about {seconds:.0f} s, over the limit of {limit:.0f}"
    return f"about {peak / 2**30:.1f} GiB per call" if peak > _MEMORY_SHARE * free_bytes(device) else None


def _growth(small: Size, large: Size) -> float:
    """The factor by which ``large`` exceeds ``small``; infinite where it is not a larger size of the same kind."""
    pairs = [(small.get(key), value) for key, value in large.items()]
    words = all(before == value for before, value in pairs if isinstance(value, str))
    numbers = [(before, value) for before, value in pairs if isinstance(before, int) and isinstance(value, int)]
    if not words or any(before > value for before, value in numbers):
        return math.inf
    return math.prod(1.0 if before == value else value / max(before, 1) for before, value in numbers)


def _run(args: argparse.Namespace, plots: str | None) -> int:
    if plots is not None:
        os.makedirs(plots, exist_ok=True)
    _append(args.json, [], mode="w")
    environment = {**describe(args.device), **({} if args.check else ceilings(args.device))}
    results = _measure_all(args, environment)
    print(table(results, environment))
    if plots is not None:
        for path in draw(results, environment, plots):
            print(f"wrote {path}")
    return int(any(result.refused is not None for result in results))


def _measure_all(args: argparse.Namespace, environment: Environment) -> list[Result]:
    options = Options(args.device, args.compile)
    results: list[Result] = []
    for name in args.case:
        case, measured = CASES[name], list[Result]()
        for size in sizes(case, args):
            reason = None if case.every_size else too_large(size, measured, _LIMIT, args.device)
            new, what = list[Result](), f"{name} {words(size)}"
            if reason is None:
                print(f"measuring {what}", file=sys.stderr, flush=True)
                try:
                    new = measure(case, size, options, None if args.check else args.budget)
                except ImportError as error:
                    reason = str(error)
            if reason is not None:
                print(f"leaving out {what}: {reason}", file=sys.stderr, flush=True)
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
            measured += new
            _append(args.json, [json_line(result, environment) for result in new])
        results += measured
    return results


def _plots(args: argparse.Namespace) -> str | None:
    """The folder that plots are written to, or None for no plots."""
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    if args.plots is not None and not has_matplotlib:
        raise UsageError("--plots needs matplotlib: pip install 'linfast[demo]'")
    by_itself = args.sizes == "quick" and has_matplotlib and not args.check
    return _PLOTS if args.plots is None and by_itself else args.plots


def _files(args: argparse.Namespace, plots: str | None) -> list[str]:
    """The files that the run may write. Devices such as /dev/stdout are not among them."""
    if args.profile is not None:
        names = ["kernels.txt", *(f"{case}.trace.json.gz" for case in args.case)]
        return [os.path.join(args.profile, name) for name in names]
    files = [] if plots is None else [os.path.join(plots, f"{name}.{end}") for name in NAMES for end in SUFFIXES]
    return files if args.json is None or args.json.startswith("/dev/") else [args.json, *files]


def _append(path: str | None, lines: Sequence[str], mode: str = "a") -> None:
    if path is not None:
        with open(path, mode, encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def parser() -> Parser:
    """The options of ``linfast bench``."""
    result = Parser(
        prog="linfast bench",
        description="Check every provider against float64, then time them in turn.",
        epilog=(
            "Exit status: 0; 1 where a provider was refused, or, with --compare, where something got slower.\n"
            "Bad arguments: 2."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--quick", action="store_const", const="quick", dest="sizes", help="few sizes, a short budget, plots")
    add("--sizes", choices=SCALES, help="which sizes of each case (default: full, the sweeps)")
    add("--case", action="append", choices=sorted(CASES), help="only this case; may be repeated")
    add("--batch", nargs="+", type=_positive_int, metavar="B", help="these batch sizes only")
    add("--only", default="", metavar="TEXT", help="only sizes that have TEXT in them, such as nflows or inverse")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time torch.compile of eager and of linfast (default: yes)",
    )
    add("--json", metavar="FILE", help="write one JSON line per result to FILE")
    add("--plots", metavar="DIR", help="write plots to DIR (--quick: linfast-bench, if matplotlib is there)")
    add("--overwrite", action="store_true", help="replace an earlier run's --json, --plots and --profile files")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    add("--device", type=_device, default=device, help="such as cpu, cuda, cuda:1")
    add(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help="for timing each provider at each size (1.0; quick, tiny 0.2)",
    )
    add("--check", action="store_true", help="check against float64 and time nothing")
    add("--profile", metavar="DIR", help="write a trace and a summary by kernel of each case to DIR; time nothing")
    add("--compare", metavar="BASE", help="time this checkout and the commit BASE in turn; say what moved")
    result.set_defaults(sizes="full")
    return result


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
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {10**9 - 1}; got {text!r:.60}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds; got {text!r}")
    return value
