"""The ``linfast`` command: demo, train, sample, bench and info."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._command import Parser, add_earlier_files, flush_output, refuse_existing, report, say, when_interrupted
from .dispatch import usable_device
from .info import info
from .io import load
from .linearizer import Linearizer
from .sampling.integrate import METHODS
from .sampling.outputs import check_regular
from .sampling.sampler import context_of
from .sampling.stream import sample_stream
from .sampling.workers import Workers, process_group


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    An error prints one line on stderr; the status is 2, or 1 for an unexpected error (``python -X dev`` shows its
    traceback). SIGINT and SIGTERM end the ``linfast`` process with status 130 or 143, after a line that says which
    results are saved. In a process of another program, KeyboardInterrupt returns 130 after the same line.

    Raises:
        SystemExit: with 2 for wrong arguments, with 0 for --help.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = argparse.Namespace(command="", kept=lambda options: "nothing was begun")

    def interrupted() -> str:
        return f"linfast {options.command}".strip() + f": interrupted; {options.kept(options)}"

    when_interrupted(interrupted)
    try:
        try:
            if arguments[:1] == ["bench"]:
                options.command, options.kept = "bench", lambda options: "all output so far is complete"
                from linfast.bench.run import main as bench

                return bench(arguments[1:])
            return _parser().parse_args(arguments, options).call(options)
        finally:
            flush_output()
    except BrokenPipeError:
        return 141  # 128 + SIGPIPE, the status of any program that a closed pipe ends
    except KeyboardInterrupt:
        say(interrupted())
        return 130
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        return report(f"linfast {options.command}".strip(), error)


def _parser() -> Parser:
    from linfast.examples.commands import add_demo, add_train

    parser = Parser(prog="linfast", description="Fast Linearizers and coupling flows.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_demo(commands)
    _add_sample(commands)
    add_train(commands)
    commands.add_parser("bench", help="run the benchmarks (see linfast bench --help)")
    about = commands.add_parser("info", help="what a bug report needs: versions, devices and settings")
    about.set_defaults(call=_info, kept=lambda options: "it writes nothing")
    return parser


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="sample a saved Linearizer into a .npy file",
        description="Sample in one step into a .npy file. Started again after an interruption, it resumes. "
        "torchrun --nproc-per-node=N -m linfast.cli sample ... shares the work: the file is the same.",
    )
    default = "(default: %(default)s)"
    parser.add_argument("--checkpoint", required=True, metavar="F.safetensors", help="written by linfast.save")
    parser.add_argument("--count", required=True, type=int, help="number of samples")
    parser.add_argument("--out", required=True, metavar="X.npy")
    parser.add_argument("--batch-size", type=int, default=4096, help=f"samples between saves {default}")
    parser.add_argument("--steps", type=int, default=100, help=f"sampling steps, collapsed into one {default}")
    parser.add_argument("--method", default="rk4", choices=METHODS, help=default)
    parser.add_argument(
        "--label", type=int, help="the class to sample; needed where the model was trained with labels"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help=f"cpu, cuda, ... {default}")
    add_earlier_files(
        parser,
        resume="resume --out; optional: the same command resumes too; another run's file is refused",
        overwrite="replace another run's --out and its record, once there is room for this run's",
    )
    parser.set_defaults(call=_sample, kept=_kept)


def _sample(options: argparse.Namespace) -> int:
    for name, largest in {"count": 2**53, "batch_size": 2**53, "steps": 10**6}.items():
        if getattr(options, name) > largest:
            raise ValueError(f"{name} must be at most {largest}; got {getattr(options, name)}")
    out, record = options.out, f"{options.out}.json"
    for path in (out, record):
        check_regular(path)
        if all(map(os.path.exists, (path, options.checkpoint))) and os.path.samefile(path, options.checkpoint):
            raise FileExistsError(
                f"{path} exists and has no record of a run: it is the checkpoint; choose another --out"
            )
    known, replaces = os.path.exists(record), "--overwrite replaces it"
    if known and _done(record) is None:
        raise FileExistsError(f"{record} is not a record of a run: move it, or choose another --out")
    if options.resume and not known:
        raise FileNotFoundError(f"{record}: no record of a run to resume")
    begun = os.path.exists(out) and os.path.getsize(out) == 0  # a run that was killed before its first record
    if not options.overwrite and not known and not begun:
        refuse_existing([out], f"without a record --resume cannot resume it; {replaces}")
    with process_group(usable_device(options.device), "gloo") as device:  # for row counts and errors only
        f = load(options.checkpoint, device)
        if not isinstance(f, Linearizer):
            raise ValueError(f"{options.checkpoint} holds a {type(f).__name__}: sample takes a Linearizer")
        f = _of_class(f, options.label)
        how = {"steps": options.steps, "method": options.method, "progress": True, "overwrite": options.overwrite}
        try:
            rows = sample_stream(f.eval(), options.count, options.batch_size, out, options.seed, **how)
        except ValueError as error:
            goes_on = f" (--resume resumes the same run only; {replaces})" if known else ""
            raise ValueError(f"{error}{goes_on}") from error
        if Workers.current().rank == 0:
            print(f"{out}: {rows.dtype} {tuple(rows.shape)}")
    return 0


def _of_class(f: Linearizer, label: int | None) -> Linearizer:
    """f with the context of its g_x fixed at a one-hot label; ValueError where g_x takes no label, or needs one."""
    classes = context_of(f.g_x)
    if label is None:
        if classes:
            raise ValueError(f"the model takes labels: pass --label, one of 0 to {classes - 1}")
        return f
    if not 0 <= label < classes:
        known = f"0 to {classes - 1}" if classes else "none: the model takes none, or has a fixed one"
        raise ValueError(f"label must be one of {known}; got {label}")
    context = next(f.parameters()).new_zeros(1, classes)
    context[0, label] = 1
    return Linearizer(f.g_x.at(context=context), f.A, f.g_y)  # type: ignore[operator]


def _done(record: str) -> int | None:
    """The number of samples that a run's record counts as done; None where the file is missing or not a record."""
    try:
        content = json.loads(Path(record).read_bytes())
        return content["done"] if isinstance(content["run"], dict) and type(content["done"]) is int else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _kept(options: argparse.Namespace) -> str:
    """A line that says how many samples an interrupted run has saved."""
    done = _done(f"{options.out}.json")
    if done is None:
        return "nothing is kept"
    return f"{options.out} keeps {done} samples: the same command resumes from there"


def _info(options: argparse.Namespace) -> int:
    print(info())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
