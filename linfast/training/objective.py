"""What an application trains, and what the objectives share: draws of data and checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..checks import check_number, check_tensor
from ..device import check_values
from ..flows.bijection import Bijection
from ..linearizer import Linearizer

__all__ = ["Objective"]


class Objective(nn.Module):
    """What one application trains: a model, the draw of a batch, and named loss terms.

    Attributes:
        model: what is trained, averaged and returned.
    """

    model: nn.Module

    def begin_step(self, progress: float) -> None:
        """Called before each step with the share of the steps done, in [0, 1), for what changes during training."""

    def draw(self, rng: torch.Generator, batch: int) -> dict[str, Tensor]:
        """The data and random numbers of one step for the whole batch, each [batch, ...], from ``rng`` alone."""
        raise NotImplementedError

    def forward(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms, each 0-d and a mean over the rows drawn; their sum is minimised."""
        raise NotImplementedError


def check_data(data: object, f: Linearizer) -> None:
    """Raise unless ``data`` [N, ...] are inputs of f, on its device, with at least one row."""
    check_tensor("data", data, next(f.parameters(), None), "f", same_dtype=True)
    assert isinstance(data, Tensor)
    check_values("data", data)
    if data.ndim < 2 or not data.numel():
        raise ValueError(f"data must be [N, ...], and not empty; got {tuple(data.shape)}")
    if data[0].numel() != f.A.n_in:
        raise ValueError(f"data must have {f.A.n_in} numbers a row, as f.A takes; got {tuple(data.shape)}")
    if isinstance(f.g_x, Bijection):
        f.g_x._check("data", data, f.g_x.features)


def check_batch(name: str, x: Tensor) -> None:
    """Raise unless x is a batch [B, ...] with at least one row."""
    check_tensor(name, x)
    if x.ndim < 2 or not len(x):
        raise ValueError(f"{name} must be [B, ...] and have a row; got {tuple(x.shape)}")


def check_not_negative(**values: float) -> None:
    """Raise unless each is a finite number of at least 0; the message gives its name."""
    for name, value in values.items():
        check_number(name, value, 0.0)


def distance_of(distance: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor) -> Tensor:
    """``distance(output, target)``; ValueError unless it is a 0-d tensor."""
    value = distance(output, target)
    if not isinstance(value, Tensor) or value.ndim:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"distance must return a 0-d tensor, a mean over the rows; got {got}")
    return value


def draw_rows(data: Tensor, rng: torch.Generator, batch: int) -> Tensor:
    """``batch`` rows of data [N, ...], with replacement."""
    return data[torch.randint(len(data), (batch,), generator=rng, device=data.device)]


def normal_like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise of x's shape, dtype and device."""
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
