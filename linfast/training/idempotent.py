"""The linear idempotent generative network: a Linearizer around a learned Projection.

f = g^{-1} P g with P = diag(round(sigmoid(logits))), so P P = P and f(f(x)) = f(x) for every x and any weights,
trained or not. The losses, with N the size of a sample:

    reconstruction   D(f(x), x)                                   f leaves data unchanged
    rank             w_r rank(P) / N                              straight-through gradient
    isometry         w_i mean_b | |g(x) - g(0)|^2 - |x|^2 | / N
    denoising        w_d D(f(x + s e), x), e standard normal      ours, not the paper's; off by default

For a linear g the loss keeps a direction where the variance of the data along it is above w_r. In floating point
f(f(x)) = f(x) holds as precisely as g^{-1} inverts g: use additive or bounded couplings. Source: arXiv 2510.08570,
which trains without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_kind, check_number
from ..dispatch import cat
from ..linearizer import Linearizer
from ..operators import Projection
from .objective import DataObjective, check_batch, check_given, check_options, distance_of, no_such_term


class IdempotentLoss(NamedTuple):
    """The weighted terms, each 0-d, and their sum."""

    reconstruction: Tensor
    rank: Tensor
    isometry: Tensor
    denoising: Tensor

    @property
    def total(self) -> Tensor:
        return self.reconstruction + self.rank + self.isometry + self.denoising

    def __getattr__(self, name: str) -> NoReturn:
        no_such_term(self, name)


def idempotent_loss(
    f: Linearizer,
    x: Tensor,
    *,
    rank: float = 0.1,
    isometry: float = 1e-3,
    denoising: float = 0.0,
    noise: float = 0.5,
    e: Tensor | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> IdempotentLoss:
    """The terms for a batch of data x [B, ...]; their formulas are in this module's docstring.

    Args:
        f: a Linearizer around a Projection, with one g.
        rank, isometry, denoising: the weights w_r, w_i, w_d.
        noise: s, the standard deviation of the noise that the denoising term adds.
        e: noise like x; by default drawn standard normal.
        distance: D(output, x), a 0-d tensor.

    Raises:
        TypeError: A is not a Projection, or an argument is of another type.
        ValueError: a shape, dtype or device that does not match x's.
    """
    A = _projection(f)
    check_batch("x", x)
    check_options(distance, rank=rank, isometry=isometry, denoising=denoising, noise=noise)
    check_given("x", x, x.shape, e=e)
    mask = A.mask()
    z, zero = f.gx(cat((x, torch.zeros_like(x[:1])))).split((len(x), 1))
    latents = [z]
    if denoising:
        latents.append(f.gx(x + noise * (torch.randn_like(x) if e is None else e)))
    stays, *denoised = f.gy_inverse(f.A(torch.cat(latents))).chunk(len(latents))
    stretch = (z - zero).flatten(1).square().sum(1) - x.flatten(1).square().sum(1)
    return IdempotentLoss(
        reconstruction=distance_of(distance, stays, x),
        rank=rank * mask.mean(),
        isometry=isometry * stretch.abs().mean() / mask.numel(),
        denoising=denoising * distance_of(distance, denoised[0], x) if denoised else x.new_zeros(()),
    )


def _projection(f: Linearizer) -> Projection:
    """f's A; TypeError where f is not a Linearizer around a Projection."""
    check_kind("f", f, Linearizer)
    check_kind("f.A", f.A, Projection)
    return cast(Projection, f.A)


class IdempotentGeneration(DataObjective):
    """``idempotent_loss`` on a set of data.

    For a kept coordinate, which f reconstructs, only the rank term moves the logit, downwards. For a dropped one
    the reconstruction moves it upwards, so a logit near the threshold goes back and forth. The projection is
    therefore fixed after a share of the steps, and only g is trained from then on.

    Args:
        f, rank, isometry, denoising, noise, distance: as in ``idempotent_loss``.
        data: [N, ...], on f's device; rows are drawn with replacement.
        settle: the share of the steps, from 0 to 1, after which the gradient of the logits is zero.
    """

    _loss, _optional = staticmethod(idempotent_loss), "denoising"

    def __init__(
        self,
        f: Linearizer,
        data: Tensor,
        *,
        settle: float = 0.5,
        rank: float = 0.1,
        isometry: float = 1e-3,
        denoising: float = 0.0,
        noise: float = 0.5,
        distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    ) -> None:
        A = _projection(f)
        super().__init__(f, data, distance, rank=rank, isometry=isometry, denoising=denoising, noise=noise)
        self.settle = check_number("settle", settle, 0.0, 1.0)
        self._settled = False
        A.logits.register_hook(lambda gradient: gradient * (not self._settled))

    def begin_step(self, progress: float) -> None:
        self._settled = progress >= self.settle

    def draw(self, rng: torch.Generator, batch: int) -> dict[str, Tensor]:
        x = self.data[self._rows(rng, batch)]
        return {"x": x, "e": torch.empty_like(x).normal_(generator=rng)}
