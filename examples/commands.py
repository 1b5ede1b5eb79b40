"""The arguments of ``linfast demo`` and ``linfast train``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from linfast._command import add_earlier_files

from .demo import run_demo
from .ign import IdempotentModel, run_ign
from .one_step import OneStepModel, run_one_step
from .runs import CHECKPOINT, Run
from .settings import add_options, picked
from .style import StyleModel, run_style
from .trainer import TrainSettings

__all__ = ["add_demo", "add_train"]


class _Application(NamedTuple):
    help: str
    data: str
    reader: str  # the module that reads the data
    model: type
    run: Callable[..., Any]
    training: dict[str, Any]  # its own defaults of TrainSettings


_IMAGES = "an .npz file with x: uint8 [N, side, side] (default: scikit-learn's 8 x 8 digits)"
_PICTURES = "a folder of PNGs: a content picture and its styled versions"
_DIGITS = "sklearn.datasets"
_APPLICATIONS = {
    "one-step": _Application(
        "flow matching that samples in one step",
        _IMAGES, _DIGITS, OneStepModel, run_one_step, {"steps": 2000},
    ),
    "ign": _Application(
        "the linear idempotent generative network",
        _IMAGES, _DIGITS, IdempotentModel, run_ign, {"steps": 2500, "learning_rate": 3e-3},
    ),
    "style": _Application(
        "modular style transfer",
        _PICTURES, "PIL.Image", StyleModel, run_style, {"steps": 2000, "batch": 4},
    ),
}  # fmt: skip


def add_demo(commands: Any) -> None:
    """Add ``demo`` to the command line."""
    parser = commands.add_parser("demo", help="train a small Linearizer on digits and look at it")
    parser.add_argument(
        "--quick", action="store_true", help="a smaller model, under 20 seconds; digits stay blurred"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help=_IMAGES)
    _add_output(parser, "linfast-demo")

    def call(options: argparse.Namespace) -> int:
        _need(_DIGITS)
        where = {name: getattr(options, name) for name in ("data", "out", "device", "resume", "overwrite")}
        run_demo(options.quick, options.seed, **where)
        return 0

    parser.set_defaults(call=call)


def add_train(commands: Any) -> None:
    """Add ``train one-step | ign | style`` to the command line."""
    train = commands.add_parser("train", help="train one of the paper's applications and look at it")
    applications = train.add_subparsers(dest="application", required=True)
    for name, application in _APPLICATIONS.items():
        parser = applications.add_parser(name, help=application.help)
        parser.add_argument("--data", required=application.data == _PICTURES, help=application.data)
        add_options(parser, application.model)
        if name == "ign":
            parser.add_argument(
                "--denoising", type=float, nargs="+", default=[0.0],
                help="weights of a term of ours, each trained; 0: the paper's loss (default: 0)",
            )  # fmt: skip
        add_options(parser, TrainSettings, **application.training)
        _add_output(parser, "linfast-train")
        parser.set_defaults(call=_train)


def _train(options: argparse.Namespace) -> int:
    application = _APPLICATIONS[options.application]
    _need(application.reader)
    options.train = picked(TrainSettings, options)
    more = (options.denoising,) if options.application == "ign" else ()
    application.run(picked(Run, options), picked(application.model, options), *more)
    return 0


def _add_output(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", default=out, help="folder to write to (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    add_earlier_files(
        parser,
        resume="go on from the checkpoint in --out, with the same settings and data",
        overwrite="remove an earlier run's checkpoints, models and figures from --out when training starts; "
        "without one of the two they are never replaced",
    )
    parser.set_defaults(kept=_kept)


def _kept(options: argparse.Namespace) -> str:
    """What an interrupted run leaves."""
    folder = Path(options.out)
    found = [str(path) for path in (folder / CHECKPOINT, *sorted(folder.glob(f"*/{CHECKPOINT}"))) if path.exists()]
    if not found:
        return "there is no checkpoint yet, so nothing is kept"
    return f"kept in {', '.join(found)}: the same command with --resume goes on from there"


def _need(reader: str) -> None:
    """Import what reads the data and draws the figure, before the training between the two.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        for name in (reader, "matplotlib.figure"):
            importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"needs {name.partition('.')[0]}: pip install 'linfast[demo]' ({error})") from error
