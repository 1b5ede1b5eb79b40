"""Objective: what an application trains, and the draws that objectives share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checks import check_tensor

__all__ = ["Objective", "check_data", "draw_rows", "normal_like"]


class Objective(nn.Module):
    """What one application trains: a model, a draw and named loss terms.

    Attributes:
        model: what is trained, averaged and returned.
    """

    model: nn.Module

    def begin_step(self, progress: float) -> None:
        """Called before each step with the share of the steps done, in [0, 1); for what changes in training."""

    def draw(self, rng: torch.Generator, batch: int) -> dict[str, Tensor]:
        """One step's data and random numbers for the whole batch, each [batch, ...], from ``rng`` alone."""
        raise NotImplementedError

    def forward(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms, each 0-d and a mean over the rows drawn; their sum is minimised."""
        raise NotImplementedError


def check_data(data: object, f: nn.Module) -> None:
    """Raise unless these are data [N, ...] on f's device, of which rows can be drawn."""
    check_tensor("data", data, next(f.parameters(), None), "f")
    if not isinstance(data, Tensor) or data.ndim < 2 or not data.numel():
        raise ValueError(f"data must be [N, ...], and not empty; got {tuple(data.shape)}")  # type: ignore[attr-defined]


def draw_rows(data: Tensor, rng: torch.Generator, batch: int) -> Tensor:
    """``batch`` rows of data [N, ...], with replacement."""
    return data[torch.randint(len(data), (batch,), generator=rng, device=data.device)]


def normal_like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise of x's shape, dtype and device."""
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
