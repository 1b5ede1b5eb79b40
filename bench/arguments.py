"""The arguments of ``linfast bench``."""

from __future__ import annotations

import argparse

import torch

from linfast._command import Parser

from .cases import CASES
from .harness import SCALES

__all__ = ["UsageError", "parser"]

EPILOG = """\
Exit status: 0; 1 where a provider was refused, or, with --compare, where something got slower.
Bad arguments: 2.
"""


class UsageError(Exception):
    """What was asked for cannot be done; the message says why."""


def parser() -> Parser:
    """Every front end's options."""
    result = Parser(
        prog="linfast bench",
        description="Check every provider against float64, then time them in turn.",
        epilog=EPILOG,
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
    add("--json", metavar="FILE", help="write one JSON line a result to FILE")
    add("--plots", metavar="DIR", help="write plots to DIR (--quick: linfast-bench, if matplotlib is there)")
    add("--overwrite", action="store_true", help="replace an earlier run's --json, --plots and --profile files")
    add("--device", type=_device, default=_default_device(), help="such as cpu, cuda, cuda:1")
    add("--budget", type=_seconds, metavar="SECONDS", help="timing a provider and size (1.0; quick, tiny 0.2)")
    add("--limit", type=_seconds, default=20.0, metavar="SECONDS", help="leave out sizes that would take longer")
    add("--check", action="store_true", help="check against float64 and time nothing")
    add(
        "--profile", metavar="DIR", help="write a Chrome trace and a per-kernel summary a case to DIR; time nothing"
    )
    add("--compare", metavar="BASE", help="time this checkout and the commit BASE in turn; say what moved")
    result.set_defaults(sizes="full")
    return result


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
