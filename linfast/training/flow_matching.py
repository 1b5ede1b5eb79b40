"""The one-step flow matching loss.

With data x_1 on the x side, noise x_0 on the y side, z_1 = g_x(x_1), z_0 = g_y(x_0)
and z_t = (1 - t) z_0 + t z_1, t uniform, A_t learns to predict the endpoint:

    latent          mean |A_t z_t - z_1|^2
    data            D(g_x^{-1}(z_1 + s e), x_1)      reconstruction of data from noised latents
    noise           |g_y^{-1}(z_0 + s e) - x_0|^2    reconstruction of noise, likewise
    prediction      D(g_x^{-1}(A_t z_t), x_1)        the decoded prediction
    likelihood      w (|z_1|^2 / 2 - log|det dg_x|)  a dimension; ours, not the paper's, and off by default

The last is the negative log-likelihood of the data under g_x and a standard normal,
less a constant: it keeps latents spread where a perceptual distance would have helped.
s is the latent noise and D a perceptual distance in the paper, mean squared error
here unless another is passed. Source: arXiv 2510.08570. Never divide the latent
term by the variance of z_1: the scale then explodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_function, check_kind, check_number, check_tensor, said_of
from ..linearizer import Linearizer
from ..profiling import annotate
from ..sampling.collapsed import check_time_dependent
from .objective import Objective, check_data, distance_of, draw_rows, normal_like

__all__ = ["FlowMatchingLoss", "OneStepFlowMatching", "one_step_loss"]


class FlowMatchingLoss(NamedTuple):
    """The terms, each 0-d, and their sum."""

    latent: Tensor
    data: Tensor
    noise: Tensor
    prediction: Tensor
    likelihood: Tensor

    @property
    def total(self) -> Tensor:
        return self.latent + self.data + self.noise + self.prediction + self.likelihood


@annotate
def one_step_loss(
    f: Linearizer,
    x_1: Tensor,
    x_0: Tensor | None = None,
    *,
    latent_noise: float = 0.3,
    distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    likelihood: float = 0.0,
    t: Tensor | None = None,
    e_1: Tensor | None = None,
    e_0: Tensor | None = None,
) -> FlowMatchingLoss:
    """The terms of one-step flow matching for a batch of data.

    Args:
        f: a Linearizer with a time-dependent A; data on the x side, noise on the y side.
        x_1: data [B, ...].
        x_0: noise like x_1; drawn standard normal where left out.
        latent_noise: s, the standard deviation added to latents before decoding.
        distance: D(decoded, x_1) -> 0-d.
        likelihood: w; needs a g_x with log-determinants. Dequantise the data first.
        t: times [B] in [0, 1); drawn uniform where left out.
        e_1, e_0: the noise e of the two reconstructions, like their latents; drawn
            standard normal where left out.
    """
    _check_model(f)
    check_tensor("x_1", x_1)
    if x_1.ndim < 2 or not len(x_1):
        raise ValueError(f"x_1 must be [B, ...] and have a row; got {tuple(x_1.shape)}")
    _check_options(latent_noise, distance, likelihood)
    for name, value in (("x_0", x_0), ("t", t), ("e_1", e_1), ("e_0", e_0)):
        if value is not None:
            check_tensor(name, value, x_1, "x_1", same_dtype=True)
    for name, value, shape in (("x_0", x_0, x_1.shape), ("t", t, x_1.shape[:1])):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} for x_1 {tuple(x_1.shape)}; got {tuple(value.shape)}")
    x_0 = torch.randn_like(x_1) if x_0 is None else x_0
    z_1, nll = _encode(f, x_1, likelihood)
    z_0 = said_of("x_0", f.gy, x_0)
    for name, value, z in (("e_1", e_1, z_1), ("e_0", e_0, z_0)):
        if value is not None and value.shape != z.shape:
            raise ValueError(f"{name} must be {tuple(z.shape)}, as its latents; got {tuple(value.shape)}")
    t = torch.rand(x_1.shape[0], dtype=x_1.dtype, device=x_1.device) if t is None else t
    weight = t.reshape(-1, *(1,) * (z_1.ndim - 1))
    predicted = f.A((1 - weight) * z_0 + weight * z_1, t=t)

    def noised(z: Tensor, e: Tensor | None) -> Tensor:
        return z + latent_noise * (torch.randn_like(z) if e is None else e)

    reconstructed, decoded = f.gx_inverse(torch.cat((noised(z_1, e_1), predicted))).chunk(2)
    return FlowMatchingLoss(
        latent=F.mse_loss(predicted, z_1),
        data=distance_of(distance, reconstructed, x_1),
        noise=F.mse_loss(f.gy_inverse(noised(z_0, e_0)), x_0),
        prediction=distance_of(distance, decoded, x_1),
        likelihood=nll,
    )


class OneStepFlowMatching(Objective):
    """``one_step_loss`` on a set of data.

    Args:
        f: as in ``one_step_loss``.
        data: [N, ...], on f's device; rows are drawn with replacement.
        latent_noise, distance, likelihood: as in ``one_step_loss``.
        dequantise: width of the uniform noise added to data.
    """

    model: Linearizer

    def __init__(
        self,
        f: Linearizer,
        data: Tensor,
        *,
        latent_noise: float = 0.3,
        distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        likelihood: float = 0.0,
        dequantise: float = 0.0,
    ) -> None:
        super().__init__()
        _check_model(f)
        check_data(data, f)
        _check_options(latent_noise, distance, likelihood)
        check_number("dequantise", dequantise, 0.0)
        self.model = f
        self.data = data
        self.dequantise = dequantise
        self.latent_noise, self.distance, self.likelihood = latent_noise, distance, likelihood

    def draw(self, rng: torch.Generator, batch: int) -> dict[str, Tensor]:
        x_1 = draw_rows(self.data, rng, batch)
        uniform = torch.rand(x_1.shape, generator=rng, dtype=x_1.dtype, device=x_1.device)
        return {
            "x_1": x_1 + self.dequantise * (uniform - 0.5),
            "t": torch.rand(batch, generator=rng, dtype=x_1.dtype, device=x_1.device),
            **{name: normal_like(x_1, rng) for name in ("x_0", "e_1", "e_0")},
        }

    def forward(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = one_step_loss(
            self.model,
            **drawn,
            latent_noise=self.latent_noise,
            distance=self.distance,
            likelihood=self.likelihood,
        )._asdict()
        if not self.likelihood:
            del terms["likelihood"]
        return terms


def _check_model(f: Linearizer) -> None:
    check_kind("f", f, Linearizer)
    check_time_dependent(f.A, "f.A")


def _check_options(latent_noise: float, distance: object, likelihood: float) -> None:
    check_number("latent_noise", latent_noise, 0.0)
    check_function("distance", distance)
    check_number("likelihood", likelihood, 0.0)


def _encode(f: Linearizer, x: Tensor, likelihood: float) -> tuple[Tensor, Tensor]:
    """g_x(x), and the weighted negative log-likelihood a dimension."""
    if not likelihood:
        return said_of("x_1", f.gx, x), x.new_zeros(())
    z, log_det = said_of("x_1", f.g_x.forward_and_log_det, x)  # type: ignore[arg-type]
    nll = 0.5 * z.flatten(1).square().sum(1) - log_det
    return z, likelihood * nll.mean() / z[0].numel()
