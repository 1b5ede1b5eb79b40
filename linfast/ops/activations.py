"""Activations of conditioners, and the numbers by which the kernels know them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}

ACTIVATION_NAMES: tuple[str, ...] = tuple(ACTIVATIONS)
"""The index of a name is its constexpr id in linfast.kernels.mlp."""
