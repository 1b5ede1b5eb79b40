"""The one-step flow matching loss.

With data x_1 on the x side, noise x_0 on the y side, z_1 = g_x(x_1), z_0 = g_y(x_0)
and z_t = (1 - t) z_0 + t z_1, t uniform, A_t learns to predict the endpoint:

    latent          mean |A_t z_t - z_1|^2
    data            D(g_x^{-1}(z_1 + s e), x_1)      reconstruction of data from noised latents
    noise           |g_y^{-1}(z_0 + s e) - x_0|^2    reconstruction of noise, likewise
    prediction      D(g_x^{-1}(A_t z_t), x_1)        the decoded prediction

s is the latent noise and D a perceptual distance in the paper, mean squared error
here unless another is passed. Source: arXiv 2510.08570. Never divide the latent
term by the variance of z_1: the scale then explodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linearizer import Linearizer

__all__ = ["FlowMatchingLoss", "one_step_loss"]


class FlowMatchingLoss(NamedTuple):
    """The four terms, each 0-d, and their sum."""

    latent: Tensor
    data: Tensor
    noise: Tensor
    prediction: Tensor

    @property
    def total(self) -> Tensor:
        return self.latent + self.data + self.noise + self.prediction


def one_step_loss(
    f: Linearizer,
    x_1: Tensor,
    x_0: Tensor | None = None,
    *,
    latent_noise: float = 0.3,
    distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> FlowMatchingLoss:
    """The four terms of one-step flow matching for a batch of data.

    Args:
        f: a Linearizer with a time-dependent A; data on the x side, noise on the y side.
        x_1: data [B, ...].
        x_0: noise like x_1; drawn standard normal where left out.
        latent_noise: s, the standard deviation added to latents before decoding.
        distance: D(decoded, x_1) -> 0-d.
    """
    x_0 = torch.randn_like(x_1) if x_0 is None else x_0
    z_1, z_0 = f.gx(x_1), f.gy(x_0)
    t = torch.rand(x_1.shape[0], dtype=x_1.dtype, device=x_1.device)
    weight = t.reshape(-1, *(1,) * (z_1.ndim - 1))
    predicted = f.A((1 - weight) * z_0 + weight * z_1, t=t)

    def noised(z: Tensor) -> Tensor:
        return z + latent_noise * torch.randn_like(z)

    return FlowMatchingLoss(
        latent=F.mse_loss(predicted, z_1),
        data=distance(f.gx_inverse(noised(z_1)), x_1),
        noise=F.mse_loss(f.gy_inverse(noised(z_0)), x_0),
        prediction=distance(f.gx_inverse(predicted), x_1),
    )
