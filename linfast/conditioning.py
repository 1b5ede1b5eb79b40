"""What conditioners take besides x: a time t, through a sinusoidal embedding, and a context.

    given(t, context) = [e(t) | c]    one row [1, n] where all samples have the same time and context, else [B, n]

A context is [B, C], or [1, C] for all samples (``rows.one_row``): its products are then computed for one row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .checks import _shown, check_count, check_like, check_number, check_tensor, check_time
from .dispatch import cat
from .rows import one_row


def check_time_features(features: int, least: int = 0) -> int:
    """``features`` as an int; ValueError unless even and at least 4, or 0 (no embedding) if ``least`` is 0."""
    features = check_count("time_features", features, least)
    if features and (features < 4 or features % 2):
        raise ValueError(
            f"time_features must be even and at least 4{' or 0' if least == 0 else ''}; got {features}"
        )
    return features


class SinusoidalEmbedding(nn.Module):
    """t [B] -> [sin(scale t w_k) | cos(scale t w_k)] [B, features], w_k geometric from 1 to 1 / max_period.

    Args:
        features: even, at least 4.
        max_period, scale: the longest period in t is 2 pi max_period / scale.
    """

    def __init__(self, features: int, max_period: float = 10000.0, scale: float = 1.0) -> None:
        super().__init__()
        self.features = check_count("features", features, least=4)
        if self.features % 2:
            raise ValueError(f"features must be even and at least 4; got {features}")
        self.max_period = check_number("max_period", max_period, least=0.0, above=True)
        self.scale = check_number("scale", scale)

    def forward(self, t: Tensor) -> Tensor:
        check_tensor("t", t)
        if t.ndim != 1:
            raise ValueError(f"t must be [B]; got {tuple(t.shape)}")
        half = self.features // 2
        k = torch.arange(half, device=t.device, dtype=t.dtype)
        angles = (self.scale * t)[:, None] * torch.exp(k * (-math.log(self.max_period) / (half - 1)))
        return cat((angles.sin(), angles.cos()), dim=-1)


def time_rows(t: float | Tensor | None, like: Tensor, timed: bool, name: str) -> Tensor | None:
    """t as a tensor, [1] for a number or a 0-d tensor, else [B]; ValueError unless ``timed`` is (t is given)."""
    if timed != (t is not None):
        what = "needs t=" if timed else "was built without time_features"
        raise ValueError(f"{name} {what}; got t={t!r}")
    if t is None:
        return None
    check_time(t, like, like.shape[0])
    if not isinstance(t, Tensor):  # on a GPU as_tensor would wait for a copy
        return torch.full((1,), t, dtype=like.dtype, device=like.device)
    return t.to(like).reshape(-1)


def check_context(kind: str, context: Any, x: Tensor, features: int) -> None:
    """Raise unless the context is [B or 1, features] and like x [B, ...], or None where ``features`` is 0."""
    if (context is None) != (features == 0):
        wanted = f"context must be [{x.shape[0]}, {features}] or [1, {features}]: " if features else ""
        raise ValueError(f"{wanted}{kind} has context_features={features}; got context={_shown(context)}")
    if context is not None:
        check_like(kind, "context", context, x)
        if context.ndim != 2 or context.shape[1] != features or context.shape[0] not in (1, x.shape[0]):
            wanted = f"[{x.shape[0]}, {features}] or [1, {features}]"
            raise ValueError(f"context must be {wanted} for x {tuple(x.shape)}; got {tuple(context.shape)}")


def conditions(
    kind: str,
    embedding: SinusoidalEmbedding | None,
    t: float | Tensor | None,
    context: Tensor | None,
    x: Tensor,
    features: int,
) -> Tensor | None:
    """[e(t) | context], [B or 1, n], for a network ``kind``; None for a network without either.

    Raises:
        ValueError: t or context is missing, not expected, or of another shape.
    """
    check_context(kind, context, x, features)
    return joined(embedding, time_rows(t, x, embedding is not None, kind), context, x.shape[0])


def joined(
    embedding: SinusoidalEmbedding | None, times: Tensor | None, context: Tensor | None, batch: int
) -> Tensor | None:
    """``conditions`` of arguments that are checked, with ``times`` from ``time_rows`` and B = ``batch``."""
    if embedding is None or times is None:
        return None if context is None else one_row(context)
    embedded = embedding(times)
    if context is None:
        return embedded
    context = one_row(context)
    rows = max(context.shape[0], embedded.shape[0]) if batch else 0
    return cat((embedded.expand(rows, -1), context.expand(rows, -1)), dim=-1)
