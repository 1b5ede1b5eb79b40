"""The arguments of ``linfast demo`` and ``linfast train``.

The demo is ``linfast train one-step`` on small digits, with fixed settings.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from linfast._command import add_earlier_files
from linfast.linearizer import Linearizer

from .ign import IdempotentModel, run_ign
from .one_step import OneStepModel, run_one_step
from .runs import CHECKPOINT, MODEL, Run
from .settings import add_options, picked
from .style import StyleModel, run_style
from .trainer import TrainSettings

__all__ = ["add_demo", "add_train", "run_demo"]


_IMAGES = "an .npz file with x: uint8 [N, side, side] (default: scikit-learn's 8 x 8 digits)"
_PICTURES = "a folder of PNGs: a content picture and its styled versions"
_READERS = {_IMAGES: "sklearn.datasets", _PICTURES: "PIL.Image"}
# Full: digits that can be read, in under a minute on 2 cores. Quick: most can be read, in under 30 s.
_FULL = (OneStepModel(separate=True, likelihood=2.0, mix="permute", operator="diagonal", time_hidden=64), 600)
_QUICK = (replace(_FULL[0], depth=4, hidden=96), 400)


def run_demo(quick: bool = False, seed: int = 0, **where: Any) -> Linearizer | None:
    """Train, measure, write ``figure.png`` and ``model.safetensors``, print the table, as ``run_one_step`` does.

    ``where`` are arguments of ``Run``.
    """
    model, steps = _QUICK if quick else _FULL
    run = Run(TrainSettings(steps=steps, seed=seed, learning_rate=5e-3), **where)
    return run_one_step(run, replace(model, labels=run.data is None))


def add_demo(commands: Any) -> None:
    """Add ``demo`` to the command line."""
    parser = commands.add_parser("demo", help="train a small Linearizer on digits and look at it")
    quick = "a smaller model, under 30 seconds; some digits cannot be read"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help=_IMAGES)

    def call(options: argparse.Namespace) -> None:
        where = {name: getattr(options, name) for name in ("data", "out", "device", "resume", "overwrite")}
        if run_demo(options.quick, options.seed, **where) is not None:
            model = shlex.quote(str(Path(options.out) / MODEL))
            label = "" if options.data else " --label 7"
            print(f"next:    linfast sample --checkpoint {model}{label} --count 10000 --out x.npy")
            print("         linfast train ign")

    _add_run(parser, "linfast-demo", _IMAGES, call)


def add_train(commands: Any) -> None:
    """Add ``train one-step | ign | style`` to the command line."""
    train = commands.add_parser("train", help="train one of the paper's applications and look at it")
    applications = train.add_subparsers(dest="application", required=True)

    def add(
        name: str, text: str, data: str, model: type, run: Callable[..., Any], **training: float
    ) -> argparse.ArgumentParser:
        """Add an application that reads ``data``; ``training`` replaces defaults of TrainSettings."""
        parser: argparse.ArgumentParser = applications.add_parser(name, help=text)
        parser.add_argument("--data", required=data == _PICTURES, help=data)
        add_options(parser, model)
        add_options(parser, TrainSettings, **training)

        def call(options: argparse.Namespace) -> None:
            options.train = picked(TrainSettings, options)
            more = {"denoising": options.denoising} if "denoising" in options else {}
            run(picked(Run, options), picked(model, options), **more)

        _add_run(parser, "linfast-train", data, call)
        return parser

    add("one-step", "flow matching that samples in one step", _IMAGES, OneStepModel, run_one_step, steps=2000)
    ign = add(
        "ign", "the linear idempotent generative network", _IMAGES, IdempotentModel, run_ign, steps=2500,
        learning_rate=3e-3,
    )  # fmt: skip
    weights = "weights of a term of ours, each trained; 0: the paper's loss (default: 0)"
    ign.add_argument("--denoising", type=float, nargs="+", default=[0.0], help=weights)
    add("style", "modular style transfer", _PICTURES, StyleModel, run_style, steps=2000, batch=4)


def _add_run(
    parser: argparse.ArgumentParser, out: str, data: str, call: Callable[[argparse.Namespace], None]
) -> None:
    """Add the options for a run's files and device; the command checks its imports and then calls ``call``."""
    parser.add_argument("--out", default=out, help="folder to write to (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    add_earlier_files(
        parser,
        resume="go on from the checkpoint in --out, with the same settings and data",
        overwrite="remove an earlier run's checkpoints, models and figures from --out when training starts; "
        "without one of the two they are never replaced",
    )

    def checked(options: argparse.Namespace) -> int:
        try:
            for name in (_READERS[data], "matplotlib.figure"):
                importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"needs {name.partition('.')[0]}: pip install 'linfast[demo]' ({error})") from error
        call(options)
        return 0

    parser.set_defaults(call=checked, kept=_kept)


def _kept(options: argparse.Namespace) -> str:
    """A message that says which checkpoints an interrupted run leaves."""
    folder = Path(options.out)
    found = [str(path) for path in (folder / CHECKPOINT, *sorted(folder.glob(f"*/{CHECKPOINT}"))) if path.exists()]
    if not found:
        return "there is no checkpoint yet, so nothing is kept"
    return f"kept in {', '.join(found)}: the same command with --resume goes on from there"
