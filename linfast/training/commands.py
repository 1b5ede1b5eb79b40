"""The arguments of ``linfast train`` and ``linfast demo``."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..arguments import add_earlier_files
from .trainer import TrainSettings

__all__ = ["add_demo_command", "add_train_command"]

_FIGURES = "matplotlib.figure"


def add_demo_command(commands: Any) -> None:
    """Add ``demo`` to the command line."""
    parser = commands.add_parser("demo", help="train a small Linearizer on digits and look at it")
    parser.add_argument(
        "--quick", action="store_true", help="a smaller model, under 20 seconds; digits stay blurred"
    )
    parser.add_argument(
        "--data", metavar="FILE.npz", help="x: uint8 [N, side, side]; default: scikit-learn's digits"
    )
    _add_output(parser, "linfast-demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(call=_demo)


def add_train_command(commands: Any) -> None:
    """Add ``train one-step | ign | style`` to the command line."""
    train = commands.add_parser("train", help="train one of the paper's applications and look at it")
    applications = train.add_subparsers(dest="application", required=True)
    _add_one_step(applications)
    _add_ign(applications)
    _add_style(applications)


def _add_one_step(applications: Any) -> None:
    parser = applications.add_parser("one-step", help="flow matching that samples in one step")
    _add_grey_images(parser)
    parser.add_argument("--flow", choices=("mlp", "conv"), default="mlp")
    parser.add_argument("--depth", type=int, default=6, help="couplings (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=192, help="conditioners' width (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of A_t (default: %(default)s)")
    parser.add_argument(
        "--time-hidden", type=int, default=256, help="width of A_t's generator (default: %(default)s)"
    )
    parser.add_argument("--separate", action="store_true", help="a flow a side, not one with a time input")
    parser.add_argument("--latent-noise", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument(
        "--likelihood", type=float, default=0.5, help="weight of a term of ours; 0: the paper's loss"
    )
    _add_training(parser, steps=2000, batch=128)
    parser.set_defaults(call=_one_step)


def _add_ign(applications: Any) -> None:
    parser = applications.add_parser("ign", help="the linear idempotent generative network")
    _add_grey_images(parser)
    parser.add_argument("--depth", type=int, default=6, help="couplings (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=192, help="conditioners' width (default: %(default)s)")
    parser.add_argument("--coupling", choices=("additive", "affine"), default="additive")
    parser.add_argument("--mix", choices=("lu", "free", "householder", "permute"), help="after each coupling")
    parser.add_argument("--start-rank", type=int, help="latents kept at the start (default: all)")
    parser.add_argument("--rank", type=float, default=0.3, help="weight of rank / N (default: %(default)s)")
    parser.add_argument("--isometry", type=float, default=1e-3, help="weight (default: %(default)s)")
    parser.add_argument(
        "--settle", type=float, default=0.3, help="share of steps that change P (default: %(default)s)"
    )
    parser.add_argument("--noise", type=float, default=0.5, help="of corrupted images (default: %(default)s)")
    parser.add_argument(
        "--denoising",
        type=float,
        nargs="+",
        default=[0.0],
        help="weights of a term of ours, each trained; 0: the paper",
    )
    _add_training(parser, steps=2500, batch=128, learning_rate=3e-3)
    parser.set_defaults(call=_ign)


def _add_grey_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE.npz", help="x: uint8 [N, side, side] (default: 8 x 8 digits)")
    parser.add_argument("--resolution", type=int, help="side to average down or pad to (default: at most 16)")


def _add_style(applications: Any) -> None:
    parser = applications.add_parser("style", help="modular style transfer")
    parser.add_argument("--data", metavar="FOLDER", required=True, help="PNGs: a content and its styled versions")
    parser.add_argument("--content", default="original", help="name of the content picture (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--depth", type=int, default=8, help="couplings (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="conditioners' channels (default: %(default)s)")
    parser.add_argument("--operators", choices=("generated", "free"), default="generated")
    parser.add_argument("--kernel-size", type=int, default=4, help="(default: %(default)s)")
    _add_training(parser, steps=2000, batch=4)
    parser.set_defaults(call=_style)


def _add_training(parser: argparse.ArgumentParser, steps: int, batch: int, learning_rate: float = 2e-3) -> None:
    _add_output(parser, "linfast-train")
    parser.add_argument("--steps", type=int, default=steps, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="over all processes (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="(default: %(default)s)")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of the weights' moving average; 0: none")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps (default: %(default)s)")


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
    from .apps.output import CHECKPOINT

    folder = Path(options.out)
    found = [str(path) for path in (folder / CHECKPOINT, *sorted(folder.glob(f"*/{CHECKPOINT}"))) if path.exists()]
    if not found:
        return "there is no checkpoint yet, so nothing is kept"
    return f"kept in {', '.join(found)}: the same command with --resume goes on from there"


def _demo(options: argparse.Namespace) -> int:
    _need("sklearn.datasets", _FIGURES)
    from ..demo import DemoSettings, run_demo

    run_demo(_pick(DemoSettings, options))
    return 0


def _one_step(options: argparse.Namespace) -> int:
    from .apps.one_step import OneStepModel, run_one_step

    run_one_step(_run(options, "sklearn.datasets"), _pick(OneStepModel, options))
    return 0


def _ign(options: argparse.Namespace) -> int:
    from .apps.ign import IdempotentModel, run_ign

    run_ign(_run(options, "sklearn.datasets"), _pick(IdempotentModel, options), options.denoising)
    return 0


def _style(options: argparse.Namespace) -> int:
    from .apps.style import StyleModel, run_style

    run_style(_run(options, "PIL.Image"), _pick(StyleModel, options))
    return 0


def _run(options: argparse.Namespace, reader: str) -> Any:
    _need(reader, _FIGURES)
    from .apps.common import Run

    return Run(_pick(TrainSettings, options), **_given(Run, options))


def _need(*modules: str) -> None:
    """Import what reads the data and draws the figure, before the training between them.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"needs {name.partition('.')[0]}: pip install 'linfast[demo]' ({error})") from error


def _pick(cls: Any, options: argparse.Namespace) -> Any:
    """An instance of a dataclass from the options of its fields' names."""
    return cls(**_given(cls, options))


def _given(cls: Any, options: argparse.Namespace) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in fields(cls) if hasattr(options, field.name)}
