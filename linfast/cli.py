"""The ``linfast`` command: demo, train, sample, bench and info."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .training.commands import add_train_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of use and of data are one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:
        from linfast.bench.run import main as bench

        return bench(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return options.call(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"linfast {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from .sampling.command import add_sample

    parser = argparse.ArgumentParser(prog="linfast", description="Fast Linearizers and coupling flows.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small Linearizer on digits and look at it")
    demo.add_argument("--quick", action="store_true", help="a smaller model, under 20 seconds; digits stay blurred")
    demo.add_argument("--data", metavar="FILE.npz", help="x: uint8 [N, side, side]; default: scikit-learn's digits")
    demo.add_argument("--out", default="linfast-demo", help="folder to write to (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    demo.set_defaults(call=_demo)
    add_sample(commands)
    add_train_command(commands)
    commands.add_parser("bench", help="run the benchmarks (see linfast bench --help)")
    commands.add_parser("info", help="versions and devices").set_defaults(call=_info)
    return parser


def _demo(options: argparse.Namespace) -> int:
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'linfast[demo]'")
    from .demo import DemoSettings, run_demo

    names = ("data", "out", "seed", "device", "quick")
    run_demo(DemoSettings(**{name: getattr(options, name) for name in names}))
    return 0


def _info(options: argparse.Namespace) -> int:
    import torch

    from ._version import __version__

    rows = {"linfast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy", "safetensors"):
        rows[name] = _version(name)
    rows["threads"] = str(torch.get_num_threads())
    count = torch.cuda.device_count()
    rows["cuda"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "no device"
    print("\n".join(f"{name:12}{value}" for name, value in rows.items()))
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())
