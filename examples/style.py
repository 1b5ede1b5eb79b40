"""``linfast train style``: one g and one operator per style, on a content picture and its styled versions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from linfast.flows import image_flow
from linfast.linearizer import Linearizer
from linfast.operators import DepthwiseConv
from linfast.training import GeneratedDepthwise, ModularStyle, StyleTransfer

from .data import load_pictures
from .runs import Job, Row, Run, Strip, about, psnr, show, trained
from .settings import DEPTH, SIDE, WIDTH, Settings, choice, setting, whole

__all__ = ["StyleModel", "build_style", "run_style"]

_STRIP = 7  # pictures in an interpolation


@dataclass(frozen=True)
class StyleModel(Settings):
    """The model, and the name of the content picture; all other pictures in the folder are its styles."""

    resolution: int = setting(128, "side of the pictures, even", whole(2, SIDE))
    content: str = setting("original", "name of the content picture")
    depth: int = setting(8, "couplings", whole(1, DEPTH))
    width: int = setting(32, "channels of their conditioners", whole(1, WIDTH))
    operators: str = choice("generated", "made by one network, or one trained per style", "generated", "free")
    kernel_size: int = setting(4, "of the depthwise kernels", whole(1, SIDE))


def build_style(model: StyleModel, names: list[str]) -> ModularStyle:
    """The styles of these names, untrained."""
    size = (model.resolution, model.resolution)
    g = image_flow(3, model.resolution, model.depth, model.width)
    if model.operators == "generated":
        return ModularStyle(g, GeneratedDepthwise(len(names), 3, model.kernel_size, size), names)
    return ModularStyle(g, [DepthwiseConv(3, model.kernel_size, size) for _ in names], names)


def run_style(run: Run, model: StyleModel) -> ModularStyle | None:
    """Train, measure, write figures and ``model.safetensors`` to ``run.out``, print the table.

    Returns the trained styles, or None in all processes but the first; raises what ``runs.trained`` does.
    """
    if run.data is None:
        raise ValueError("data must be a folder with a content picture and its styled versions")
    if Path(run.data).resolve() == run.folder.resolve():
        raise ValueError(f"out must not be the folder of the pictures: {run.out}")
    pictures = load_pictures(run.data, model.resolution)
    if model.content not in pictures or len(pictures) < 2:
        raise ValueError(f"{run.data}: needs {model.content}.png and a styled version; got {', '.join(pictures)}")
    data = about(model, torch.stack(list(pictures.values())), styles=", ".join(pictures))
    content = pictures.pop(model.content)[None]
    names, targets = list(pictures), torch.stack(list(pictures.values()))

    def build(device: torch.device) -> StyleTransfer:
        return StyleTransfer(build_style(model, names).to(device), content.to(device), targets[:, None].to(device))

    with trained(run, ["figure.png", "strips.png"], {"": Job(build, data)}) as found:
        for styles, row in found:
            assert isinstance(styles, ModularStyle)
            rows, figure, strips = measure_style(styles.cpu(), content, targets)
            figure.insert(0, ("content, and its\nstyles to learn", torch.cat((content, targets))))
            show(run, [row, *rows], {"figure.png": figure, "strips.png": strips})
            return styles
    return None


@torch.no_grad()
def measure_style(
    styles: ModularStyle, content: Tensor, targets: Tensor
) -> tuple[list[Row], list[Strip], list[Strip]]:
    """The table's rows, the strips of styles and compositions, and a strip of interpolations per pair of styles."""
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
