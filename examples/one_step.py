"""``linfast train one-step``: flow matching whose sampling collapses into one step.

Data and noise share one flow g with a time input (1 for data, 0 for noise), or each has its own flow. A_t is a
TimeLowRank or a TimeDiagonal operator. With labels the data's flow is conditioned on the class of the image: one
model then samples the class that it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linfast.flows import Flow, coupling_flow, image_flow
from linfast.linearizer import Linearizer
from linfast.operators import TimeDiagonal, TimeLowRank
from linfast.sampling import generator, sample
from linfast.training import OneStepFlowMatching

from .data import held_out, load_images, load_labels
from .runs import Job, Row, Run, Strip, about, psnr, show, timed, trained
from .settings import DEPTH, SIDE, WIDTH, Settings, choice, real, setting, whole

__all__ = ["OneStepModel", "build_one_step", "conditioned", "run_one_step"]

_STEPS = 100
_COUNT = 64
_TRIES = 10  # of which the fastest counts
_COLUMNS = 10
_RECOGNISED = 1000  # samples whose class is checked
_NOISE_DEPTH = 2  # couplings of the noise's own flow: noise is normal before it, and has to be normal after it
_PIXEL_STEP = 2 / 16  # width of the dequantisation: one of 17 grey levels, or the noise of four averaged pixels


@dataclass(frozen=True)
class OneStepModel(Settings):
    """The model and its loss; ``latent_noise`` and ``likelihood`` as in ``one_step_loss``."""

    resolution: int | None = setting(None, "side to average down or pad to (default: at most 16)", whole(1, SIDE))
    flow: str = choice("mlp", "couplings of vectors, or convolutional ones of images", "mlp", "conv")
    depth: int = setting(6, "couplings", whole(1, DEPTH))
    hidden: int = setting(192, "width of their conditioners", whole(1, WIDTH))
    mix: str | None = choice(
        None, "mix between couplings, with ActNorms (default: none; with conv lu, without ActNorms)",
        "lu", "free", "householder", "permute",
    )  # fmt: skip
    labels: bool = setting(False, "sample by class: a flow of the data's own takes the label, y of the file")
    operator: str = choice("low-rank", "A_t: U(t) V(t)^T, or U diag(w(t)) V^T in full", "low-rank", "diagonal")
    rank: int = setting(16, "of a low-rank A_t", whole(1, WIDTH))
    time_hidden: int = setting(256, "width of the networks that generate A_t", whole(1, WIDTH))
    separate: bool = setting(False, "one flow per side, in place of one with a time input")
    latent_noise: float = setting(0.1, "standard deviation added to latents before decoding", real())
    likelihood: float = setting(0.5, "weight of a term of ours; 0: the paper's loss", real())


def build_one_step(model: OneStepModel, resolution: int, classes: int = 0) -> Linearizer:
    """f = g(., t=0)^{-1} A_t g(., t=1), or g_y^{-1} A_t g_x, on grey images of this resolution.

    With ``classes``, g_x takes the one-hot class as context.
    """
    pixels = resolution**2

    def flow(depth: int, **inputs: int) -> Flow:
        options: dict[str, Any] = inputs if model.mix is None else {"mix": model.mix, "actnorm": True, **inputs}
        if model.flow == "mlp":
            return coupling_flow(pixels, depth, (model.hidden, model.hidden), **options)
        return image_flow(1, resolution, depth, model.hidden, **options)

    if model.rank > pixels and model.operator == "low-rank":
        raise ValueError(f"rank must be at most the {pixels} pixels; got {model.rank}")
    kind, rank = (TimeLowRank, model.rank) if model.operator == "low-rank" else (TimeDiagonal, pixels)
    A_t = kind(pixels, rank, alpha=0.0, hidden=model.time_hidden)
    if model.separate or classes:
        of_data = flow(model.depth, context_features=classes) if classes else flow(model.depth)
        return Linearizer(of_data, A_t, flow(_NOISE_DEPTH))
    g = flow(model.depth, time_features=16)
    return Linearizer(g.at(t=1.0), A_t, g.at(t=0.0))


def run_one_step(run: Run, model: OneStepModel) -> Linearizer | None:
    """Train, measure, write ``figure.png`` and ``model.safetensors`` to ``run.out``, print the table.

    Returns the trained f, or None in all processes but the first; raises what ``runs.trained`` does.
    """
    images = load_images(run.data, model.resolution)
    resolution = images.shape[-1]
    training, held = held_out(images if model.flow == "conv" else images.flatten(1))
    labels = load_labels(run.data, len(images)) if model.labels else torch.zeros(len(images), 0)
    (classes, held_classes), known = held_out(labels), labels.shape[1]

    def build(device: torch.device) -> OneStepFlowMatching:
        f = build_one_step(model, resolution, known).to(device)
        return OneStepFlowMatching(
            f, training.to(device), latent_noise=model.latent_noise, likelihood=model.likelihood,
            dequantise=_PIXEL_STEP, context=classes.to(device) if known else None,
        )  # fmt: skip

    data = torch.cat((training.flatten(1), classes), 1)
    with trained(run, ["figure.png"], {"": Job(build, about(model, data, resolution=resolution))}) as found:
        for f, row in found:
            assert isinstance(f, Linearizer)
            f.eval()
            rows, strips = measure_one_step(f, held, run.train.seed, held_classes if known else None)
            if known:
                rows += recognised(f, (training, classes), (held, held_classes), run.train.seed)
            square = (-1, 1, resolution, resolution)
            show(run, [row, *rows], {"figure.png": [(label, x.reshape(square)) for label, x in strips]})
            return f
    return None


@torch.no_grad()
def measure_one_step(
    f: Linearizer, images: Tensor, seed: int, classes: Tensor | None = None
) -> tuple[list[Row], list[Strip]]:
    """The table's rows and the figure's strips: samples, inversion, superposition, interpolation.

    Args:
        images: [N, ...] that f was not trained on, in f's shape.
        classes: their classes, one-hot [N, classes], where f takes them.
    """
    rng = torch.Generator().manual_seed(seed)
    like = next(f.parameters())
    chosen = torch.randperm(len(images), generator=rng)[:_COUNT]
    context = None
    if classes is not None:
        chosen = chosen[_in_turn(classes[chosen].argmax(1))]
        context = classes[chosen].to(like)
    real = images[chosen].to(like)
    noise = torch.randn(_COUNT, *real.shape[1:], generator=rng)[: len(real)].to(like)
    f = conditioned(f, context)
    many, many_s = timed(lambda: sample(f, noise, steps=_STEPS, one_step=False), _TRIES)
    one_step, collapse_s = timed(lambda: generator(f, steps=_STEPS), _TRIES)
    one, one_s = timed(lambda: one_step(noise), _TRIES)
    found, inversion_s = timed(lambda: one_step.inverse(real))
    again = one_step(found)
    u, v = noise, noise.flip(0)
    error, superposition_s = timed(lambda: superposition_error(one_step, u, v))
    decibels, difference = psnr(one, many), one - many
    rows: list[Row] = [
        (f"{_STEPS}-step sampling of {_COUNT}", "", many_s),
        ("collapsing the steps, once", "", collapse_s),
        (f"one-step sampling of {_COUNT}", f"{decibels:.1f} dB PSNR to {_STEPS}-step", one_s),
        (f"inversion of {_COUNT} held-out digits", f"{psnr(again, real):.1f} dB PSNR after sampling", inversion_s),
        ("superposition in the induced spaces", f"{error:.1e} relative error", superposition_s),
    ]
    times = int(float(f"{0.9 / float(difference.abs().max().clamp(1e-9)):.0e}"))
    pair = _alike(context)
    between = f if context is None else conditioned(f, context[pair[:1]])
    strips = [
        ("held-out digits", real),
        ("noise", noise / 3),
        (f"sampled in {_STEPS} steps:\n{1e3 * many_s:.0f} ms", many),
        (f"sampled in one step:\n{1e3 * one_s:.0f} ms (and {1e3 * collapse_s:.0f} ms once)", one),
        (f"their difference,\ntimes {times:,} ({decibels:.0f} dB)", difference * times),
        ("between two held-out digits,\nin the induced space", _path(between, *real[pair])),
    ]
    return rows, [(label, part[:_COLUMNS]) for label, part in strips]


@torch.no_grad()
def recognised(f: Linearizer, training: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], seed: int) -> list[Row]:
    """The table's rows on the quality of samples, which are compared with the nearest training image.

    Args:
        training, held: images and their one-hot classes.
    """
    rng = torch.Generator().manual_seed(seed)
    like = next(f.parameters())
    asked = held[1].repeat(-(-_RECOGNISED // len(held[1])), 1)[:_RECOGNISED]
    noise = torch.randn(len(asked), *held[0].shape[1:], generator=rng).to(like)
    samples = generator(conditioned(f, asked.to(like)), steps=_STEPS)(noise).clamp(-1, 1).cpu()

    def nearest(images: Tensor, classes: Tensor) -> tuple[float, float]:
        """The share with a nearest neighbour of the same class, and the mean distance to it."""
        distance, index = torch.cdist(images.flatten(1), training[0].flatten(1)).min(1)
        return float((training[1][index] == classes).all(1).double().mean()), float(distance.mean())

    (share, distance), (real_share, real_distance) = nearest(samples, asked), nearest(*held)
    return [
        ("nearest training digit has the same label", f"{share:.1%} (held-out digits {real_share:.1%})", None),
        ("distance to the nearest training digit", f"{distance:.2f} (held-out digits {real_distance:.2f})", None),
    ]


def conditioned(f: Linearizer, context: Tensor | None) -> Linearizer:
    """f with g_x fixed at a context, [B, C] or [1, C] for all rows; f itself without one."""
    return f if context is None else Linearizer(f.g_x.at(context=context), f.A, f.g_y)  # type: ignore[operator]


def _in_turn(labels: Tensor) -> Tensor:
    """An order in which the classes take turns: 0, 1, 2, ..., 0, 1, 2, ..."""
    earlier = torch.tril(labels[:, None] == labels, -1).sum(1)
    return torch.argsort(earlier * (labels.max() + 1) + labels)


def _alike(context: Tensor | None) -> Tensor:
    """Two rows of one class, where there are such; without classes the first two rows."""
    same = [] if context is None else [rows[:2] for one in context.T if len(rows := one.nonzero()[:, 0]) > 1]
    return same[len(same) * 2 // 5] if same else torch.arange(2)


def _path(f: Linearizer, start: Tensor, end: Tensor) -> Tensor:
    alpha = torch.linspace(0, 1, _COLUMNS).to(start)
    return f.space_x.interpolate(start.expand(_COLUMNS, *start.shape), end.expand(_COLUMNS, *end.shape), alpha)


def superposition_error(f: Linearizer, u: Tensor, v: Tensor, a: float = 0.7, b: float = -0.4) -> float:
    """|f(a u (+) b v) - (a f(u) (+) b f(v))| / |f(a u (+) b v)|, with the operations of the induced spaces."""
    x, y = f.space_x, f.space_y
    mixed = f(x.add(x.scale(a, u), x.scale(b, v)))
    apart = y.add(y.scale(a, f(u)), y.scale(b, f(v)))
    return float((mixed - apart).norm() / mixed.norm())
