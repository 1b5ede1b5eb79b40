"""``linfast train style``: one g, an operator a style, on a content picture and its styled versions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ...flows import image_flow
from ...io import save
from ...linearizer import Linearizer
from ...operators import DepthwiseConv
from ..checks import LARGEST, check_fields, one_of, whole
from ..data import load_pictures
from ..style_transfer import GeneratedDepthwise, ModularStyle, StyleTransfer
from .common import Run, about, train
from .output import CHECKPOINT
from .report import Row, psnr, save_strips, table

__all__ = ["StyleModel", "build_style", "run_style"]

_STRIP = 7  # pictures in an interpolation


_SETTINGS = {
    "resolution": whole(2, LARGEST["side"]),
    "depth": whole(1, LARGEST["depth"]),
    "width": whole(1, LARGEST["width"]),
    "operators": one_of("generated", "free"),
    "kernel_size": whole(1, LARGEST["side"]),
}


@dataclass(frozen=True)
class StyleModel:
    """The model.

    Attributes:
        resolution: side of the pictures, even.
        content: name of the content picture; all others in the folder are its styles.
        depth, width: couplings, and their conditioners' channels.
        operators: "generated" (the paper's: one network makes every style's kernel) or
            "free" (a trained kernel a style).
        kernel_size: of the depthwise kernels.

    Raises:
        ValueError: one that is out of its range, by its name.
    """

    resolution: int = 128
    content: str = "original"
    depth: int = 8
    width: int = 32
    operators: str = "generated"
    kernel_size: int = 4

    def __post_init__(self) -> None:
        check_fields(self, _SETTINGS)


def build_style(model: StyleModel, names: list[str]) -> ModularStyle:
    """The styles of these names, untrained."""
    size = (model.resolution, model.resolution)
    g = image_flow(3, model.resolution, model.depth, model.width)
    if model.operators == "generated":
        return ModularStyle(g, GeneratedDepthwise(len(names), 3, model.kernel_size, size), names)
    return ModularStyle(g, [DepthwiseConv(3, model.kernel_size, size) for _ in names], names)


def run_style(run: Run, model: StyleModel) -> ModularStyle | None:
    """Train, measure, write figures and ``model.safetensors`` to ``run.out``, print the table.

    Returns:
        The trained styles; None in all processes but the first.

    Raises:
        ValueError, FileNotFoundError: unusable pictures, device or options, before any work.
        FileExistsError: an earlier run's files in ``run.out``, and neither ``resume`` nor ``overwrite``.
        NonFiniteLoss: as for ``Trainer.run``.
    """
    if run.data is None:
        raise ValueError("data must be a folder with a content picture and its styled versions")
    if Path(run.data).resolve() == run.folder.resolve():
        raise ValueError(f"out must not be the folder of the pictures: {run.out}")
    with run.output("model.safetensors", "figure.png", "strips.png", CHECKPOINT) as output:
        pictures = load_pictures(run.data, model.resolution)
        if model.content not in pictures or len(pictures) < 2:
            raise ValueError(
                f"{run.data}: needs {model.content}.png and a styled version; got {', '.join(pictures)}"
            )
        data = about(model, torch.stack(list(pictures.values())), styles=list(pictures))
        content = pictures.pop(model.content)[None]
        names, targets = list(pictures), torch.stack(list(pictures.values()))

        def build(device: torch.device) -> StyleTransfer:
            styles = build_style(model, names).to(device)
            return StyleTransfer(styles, content.to(device), targets[:, None].to(device))

        trained = train(run, output, build, data)
        if trained is None:
            return None
        trainer, trained_row = trained
        styles = trainer.model.cpu()
        assert isinstance(styles, ModularStyle)
        save(styles, run.folder / "model.safetensors")
        rows, figure, strips = measure_style(styles, content, targets)
        figure.insert(0, ("content, and its\nstyles to learn", torch.cat((content, targets))))
        save_strips(figure, run.folder / "figure.png")
        save_strips(strips, run.folder / "strips.png")
        print(table((trained_row, *rows)))
        print(f"figures: {run.folder}/figure.png, strips.png\nmodel:   {run.folder / 'model.safetensors'}")
        return styles


_Strips = list[tuple[str, Tensor]]


@torch.no_grad()
def measure_style(styles: ModularStyle, content: Tensor, targets: Tensor) -> tuple[list[Row], _Strips, _Strips]:
    """Rows; strips of styles and compositions; a strip for each pair's interpolation."""
    outputs = {name: styles.style(name)(content) for name in styles.names}
    rows: list[Row] = [
        (f"{name} against its target", f"{psnr(outputs[name], target):.2f} dB PSNR", None)
        for name, target in zip(styles.names, targets[:, None], strict=True)
    ]
    again = styles.g.inverse(styles.g(content))
    rows.append(("content through g and back", f"{psnr(again, content):.1f} dB PSNR", None))
    strips, exact = [], True
    for first, second in combinations(styles.names, 2):
        alphas = torch.linspace(1, 0, _STRIP).tolist()
        strip = torch.cat([styles.interpolate(first, second, alpha)(content) for alpha in alphas])
        exact &= torch.equal(strip[:1], outputs[first]) and torch.equal(strip[-1:], outputs[second])
        strips.append((f"{first}\nto {second}", strip))
    rows.append(("ends of the strips are the styles", "bit for bit" if exact else "NOT exactly", None))
    chained = [(names, styles.compose(*names)) for names in zip(styles.names, styles.names[1:], strict=False)]
    error = max(_chaining_error(styles, names, f, content) for names, f in chained)
    rows.append(("composed operators against styles in turn", f"{error:.1e} relative error", None))
    figure = [("content through g and\nback; learned styles", torch.cat((again, *outputs.values())))]
    if chained:
        figure.append(("composed: each style,\nthen the next one", torch.cat([f(content) for _, f in chained])))
    return rows, figure, strips


def _chaining_error(styles: ModularStyle, names: tuple[str, ...], composed: Linearizer, content: Tensor) -> float:
    in_turn = content
    for name in names:
        in_turn = styles.style(name)(in_turn)
    return float((composed(content) - in_turn).norm() / in_turn.norm())
