"""The arguments of ``linfast bench``."""

from __future__ import annotations

import argparse

import torch

from linfast._command import Parser

from .cases import CASES
from .harness import SCALES

__all__ = ["default_device", "device_from", "parser"]


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
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time torch.compile of eager and of linfast (default: yes)",
    )
    add("--json", metavar="FILE", help="write one JSON line per result to FILE")
    add("--plots", metavar="DIR", help="write plots to DIR (--quick: linfast-bench, if matplotlib is there)")
    add("--overwrite", action="store_true", help="replace an earlier run's --json, --plots and --profile files")
    add("--device", type=device_from, default=default_device(), help="such as cpu, cuda, cuda:1")
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


def default_device() -> torch.device:
    """A GPU where torch finds one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_from(text: str) -> torch.device:
    """The device of this name, for a command line's parser: a CPU, or a GPU of this machine."""
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
