"""``linfast sample``: samples of a saved Linearizer into a .npy file."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..arguments import add_earlier_files, refuse_existing, taken
from ..device import usable_device
from ..io import load
from ..linearizer import Linearizer
from .integrate import METHODS
from .stream import sample_stream
from .workers import Workers

__all__ = ["add_sample"]

_LARGEST = {"count": 2**53, "batch_size": 2**53, "steps": 10**6}
_REPLACES = "--overwrite replaces it"


def add_sample(commands: Any) -> None:
    """Add ``sample`` to the parser's subcommands."""
    parser = commands.add_parser(
        "sample",
        help="sample a saved Linearizer into a .npy file",
        description="Sample in one step into a .npy file. Started again after an interruption it goes on. "
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
        resume="go on with --out; not needed: the same command goes on, and another run's file is refused",
        overwrite="remove an earlier run's --out and its record when sampling starts",
    )
    parser.set_defaults(call=_sample, kept=_kept)


def _sample(options: argparse.Namespace) -> int:
    from ..training.distributed import process_group

    for name, largest in _LARGEST.items():
        if getattr(options, name) > largest:
            raise ValueError(f"{name} must be at most {largest}; got {getattr(options, name)}")
    out = Path(options.out)
    if out.exists() and not out.is_file():
        raise ValueError(f"{out} exists and is no file: choose another --out")
    known = _record(out).exists()
    if os.path.lexists(out) and out.resolve() == Path(options.checkpoint).resolve():
        raise FileExistsError(f"{out} exists and has no record: it is the checkpoint; choose another --out")
    if options.resume and not known:
        raise FileNotFoundError(f"{_record(out)}: no record of a run to resume")
    if not options.overwrite and not known:
        refuse_existing([out], f"without a record --resume cannot go on with it; {_REPLACES}")
    with process_group(usable_device(options.device), "gloo") as device:  # only row counts and errors are exchanged
        f = load(options.checkpoint, device)
        if not isinstance(f, Linearizer):
            raise ValueError(f"{options.checkpoint} holds a {type(f).__name__}: sample takes a Linearizer")
        how = {"steps": options.steps, "method": options.method, "progress": True}
        given = (f.eval(), options.count, options.batch_size)
        workers = Workers.current()
        if options.overwrite:
            sample_stream(*given, None, options.seed, **how)  # refuses what the call below would
            workers.by_first(lambda: _remove(out))
        try:
            rows = sample_stream(*given, out, options.seed, **how)
        except (ValueError, FileExistsError) as error:
            if known and not options.overwrite:
                raise ValueError(f"{error} (--resume goes on with the same run alone; {_REPLACES})") from error
            raise
        if workers.rank == 0:
            print(f"{options.out}: {rows.dtype} {tuple(rows.shape)}")
    return 0


def _record(out: Path) -> Path:
    return Path(f"{out}.json")


def _remove(out: Path) -> None:
    """Remove the file, which no other run may be writing, and its record."""
    with suppress(FileNotFoundError):
        lock = taken(out)
        try:
            out.unlink()
        finally:
            os.close(lock)
    _record(out).unlink(missing_ok=True)


def _kept(options: argparse.Namespace) -> str:
    """What an interrupted run leaves."""
    try:
        done = json.loads(_record(Path(options.out)).read_text())["done"]
    except (OSError, ValueError, KeyError, TypeError):
        return "nothing is kept"
    return f"{options.out} keeps {done} samples: the same command goes on from there"
