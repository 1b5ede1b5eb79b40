"""Operators in half precision: torch has no decompositions there, so they are taken in fp32 and rounded."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from ..dispatch import tensors_of

__all__ = ["cast", "dtype_of", "in_fp32"]

_Operator = TypeVar("_Operator", bound=nn.Module)

_HALF = (torch.float16, torch.bfloat16)


def dtype_of(operator: nn.Module) -> torch.dtype:
    """Of its first matrix or vector; a 0-d factor fits any."""
    found = (t.dtype for t in tensors_of(operator) if t.ndim and t.is_floating_point())
    return next(found, torch.get_default_dtype())


def in_fp32(leaf: _Operator) -> _Operator:
    """The leaf, its numbers in fp32 where they are in half precision; differentiable."""
    return cast(leaf, torch.float32) if dtype_of(leaf) in _HALF else leaf


def cast(leaf: _Operator, dtype: torch.dtype) -> _Operator:
    """The leaf with its numbers in this dtype; itself where they are."""
    tensors = dict((*leaf.named_parameters(recurse=False), *leaf.named_buffers(recurse=False)))
    if all(tensor.dtype == dtype for tensor in tensors.values()):
        return leaf
    other = copy.copy(leaf)
    other._parameters, other._buffers = {}, {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return other
