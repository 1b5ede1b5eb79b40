"""Tiny, seeded objectives of each application, and one whose terms can be made to fail."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import linfast as lf
from linfast.training import (
    GeneratedDepthwise,
    IdempotentGeneration,
    ModularStyle,
    Objective,
    OneStepFlowMatching,
    StyleTransfer,
)


def one_step(actnorm: bool = False) -> OneStepFlowMatching:
    torch.manual_seed(1)
    g = lf.coupling_flow(6, 2, (16,), time_features=8, actnorm=actnorm)
    f = lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(6, 2, time_features=8, hidden=16), g.at(t=0.0))
    return OneStepFlowMatching(f, torch.randn(50, 6), latent_noise=0.1, likelihood=0.5, dequantise=0.1)


def idempotent(**options: float) -> IdempotentGeneration:
    torch.manual_seed(1)
    f = lf.Linearizer(lf.coupling_flow(6, 2, (16,), transform="additive"), lf.Projection(6, 4))
    return IdempotentGeneration(f, torch.randn(50, 6), **options)


def styles() -> ModularStyle:
    torch.manual_seed(1)
    return ModularStyle(lf.image_flow(3, 8, 2, 8), GeneratedDepthwise(4, 3, 3, (8, 8), 8, 8), list("abcd"))


def style() -> StyleTransfer:
    model = styles()
    return StyleTransfer(model, torch.randn(2, 3, 8, 8), torch.randn(4, 2, 3, 8, 8))


class Breaking(Objective):
    """Least squares with a second term, 0, that becomes ``value`` at one step; or whose gradient does."""

    def __init__(self, at: int | None = None, value: float = float("nan"), gradient: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Linear(3, 1)
        self.breaks_at, self.value, self.gradient = at, value, gradient
        self.step = -1

    def begin_step(self, progress: float) -> None:
        self.step += 1

    def draw(self, rng: torch.Generator, batch: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, 3, generator=rng)}

    def forward(self, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        fit = self.model(drawn["x"]).square().mean()
        other = 0 * self.model.bias.sum()
        if self.step == self.breaks_at:
            other = (0 * self.model.bias.sum()).sqrt() if self.gradient else other + self.value
        return {"fit": fit, "other": other}
