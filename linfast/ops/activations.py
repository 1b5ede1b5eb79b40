"""Activation functions of conditioners by name, and their ids in the kernels."""

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
"""A name's index in this tuple is the activation's constexpr id in linfast.kernels.mlp."""
