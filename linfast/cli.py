"""The ``linfast`` command: demo, train, sample, bench and info."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from ._command import Parser, flush_output, report, say, when_interrupted

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    An error is one line on stderr and status 2, or 1 where linfast did not foresee it (``python -X dev`` shows
    its traceback). SIGINT and SIGTERM end the ``linfast`` process with a line that says what is kept, and status
    130 or 143; in another program's process a KeyboardInterrupt does.

    Raises:
        SystemExit: wrong arguments, 2; --help, 0.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = argparse.Namespace(command="", kept=lambda options: "nothing was begun")

    def interrupted() -> str:
        return f"linfast {options.command}".strip() + f": interrupted; {options.kept(options)}"

    when_interrupted(interrupted)
    try:
        try:
            if arguments[:1] == ["bench"]:
                options.command, options.kept = "bench", lambda options: "what it printed and wrote so far is whole"
                from linfast.bench.run import main as bench

                return bench(arguments[1:])
            return _parser().parse_args(arguments, options).call(options)
        finally:
            flush_output()
    except BrokenPipeError:
        return 141  # 128 and the number of SIGPIPE, as of any program that a closed pipe ends
    except KeyboardInterrupt:
        say(interrupted())
        return 130
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        return report(f"linfast {options.command}".strip(), error)


def _parser() -> Parser:
    from linfast.examples.commands import add_demo, add_train

    from .sampling.command import add_sample

    parser = Parser(prog="linfast", description="Fast Linearizers and coupling flows.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_demo(commands)
    add_sample(commands)
    add_train(commands)
    commands.add_parser("bench", help="run the benchmarks (see linfast bench --help)")
    info = commands.add_parser("info", help="versions and devices")
    info.set_defaults(call=_info, kept=lambda options: "it writes nothing")
    return parser


def _info(options: argparse.Namespace) -> int:
    import torch

    from ._version import __version__

    rows = {"linfast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy", "safetensors"):
        rows[name] = "not installed"
        with suppress(PackageNotFoundError):
            rows[name] = version(name)
    rows["threads"] = str(torch.get_num_threads())
    count = torch.cuda.device_count()
    rows["cuda"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "no device"
    print("\n".join(f"{name:12}{value}" for name, value in rows.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
