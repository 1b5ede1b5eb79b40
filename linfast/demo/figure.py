"""The demo's one picture: five rows of digits."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .measure import Measured

__all__ = ["save_figure"]

_COLUMNS = 12
_GAP = -0.4


def save_figure(measured: Measured, side: int, path: Path) -> None:
    """Write real digits, samples, reconstructions and an interpolation as one PNG."""
    from matplotlib.figure import Figure

    rows = (
        ("real digits", measured.real),
        ("sampled in 100 steps", measured.many_steps),
        ("sampled in one step\nfrom the same noise", measured.one_step),
        ("real digits, inverted to\nnoise and sampled back", measured.reconstructed),
        ("between two real digits,\nin the induced space", measured.interpolation),
    )
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(len(rows), 1)
    for axis, (label, images) in zip(axes, rows, strict=True):
        axis.imshow(_strip(images[:_COLUMNS], side), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=120)


def _strip(images: Tensor, side: int) -> object:
    """[n, side^2] side by side with a grey column between, [side, n (side + 1) - 1]."""
    columns = F.pad(images.reshape(-1, side, side), (0, 1), value=_GAP)
    return columns.permute(1, 0, 2).reshape(side, -1)[:, :-1].cpu().numpy()
