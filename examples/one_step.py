"""``linfast train one-step``: flow matching whose sampling collapses into one step.

Data and noise share one flow g with a time input (1 for data, 0 for noise), or each has its own flow. A_t is a
TimeLowRank operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linfast.flows import Flow, coupling_flow, image_flow
from linfast.linearizer import Linearizer
from linfast.operators import TimeLowRank
from linfast.sampling import generator, sample
from linfast.training import OneStepFlowMatching

from .data import held_out, load_images
from .runs import Job, Row, Run, Strip, about, psnr, show, timed, trained
from .settings import DEPTH, SIDE, WIDTH, Settings, choice, real, setting, whole

__all__ = ["OneStepModel", "build_one_step", "run_one_step"]

_STEPS = 100
_COUNT = 64
_COLUMNS = 12
_PIXEL_STEP = 2 / 16  # width of the dequantisation: one of 17 grey levels, or the noise of four averaged pixels


@dataclass(frozen=True)
class OneStepModel(Settings):
    """The model and its loss; ``latent_noise`` and ``likelihood`` as in ``one_step_loss``."""

    resolution: int | None = setting(None, "side to average down or pad to (default: at most 16)", whole(1, SIDE))
    flow: str = choice("mlp", "couplings of vectors, or convolutional ones of images", "mlp", "conv")
    depth: int = setting(6, "couplings", whole(1, DEPTH))
    hidden: int = setting(192, "width of their conditioners", whole(1, WIDTH))
    rank: int = setting(16, "of A_t", whole(1, WIDTH))
    time_hidden: int = setting(256, "width of the networks that generate A_t", whole(1, WIDTH))
    separate: bool = setting(False, "one flow per side, in place of one with a time input")
    latent_noise: float = setting(0.1, "standard deviation added to latents before decoding", real())
    likelihood: float = setting(0.5, "weight of a term of ours; 0: the paper's loss", real())


def build_one_step(model: OneStepModel, resolution: int) -> Linearizer:
    """f = g(., t=0)^{-1} A_t g(., t=1), or g_y^{-1} A_t g_x, on grey images of this resolution."""

    def flow(time_features: int) -> Flow:
        if model.flow == "mlp":
            hidden = (model.hidden, model.hidden)
            return coupling_flow(resolution**2, model.depth, hidden, time_features=time_features)
        return image_flow(1, resolution, model.depth, model.hidden, time_features=time_features)

    if model.rank > resolution**2:
        raise ValueError(f"rank must be at most the {resolution**2} pixels; got {model.rank}")
    A_t = TimeLowRank(resolution**2, model.rank, hidden=model.time_hidden)
    if model.separate:
        return Linearizer(flow(0), A_t, flow(0))
    g = flow(16)
    return Linearizer(g.at(t=1.0), A_t, g.at(t=0.0))


def run_one_step(run: Run, model: OneStepModel) -> Linearizer | None:
    """Train, measure, write ``figure.png`` and ``model.safetensors`` to ``run.out``, print the table.

    Returns the trained f, or None in all processes but the first; raises what ``runs.trained`` does.
    """
    images = load_images(run.data, model.resolution)
    resolution = images.shape[-1]
    training, held = held_out(images if model.flow == "conv" else images.flatten(1))

    def build(device: torch.device) -> OneStepFlowMatching:
        f = build_one_step(model, resolution).to(device)
        noise, weight = model.latent_noise, model.likelihood
        data = training.to(device)
        return OneStepFlowMatching(f, data, latent_noise=noise, likelihood=weight, dequantise=_PIXEL_STEP)

    with trained(run, ["figure.png"], {"": Job(build, about(model, training, resolution=resolution))}) as found:
        for f, row in found:
            assert isinstance(f, Linearizer)
            rows, strips = measure_one_step(f, held, run.train.seed)
            square = (-1, 1, resolution, resolution)
            show(run, [row, *rows], {"figure.png": [(label, x.reshape(square)) for label, x in strips]})
            return f
    return None


@torch.no_grad()
def measure_one_step(f: Linearizer, images: Tensor, seed: int) -> tuple[list[Row], list[Strip]]:
    """The table's rows and the figure's strips: samples, inversion, superposition, interpolation.

    Args:
        images: [N, ...] that f was not trained on, in f's shape.
    """
    rng = torch.Generator().manual_seed(seed)
    f_like = next(f.parameters())
    real = images[torch.randperm(len(images), generator=rng)[:_COUNT]].to(f_like)
    noise = torch.randn(_COUNT, *real.shape[1:], generator=rng).to(real)
    many, many_s = timed(lambda: sample(f, noise, steps=_STEPS, one_step=False))
    one_step, collapse_s = timed(lambda: generator(f, steps=_STEPS))
    one, one_s = timed(lambda: one_step(noise))
    found, inversion_s = timed(lambda: one_step.inverse(real))
    again = one_step(found)
    u, v = noise.chunk(2)
    error, superposition_s = timed(lambda: superposition_error(one_step, u, v))
    rows: list[Row] = [
        (f"{_STEPS}-step sampling of {_COUNT}", "", many_s),
        ("collapsing the steps, once", "", collapse_s),
        (f"one-step sampling of {_COUNT}", f"{psnr(one, many):.1f} dB PSNR to {_STEPS}-step", one_s),
        (f"inversion of {_COUNT} held-out digits", f"{psnr(again, real):.1f} dB PSNR after sampling", inversion_s),
        ("superposition in the induced spaces", f"{error:.1e} relative error", superposition_s),
    ]
    strips = [
        ("held-out digits", real),
        (f"sampled in {_STEPS} steps", many),
        ("sampled in one step\nfrom the same noise", one),
        ("held-out digits, inverted to\nnoise and sampled back", again),
        *(("between two held-out digits,\nin the induced space", _path(f, *real[i : i + 2])) for i in (0, 2)),
    ]
    return rows, [(label, part[:_COLUMNS]) for label, part in strips]


def _path(f: Linearizer, start: Tensor, end: Tensor) -> Tensor:
    alpha = torch.linspace(0, 1, _COLUMNS).to(start)
    return f.space_x.interpolate(start.expand(_COLUMNS, *start.shape), end.expand(_COLUMNS, *end.shape), alpha)


def superposition_error(f: Linearizer, u: Tensor, v: Tensor, a: float = 0.7, b: float = -0.4) -> float:
    """|f(a u (+) b v) - (a f(u) (+) b f(v))| / |f(a u (+) b v)|, with the operations of the induced spaces."""
    x, y = f.space_x, f.space_y
    mixed = f(x.add(x.scale(a, u), x.scale(b, v)))
    apart = y.add(y.scale(a, f(u)), y.scale(b, f(v)))
    return float((mixed - apart).norm() / mixed.norm())
