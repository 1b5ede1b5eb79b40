"""Activations of conditioners: each once, with its derivative and the number the kernels know it by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "ACTIVATION_NAMES", "derivative"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}

ACTIVATION_NAMES: tuple[str, ...] = tuple(ACTIVATIONS)
"""A name's place here is its constexpr id in linfast.kernels.mlp."""


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_derivative(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density


_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: (x > 0).to(x.dtype),
    "silu": _silu_derivative,
    "tanh": lambda x: 1 - torch.tanh(x).square(),
    "gelu": _gelu_derivative,
}


def derivative(name: str, x: Tensor) -> Tensor:
    """d activation / dx, elementwise."""
    return _DERIVATIVES[name](x)
