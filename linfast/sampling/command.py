"""``linfast sample``: samples of a saved Linearizer into a .npy file."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch.distributed as dist

from ..device import usable_device
from ..io import load
from .integrate import METHODS
from .stream import sample_stream

__all__ = ["add_sample"]


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
    parser.set_defaults(call=_sample)


def _sample(options: argparse.Namespace) -> int:
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1  # set by torchrun
    device = options.device
    if shared:
        dist.init_process_group("gloo")  # only row counts and errors are exchanged
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    try:
        f = load(options.checkpoint, usable_device(device)).eval()
        how = {"steps": options.steps, "method": options.method}
        rows = sample_stream(f, options.count, options.batch_size, options.out, options.seed, **how)
    finally:
        if shared:
            dist.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{options.out}: {rows.dtype} {tuple(rows.shape)}")
    return 0
