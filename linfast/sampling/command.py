"""``linfast sample``: samples of a saved Linearizer into a .npy file."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from .._command import add_earlier_files, refuse_existing
from ..dispatch import usable_device
from ..io import load
from ..linearizer import Linearizer
from .integrate import METHODS
from .locked import check_regular
from .stream import sample_stream
from .workers import Workers, process_group

__all__ = ["add_sample"]

_LARGEST = {"count": 2**53, "batch_size": 2**53, "steps": 10**6}
_REPLACES = "--overwrite replaces it"


def add_sample(commands: Any) -> None:
    """Add ``sample`` to the parser's subcommands."""
    parser = commands.add_parser(
        "sample",
        help="sample a saved Linearizer into a .npy file",
        description="Sample in one step into a .npy file. Started again after an interruption, it resumes. "
        "torchrun --nproc-per-node=N -m linfast.cli sample ... shares the work: the file is the same.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="F.safetensors", help="written by linfast.save")
    parser.add_argument("--count", required=True, type=int, help="samples")
    parser.add_argument("--out", required=True, metavar="X.npy")
    parser.add_argument(
        "--batch-size", type=int, default=4096, help="samples between commits (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="sampling steps, collapsed (default: %(default)s)")
    parser.add_argument("--method", default="rk4", choices=METHODS, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    add_earlier_files(
        parser,
        resume="resume --out; not needed: the same command resumes, and another run's file is refused",
        overwrite="replace another run's --out and its record, once there is room for this run's",
    )
    parser.set_defaults(call=_sample, kept=_kept)


def _sample(options: argparse.Namespace) -> int:
    for name, largest in _LARGEST.items():
        if getattr(options, name) > largest:
            raise ValueError(f"{name} must be at most {largest}; got {getattr(options, name)}")
    out, record = options.out, _record(options)
    for path in (out, record):
        check_regular(path)
        if (
            os.path.exists(path)
            and os.path.exists(options.checkpoint)
            and os.path.samefile(path, options.checkpoint)
        ):
            raise FileExistsError(
                f"{path} exists and has no record of a run: it is the checkpoint; choose another --out"
            )
    known = os.path.exists(record)
    if known and _done(record) is None:
        raise FileExistsError(f"{record} is not a record of a run: move it, or choose another --out")
    if options.resume and not known:
        raise FileNotFoundError(f"{record}: no record of a run to resume")
    if not options.overwrite and not known:
        refuse_existing([out], f"without a record --resume cannot resume it; {_REPLACES}")
    with process_group(usable_device(options.device), "gloo") as device:  # only row counts and errors are exchanged
        f = load(options.checkpoint, device)
        if not isinstance(f, Linearizer):
            raise ValueError(f"{options.checkpoint} holds a {type(f).__name__}: sample takes a Linearizer")
        how = {"steps": options.steps, "method": options.method, "progress": True, "overwrite": options.overwrite}
        try:
            rows = sample_stream(f.eval(), options.count, options.batch_size, out, options.seed, **how)
        except ValueError as error:
            goes_on = f" (--resume resumes the same run only; {_REPLACES})" if known else ""
            raise ValueError(f"{error}{goes_on}") from error
        if Workers.current().rank == 0:
            print(f"{out}: {rows.dtype} {tuple(rows.shape)}")
    return 0


def _record(options: argparse.Namespace) -> str:
    return f"{options.out}.json"


def _done(record: str) -> int | None:
    """The samples that a record counts; None where it is no run's, or missing."""
    try:
        content = json.loads(Path(record).read_bytes())
        return content["done"] if isinstance(content["run"], dict) and type(content["done"]) is int else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _kept(options: argparse.Namespace) -> str:
    """What an interrupted run leaves."""
    done = _done(_record(options))
    if done is None:
        return "nothing is kept"
    return f"{options.out} keeps {done} samples: the same command resumes from there"
