"""The demo's model and its training: the paper's one-step recipe at the size of a digit.

One flow g serves both sides, told them apart by a time input (1 for data, 0 for noise),
around a time-dependent low-rank A_t. The loss is ``one_step_loss`` with mean squared
error for the paper's LPIPS, whose weights cannot be bundled, and a likelihood term on
dequantised pixels, which is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flows import coupling_flow
from ..linearizer import Linearizer
from ..operators import TimeLowRank
from ..training import one_step_loss

__all__ = ["build", "train"]

_LATENT_NOISE = 0.1
_LIKELIHOOD = 0.5
_BATCH = 128
_LEARNING_RATE = 2e-3
_PIXEL_STEP = 2 / 16


def build(features: int, depth: int, hidden: int, rank: int) -> Linearizer:
    """f = g(., t=0)^{-1} A_t g(., t=1) on vectors [B, features]."""
    g = coupling_flow(features, depth, (hidden, hidden), time_features=16)
    return Linearizer(g.at(t=1.0), TimeLowRank(features, rank), g.at(t=0.0))


def train(f: Linearizer, images: Tensor, iterations: int, seed: int, progress: bool = True) -> float:
    """Train f on images [N, side, side]; returns the last loss.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    from tqdm import trange

    torch.manual_seed(seed)
    pixels = images.flatten(1)
    optimizer = torch.optim.Adam(f.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=iterations, pct_start=0.1)
    steps = trange(iterations, desc="training", disable=not progress, mininterval=0.5)
    value = float("nan")
    for step in steps:
        rows = torch.randint(len(pixels), (_BATCH,)).to(pixels.device)
        x = pixels[rows] + _PIXEL_STEP * (torch.rand(_BATCH, pixels.shape[1]).to(pixels) - 0.5)
        loss = one_step_loss(f, x, latent_noise=_LATENT_NOISE, likelihood=_LIKELIHOOD).total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(f.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == iterations - 1:
            value = float(loss.detach())
            if not torch.isfinite(loss.detach()):
                raise FloatingPointError(f"the loss is {value} at step {step}")
            steps.set_postfix(loss=f"{value:.3f}")
    return value
