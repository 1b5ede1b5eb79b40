"""Strategies that several kinds use, and the tensors of a recipe."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = [
    *(
        "DTYPES",
        "LAYOUTS",
        "cotangent",
        "drawn",
        "generator",
        "laid_out",
        "moved",
        "moved_model",
        "perturbed",
        "recipe",
    ),
    *("scratch", "seeds", "sizes", "times"),
]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "every other", "batch innermost", "half", "expanded", "channels_last")
seeds = st.integers(0, 2**16)


def sizes(least: int = 1, most: int = 70) -> st.SearchStrategy[int]:
    """Sizes, mostly small."""
    return st.one_of(st.integers(least, min(most, 9)), st.integers(least, most))


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder, in memory where the system has that, because a disk is slow at every commit."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def recipe(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A dictionary with a draw for each field; values that are not strategies stay unchanged."""
    return st.fixed_dictionaries(
        {k: v if isinstance(v, st.SearchStrategy) else st.just(v) for k, v in fields.items()}
    )


times = st.sampled_from(["number", "0-d", "rows"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Standard normal, times ``scale``, in float64, with values that float32 can represent."""
    values = torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale
    return values.float().double()


def perturbed(model: nn.Module, seed: int, std: float) -> nn.Module:
    """The module with std * randn added to every weight, in float64, with values that float32 can represent."""
    random = generator(seed)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn(p.shape, generator=random, dtype=torch.float64))
            p.copy_(p.float().double())
    return model


def cotangent(value: Tensor) -> Tensor:
    """Weights for a sum over it, which every dtype can represent."""
    return torch.arange(1, value.numel() + 1).double().cos().bfloat16().to(value.dtype).view(value.shape)


def moved(x: Tensor, size: float, random: torch.Generator) -> Tensor:
    """x with each element changed by up to ``size``, relative."""
    if not size or not x.is_floating_point():
        return x
    return x * (1 + size * (2 * torch.rand(x.shape, generator=random, dtype=torch.float64) - 1))


def moved_model(model: nn.Module, size: float, random: torch.Generator) -> nn.Module:
    """A copy with each weight changed by up to ``size``; the model itself for 0."""
    if not size:
        return model
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(moved(tensor, size, random))
    return model


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x's values in other strides; "expanded" repeats x's first row."""
    if layout == "every other":
        padded = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        padded[..., ::2] = x
        return padded[..., ::2]
    if layout == "batch innermost":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "half" and x.ndim > 1:
        wide = torch.cat((x.new_full(x.shape, float("nan")), x, x), dim=1)
        return wide[:, x.shape[1] : 2 * x.shape[1]]
    if layout == "expanded" and len(x):
        return x[:1].expand(x.shape)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()
