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
from .locked import lock
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
        overwrite="replace an earlier run's --out and its record when all samples are there, until then in OUT.new",
    )
    parser.set_defaults(call=_sample, kept=_kept)


def _sample(options: argparse.Namespace) -> int:
    from ..distributed import process_group

    for name, largest in _LARGEST.items():
        if getattr(options, name) > largest:
            raise ValueError(f"{name} must be at most {largest}; got {getattr(options, name)}")
    out, new = Path(options.out), _new(options)
    for path in dict.fromkeys((out, _record(out), new, _record(new))):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "a link" if path.is_symlink() else "no file"
            raise ValueError(f"{path} exists and is {kind}: choose another --out")
        if path.exists() and os.path.exists(options.checkpoint) and path.samefile(options.checkpoint):
            raise FileExistsError(
                f"{path} exists and has no record of a run: it is the checkpoint; choose another --out"
            )
    for record in map(_record, (out, new)):
        if record.exists() and _done(record) is None:
            raise FileExistsError(f"{record} is not a record of a run: move it, or choose another --out")
    known = _record(out).exists()
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
            sample_stream(*given, None, options.seed, **how)  # refuses what the calls below would
            workers.by_first(lambda: _check_unlocked(out))
        try:
            rows = sample_stream(*given, new, options.seed, **how)
        except ValueError as error:
            if not options.overwrite:
                goes_on = f" (--resume goes on with the same run alone; {_REPLACES})" if known else ""
                raise ValueError(f"{error}{goes_on}") from error
            workers.by_first(lambda: _remove(new))  # of another run that was to replace it
            rows = sample_stream(*given, new, options.seed, **how)
        if options.overwrite:
            workers.by_first(lambda: _replace(out, new))
        if workers.rank == 0:
            print(f"{options.out}: {rows.dtype} {tuple(rows.shape)}")
    return 0


def _new(options: argparse.Namespace) -> Path:
    """The file that the samples are written to."""
    return Path(f"{options.out}.new" if options.overwrite else options.out)


def _record(out: Path) -> Path:
    return Path(f"{out}.json")


def _done(record: Path) -> int | None:
    """The samples that a record counts; None where it is no run's, or missing."""
    try:
        content = json.loads(record.read_bytes())
        return content["done"] if isinstance(content["run"], dict) and type(content["done"]) is int else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_unlocked(out: Path) -> None:
    """Raise BlockingIOError where another run is writing to the file."""
    if out.exists():
        with open(out, "rb") as file:
            lock(file, str(out))


def _remove(out: Path) -> None:
    """Remove the file, which no other run may be writing, and its record."""
    _check_unlocked(out)
    out.unlink(missing_ok=True)
    _record(out).unlink(missing_ok=True)


def _replace(out: Path, new: Path) -> None:
    """Give the new file and its record the earlier run's names."""
    _remove(out)
    new.replace(out)
    _record(new).replace(_record(out))


def _kept(options: argparse.Namespace) -> str:
    """What an interrupted run leaves."""
    done = _done(_record(_new(options)))
    if done is None:
        return "nothing is kept"
    return f"{_new(options)} keeps {done} samples: the same command goes on from there"
