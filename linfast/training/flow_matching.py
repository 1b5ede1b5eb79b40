"""The one-step flow matching loss.

With data x_1 on the x side, noise x_0 on the y side, z_1 = g_x(x_1), z_0 = g_y(x_0) and
z_t = (1 - t) z_0 + t z_1, t uniform, A_t learns to predict the endpoint:

    latent          mean |A_t z_t - z_1|^2
    data            D(g_x^{-1}(z_1 + s e), x_1)      reconstruction of the data from noised latents
    noise           |g_y^{-1}(z_0 + s e) - x_0|^2    reconstruction of the noise, likewise
    prediction      D(g_x^{-1}(A_t z_t), x_1)        the decoded prediction
    likelihood      w (|z_1|^2 / 2 - log|det dg_x|)  per dimension; ours, not the paper's, and off by default

s is the standard deviation of the latent noise, and e is standard normal. D is a perceptual distance in the paper,
and by default the mean squared error here. The last term is the negative log-likelihood of the data under g_x and a
standard normal, up to a constant; it keeps the latents spread out, as a perceptual distance does. Do not divide the
latent term by the variance of z_1: the scale of the latents then diverges. Source: arXiv 2510.08570.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_number, check_tensor, said_of
from ..linearizer import Linearizer
from ..ranges import range_
from ..sampling.sampler import check_over_time
from .objective import DataObjective, check_batch, check_given, check_options, distance_of, no_such_term


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

    def __getattr__(self, name: str) -> NoReturn:
        no_such_term(self, name)


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
    context: Tensor | None = None,
) -> FlowMatchingLoss:
    """The terms of one-step flow matching for a batch of data; their formulas are in this module's docstring.

    Args:
        f: a Linearizer with a time-dependent A; data on the x side, noise on the y side.
        x_1: data [B, ...].
        x_0: noise like x_1; by default drawn standard normal.
        latent_noise: s, the standard deviation of the noise added to latents before decoding.
        distance: D(decoded, x_1), a 0-d tensor.
        likelihood: the weight w; where it is not 0, g_x needs log-determinants and the data should be dequantised.
        t: times [B] in [0, 1); by default drawn uniformly.
        e_1, e_0: the noise e of the reconstructions of data and noise, in the shapes of z_1 and z_0; by default
            drawn standard normal.
        context: what g_x is conditioned on, [B, C] or [1, C], such as one-hot labels; g_y is not given it.

    Raises:
        TypeError: A does not depend on time, or an argument is of another type.
        ValueError: a shape, dtype or device that does not match x_1's.
    """
    with range_("one_step_loss"):
        check_over_time(f)
        check_batch("x_1", x_1)
        check_options(distance, latent_noise=latent_noise, likelihood=likelihood)
        check_given("x_1", x_1, x_1.shape, x_0=x_0)
        check_given("x_1", x_1, x_1.shape[:1], t=t)
        x_0 = torch.randn_like(x_1) if x_0 is None else x_0
        if context is not None:
            check_tensor("context", context, x_1, "x_1", same_dtype=True)
        given = {} if context is None else {"context": context}
        z_1, nll = _encode(f, x_1, likelihood, given)
        z_0 = said_of("x_0", f.gy, x_0)
        check_given("x_1", x_1, z_1.shape, e_1=e_1)
        check_given("x_1", x_1, z_0.shape, e_0=e_0)
        t = torch.rand(x_1.shape[0], dtype=x_1.dtype, device=x_1.device) if t is None else t
        weight = t.reshape(-1, *(1,) * (z_1.ndim - 1))
        predicted = f.A((1 - weight) * z_0 + weight * z_1, t=t)

        def noised(z: Tensor, e: Tensor | None) -> Tensor:
            return z + latent_noise * (torch.randn_like(z) if e is None else e)

        twice = {name: value.expand(len(x_1), -1).repeat(2, 1) for name, value in given.items()}
        reconstructed, decoded = f.gx_inverse(torch.cat((noised(z_1, e_1), predicted)), **twice).chunk(2)
        return FlowMatchingLoss(
            latent=F.mse_loss(predicted, z_1),
            data=distance_of(distance, reconstructed, x_1),
            noise=F.mse_loss(f.gy_inverse(noised(z_0, e_0)), x_0),
            prediction=distance_of(distance, decoded, x_1),
            likelihood=nll,
        )


class OneStepFlowMatching(DataObjective):
    """``one_step_loss`` on a set of data.

    Args:
        f, latent_noise, distance, likelihood: as in ``one_step_loss``.
        data: [N, ...], on f's device; rows are drawn with replacement.
        dequantise: width of the uniform noise added to the data.
        context: what g_x is conditioned on for each row of the data, [N, C], like the data.
    """

    _loss, _optional = staticmethod(one_step_loss), "likelihood"

    def __init__(
        self,
        f: Linearizer,
        data: Tensor,
        *,
        latent_noise: float = 0.3,
        distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        likelihood: float = 0.0,
        dequantise: float = 0.0,
        context: Tensor | None = None,
    ) -> None:
        check_over_time(f)
        super().__init__(f, data, distance, latent_noise=latent_noise, likelihood=likelihood)
        self.dequantise, self.context = check_number("dequantise", dequantise, 0.0), context
        if context is not None:
            check_tensor("context", context, data, "data", same_dtype=True)
            if context.ndim != 2 or len(context) != len(data):
                raise ValueError(f"context must be [{len(data)}, C] for the data; got {tuple(context.shape)}")

    def draw(self, rng: torch.Generator, batch: int) -> dict[str, Tensor]:
        rows = self._rows(rng, batch)
        x_1 = self.data[rows]
        drawn = {} if self.context is None else {"context": self.context[rows]}
        drawn |= {
            "x_1": x_1 + self.dequantise * (torch.empty_like(x_1).uniform_(generator=rng) - 0.5),
            "t": x_1.new_empty(batch).uniform_(generator=rng),
        }
        return drawn | {name: torch.empty_like(x_1).normal_(generator=rng) for name in ("x_0", "e_1", "e_0")}


def _encode(f: Linearizer, x: Tensor, likelihood: float, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """g_x(x), and the weighted negative log-likelihood per dimension."""
    if not likelihood:
        return said_of("x_1", f.gx, x, **given), x.new_zeros(())
    z, log_det = said_of("x_1", f.g_x.forward_and_log_det, x, **given)  # type: ignore[arg-type]
    nll = 0.5 * z.flatten(1).square().sum(1) - log_det
    return z, likelihood * nll.mean() / z[0].numel()
