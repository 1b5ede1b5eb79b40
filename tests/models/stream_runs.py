"""Small runs of sample_stream into a file, and their models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import linfast as lf
from tests.laws.zoo import perturb

N = 4
HOW: dict[str, Any] = {"steps": 3, "method": "euler", "block_size": 4, "noise_shape": (N,), "progress": False}


def streamed(f: nn.Module, path: Path, count: int = 12, batch_size: int = 4, **how: Any) -> np.ndarray:
    return np.array(lf.sample_stream(f, count, batch_size, path, **{**HOW, **how}))


def rows_of(f: nn.Module, count: int = 12) -> np.ndarray:
    return torch.cat(list(lf.sample_stream(f, count, 4, **HOW))).detach().numpy()


def linearizer(
    activation: str = "silu", alpha: float = 0.0, times: tuple[float, float] = (1.0, 0.0), factor: float = 2.0
) -> lf.Linearizer:
    torch.manual_seed(0)
    g = perturb(lf.coupling_flow(N, 2, (8,), activation=activation, time_features=4))
    A = factor * lf.TimeLowRank(N, 1, alpha=alpha, time_features=4, hidden=8)
    return lf.Linearizer(g.at(t=times[0]), A, g.at(t=times[1]))


class Map(nn.Module):
    """x to f(x) + constant: a module that ``save`` does not support."""

    gain = 1.0

    def __init__(self, f: Callable[[Tensor], Tensor] = torch.tanh, constant: Any = 0.0) -> None:
        super().__init__()
        self.f, self.constant = f, constant

    def forward(self, x: Tensor) -> Tensor:
        constant = self.constant[0] if isinstance(self.constant, (list, tuple)) else self.constant
        return self.gain * self.f(x) + torch.as_tensor(constant)
