"""``linfast train ign``: the linear idempotent generative network on grey images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linfast.flows import coupling_flow
from linfast.linearizer import Linearizer
from linfast.operators import Projection
from linfast.training import IdempotentGeneration

from .data import held_out, load_images
from .runs import MODEL, Job, Row, Run, Strip, about, psnr, show, trained
from .settings import DEPTH, SIDE, WIDTH, Settings, choice, real, setting, whole

__all__ = ["IdempotentModel", "build_ign", "latent_gaussian", "principal_projection", "run_ign"]

_COLUMNS = 12
_COUNT = 500
_START = 0.05  # logits start at +-0.05: Adam reaches the threshold within a hundred steps


@dataclass(frozen=True)
class IdempotentModel(Settings):
    """The model and its loss; ``rank``, ``isometry`` and ``noise`` as in ``idempotent_loss``."""

    resolution: int | None = setting(None, "side to average down or pad to (default: at most 16)", whole(1, SIDE))
    depth: int = setting(6, "couplings", whole(1, DEPTH))
    hidden: int = setting(192, "width of their conditioners", whole(1, WIDTH))
    coupling: str = choice("additive", "affine has bounded log-scales", "additive", "affine")
    mix: str | None = choice(
        None, "mix after each coupling (default: none)", "lu", "free", "householder", "permute"
    )
    start_rank: int | None = setting(None, "latents kept at the start (default: all)", whole(1, SIDE**2))
    rank: float = setting(0.3, "weight of rank / N", real())
    isometry: float = setting(1e-3, "weight of the isometry term", real())
    noise: float = setting(0.5, "standard deviation of the noise in corrupted images", real())
    settle: float = setting(0.3, "share of the steps that change P", real(1))


def build_ign(model: IdempotentModel, features: int) -> Linearizer:
    """f = g^{-1} P g on vectors [B, features]."""
    hidden = (model.hidden, model.hidden)
    g = coupling_flow(features, model.depth, hidden, transform=model.coupling, mix=model.mix)
    P = Projection(features, features if model.start_rank is None else model.start_rank)
    with torch.no_grad():
        P.logits.mul_(_START)
    return Linearizer(g, P)


def run_ign(run: Run, model: IdempotentModel, denoising: Sequence[float] = (0.0,)) -> list[Linearizer] | None:
    """Train once per weight of the denoising term; figure, models and table go to ``run.out``.

    Args:
        denoising: weights of the denoising term, which is not in the paper; they must differ in six digits. The
            model and checkpoint of each go to a folder ``denoising-WEIGHT``.

    Returns the trained networks, or None in all processes but the first; raises what ``runs.trained`` does.
    """
    folders = {real()("denoising", weight): f"denoising-{weight:g}" for weight in denoising}
    if not denoising or len(set(folders.values())) != len(denoising):
        raise ValueError(f"denoising must be different weights, to six digits; got {list(denoising)}")
    images = load_images(run.data, model.resolution)
    side = images.shape[-1]
    training, held = held_out(images.flatten(1))
    rng = torch.Generator().manual_seed(run.train.seed)
    x = held[torch.randperm(len(held), generator=rng)[:_COUNT]]
    e, pure = (torch.randn(x.shape, generator=rng) for _ in range(2))
    noisy = x + model.noise * e
    looked_at = {"held-out digits": x, f"digits with noise {model.noise:g}": noisy, "noise alone": pure}

    def job(weight: float) -> Job:
        def build(device: torch.device) -> IdempotentGeneration:
            f = build_ign(model, side**2).to(device)
            options = {name: getattr(model, name) for name in ("rank", "isometry", "noise", "settle")}
            return IdempotentGeneration(f, training.to(device), denoising=weight, **options)

        return Job(build, about(model, training, resolution=side, denoising=weight))

    with trained(run, ["figure.png"], {folder: job(weight) for weight, folder in folders.items()}) as found:
        rows: list[Row] = []
        strips, networks = list(looked_at.items()), []
        for weight, (f, row) in zip(folders, found):  # noqa: B905  # found is empty but in the first process
            assert isinstance(f, Linearizer)
            networks.append(f.cpu())
            name = f"denoising {weight:g}"
            measured, drawn = measure_ign(f, training, looked_at, run.train.seed)
            rows += [(f"{name}: {what}", value, seconds) for what, value, seconds in (row, *measured)]
            strips += [(f"{label}\n({name})", x) for label, x in drawn]
        if networks:
            figure = [(label, x[:_COLUMNS].reshape(-1, 1, side, side)) for label, x in strips]
            show(run, rows, {"figure.png": figure}, f"denoising-*/{MODEL}")
        return networks or None


@torch.no_grad()
def measure_ign(
    f: Linearizer, training: Tensor, inputs: dict[str, Tensor], seed: int
) -> tuple[list[Row], list[Strip]]:
    """The table's rows and the figure's strips: idempotency, rank, a comparison with PCA, samples of a Gaussian."""
    rank = int(f.A.rank())
    rows: list[Row] = [("rank of P", f"{rank} of {f.A.n_in}", None)]
    strips = []
    for label, x in inputs.items():
        once = f(x)
        twice = f(once)
        error = float((twice - once).norm() / once.norm())
        rows.append((f"|f(f(x)) - f(x)| / |f(x)|, {label}", f"{error:.1e}", None))
        strips.append((f"f of {label}", once))
    x, noisy = list(inputs.values())[:2]
    pca = principal_projection(training, rank)
    rows += [
        ("f(x) against x", f"{psnr(f(x), x):.2f} dB; PCA of that rank {psnr(pca(x), x):.2f} dB", None),
        ("f(x + noise) against x", f"{psnr(f(noisy), x):.2f} dB; PCA {psnr(pca(noisy), x):.2f} dB", None),
    ]
    sample = latent_gaussian(f, training[:10_000])
    strips.append(("Gaussian on f's\nactive latents: ours", sample(_COLUMNS, seed)))
    return rows, strips


def principal_projection(data: Tensor, rank: int) -> Callable[[Tensor], Tensor]:
    """PCA: the projection onto the first ``rank`` principal directions of data [N, D], through their mean."""
    mean = data.double().mean(0)
    centred = data.double() - mean
    directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, data.shape[1] - rank :]
    return lambda x: (mean + (x.double() - mean) @ directions @ directions.mT).to(x.dtype)


def latent_gaussian(f: Linearizer, data: Tensor) -> Callable[[int, int], Tensor]:
    """Samples g^{-1}(z), where z is drawn from a Gaussian fitted to the latents P g(x) of data; not in the paper.

    Args:
        f: a Linearizer around a Projection.
        data: [N, D].

    Returns:
        (count, seed) -> [count, D].
    """
    z = f.A(f.gx(data)).double()
    mean = z.mean(0)
    variances, directions = torch.linalg.eigh((z - mean).mT.cov(correction=0))
    factor = directions * variances.clamp_min(0).sqrt()

    def sample(count: int, seed: int) -> Tensor:
        e = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return f.gx_inverse((mean + e @ factor.mT).to(data.dtype))

    return sample
