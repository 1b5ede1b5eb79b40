"""Activation functions of conditioners by name, and their ids in the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}

IN_PLACE: dict[Any, Callable[[Tensor], Tensor]] = {
    torch.relu: Tensor.relu_,
    torch.tanh: Tensor.tanh_,
    F.relu: Tensor.relu_,
    F.elu: functools.partial(F.elu, inplace=True),
    F.silu: functools.partial(F.silu, inplace=True),
}
"""Activations that can write their result over their argument."""

ACTIVATION_NAMES: tuple[str, ...] = tuple(ACTIVATIONS)
"""A name's index in this tuple is the activation's constexpr id in linfast.kernels.mlp."""
