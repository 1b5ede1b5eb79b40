"""``linfast train ign``: the linear idempotent generative network on grey images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linfast.flows import coupling_flow
from linfast.io import save
from linfast.linearizer import Linearizer
from linfast.operators import Projection
from linfast.training import IdempotentGeneration

from .data import held_out, load_images
from .report import Row, Strip, print_table, psnr, save_strips
from .runs import CHECKPOINT, Run, about, train
from .settings import DEPTH, SIDE, WIDTH, Settings, real, setting, whole

__all__ = ["IdempotentModel", "build_ign", "latent_gaussian", "principal_projection", "run_ign"]

_COLUMNS = 12
_COUNT = 500
_START = 0.05  # logits start at +-0.05: Adam reaches the threshold within a hundred steps


@dataclass(frozen=True)
class IdempotentModel(Settings):
    """The model and its loss; ``rank``, ``isometry`` and ``noise`` as in ``idempotent_loss``.

    Raises:
        TypeError, ValueError: a value out of its range, by its name.
    """

    resolution: int | None = setting(None, "side to average down or pad to (default: at most 16)", whole(1, SIDE))
    depth: int = setting(6, "couplings", whole(1, DEPTH))
    hidden: int = setting(192, "width of their conditioners", whole(1, WIDTH))
    coupling: str = setting("additive", "affine has bounded log-scales", choices=("additive", "affine"))
    mix: str | None = setting(
        None, "mix after each coupling (default: none)", choices=("lu", "free", "householder", "permute")
    )
    start_rank: int | None = setting(None, "latents kept at the start (default: all)", whole(1, SIDE**2))
    rank: float = setting(0.3, "weight of rank / N", real())
    isometry: float = setting(1e-3, "weight of the isometry term", real())
    noise: float = setting(0.5, "standard deviation of the noise in corrupted images", real())
    settle: float = setting(0.3, "share of the steps that change P", real(1))


def build_ign(model: IdempotentModel, features: int) -> Linearizer:
    """f = g^{-1} P g on vectors [B, features]."""
    hidden = (model.hidden, model.hidden)
    g = coupling_flow(features, model.depth, hidden, coupling=model.coupling, mix=model.mix)
    P = Projection(features, features if model.start_rank is None else model.start_rank)
    with torch.no_grad():
        P.logits.mul_(_START)
    return Linearizer(g, P)


def run_ign(run: Run, model: IdempotentModel, denoising: Sequence[float] = (0.0,)) -> list[Linearizer] | None:
    """Train once per weight of the denoising term; figure, models and table go to ``run.out``.

    Args:
        denoising: weights of the term that is ours; 0 is the paper's loss. The model and checkpoint of each go to
            a folder ``denoising-WEIGHT``.

    Returns the trained networks, or None in all processes but the first; raises what ``runs.train`` does.
    """
    folders = _folders(denoising)
    files = [f"{folder}/{name}" for folder in folders.values() for name in ("model.safetensors", CHECKPOINT)]
    with run.output("figure.png", *files) as output:
        images = load_images(run.data, model.resolution)
        side = images.shape[-1]
        training, held = held_out(images.flatten(1))
        looked_at = _inputs(held, run.train.seed, model.noise)
        strips = [(label, x) for label, x in looked_at.items()]
        rows: list[Row] = []
        networks = []
        for weight, folder in folders.items():

            def build(device: torch.device, weight: float = weight) -> IdempotentGeneration:
                f = build_ign(model, side**2).to(device)
                options = {name: getattr(model, name) for name in ("rank", "isometry", "noise", "settle")}
                return IdempotentGeneration(f, training.to(device), denoising=weight, **options)

            settings = about(model, training, resolution=side, denoising=weight)
            trained = train(run, output, build, settings, folder)
            if trained is None:
                continue
            trainer, trained_row = trained
            f = trainer.model.cpu()
            assert isinstance(f, Linearizer)
            save(f, run.folder / folder / "model.safetensors")
            name = f"denoising {weight:g}"
            found, drawn = measure_ign(f, training, looked_at, run.train.seed)
            rows += [(f"{name}: {what}", value, seconds) for what, value, seconds in (trained_row, *found)]
            strips += [(f"{label}\n({name})", x) for label, x in drawn]
            networks.append(f)
        if not networks:
            return None
        square = (-1, 1, side, side)
        path = run.folder / "figure.png"
        save_strips([(label, x[:_COLUMNS].reshape(square)) for label, x in strips], path)
        print_table(rows)
        print(f"figure: {path}\nmodels: {run.folder}/denoising-*/model.safetensors")
        return networks


def _folders(denoising: Sequence[float]) -> dict[float, str]:
    """The folder of each weight.

    Raises:
        ValueError: a weight that is negative or not finite, or two of one folder's name.
    """
    for weight in denoising:
        real()("denoising", weight)
    folders = {weight: f"denoising-{weight:g}" for weight in denoising}
    if not denoising or len(set(folders.values())) != len(denoising):
        raise ValueError(f"denoising must be different weights, to six digits; got {list(denoising)}")
    return folders


def _inputs(held: Tensor, seed: int, noise: float) -> dict[str, Tensor]:
    """Held-out images, the same with noise, and noise alone, each [n, D]."""
    rng = torch.Generator().manual_seed(seed)
    x = held[torch.randperm(len(held), generator=rng)[:_COUNT]]
    e, pure = (torch.randn(x.shape, generator=rng) for _ in range(2))
    return {"held-out digits": x, f"digits with noise {noise:g}": x + noise * e, "noise alone": pure}


@torch.no_grad()
def measure_ign(
    f: Linearizer, training: Tensor, inputs: dict[str, Tensor], seed: int
) -> tuple[list[Row], list[Strip]]:
    """The table's rows and the figure's strips: idempotency, rank, PCA beside it, a Gaussian's samples."""
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
    """Samples g^{-1}(z), where z is drawn from the Gaussian of the data's kept latents P g(x); not in the paper.

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
