"""What every application ends with: a table, a figure of image strips, and the numbers in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from linfast.io import written_whole
from linfast.tables import aligned

__all__ = ["Row", "Strip", "print_table", "psnr", "save_strips", "timed"]

Row = tuple[str, str, float | None]  # what was done, the value found, the seconds it took
Strip = tuple[str, Tensor]  # a label, and images [n, C, H, W] in [-1, 1]
_Result = TypeVar("_Result")
_WIDTH, _IMAGES, _GAP = 10.0, 8.2, 0.12  # inches: a figure, the images of a row, between two rows


def timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    """The result and the seconds it took."""
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return float(-10 * torch.log10(((image - reference) / 2).square().mean()))


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows in aligned columns."""
    lines = [(what, value, "" if seconds is None else f"{seconds:.4f}") for what, value, seconds in rows]
    print(aligned([("", "", "seconds"), *lines], numeric=2))


def save_strips(strips: Sequence[Strip], path: Path, dpi: int = 120) -> None:
    """Write one PNG with one row per strip: its label, then its images side by side."""
    from matplotlib.figure import Figure

    columns = max(len(images) for _, images in strips)
    height, width = strips[0][1].shape[-2:]
    row = _IMAGES * height / (columns * width) + _GAP
    figure = Figure(figsize=(_WIDTH, len(strips) * row), layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, strips, strict=True):
        separated = F.pad(images.detach().float().cpu().clamp(-1, 1), (0, 1), value=1.0)
        filled = F.pad(separated, (0, 0, 0, 0, 0, 0, 0, columns - len(images)), value=1.0)
        picture = (filled.permute(2, 0, 3, 1).flatten(1, 2)[:, :-1] + 1) / 2  # [H, columns (W + 1) - 1, C]
        axis.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        shown = label.encode(errors="backslashreplace").decode()  # a file's name need be neither text nor a formula
        axis.set_ylabel(shown, rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi, bbox_inches="tight")
