"""Random masked networks (MADE) for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linfast.ops.autoregressive_masks import AutoregressiveMasks
from tests.ops.budget import DEVICE

Made = tuple[AutoregressiveMasks, list[Tensor], list[Tensor | None]]


def random_made(
    features: int,
    hidden: Sequence[int],
    per_feature: int = 2,
    *,
    order: Sequence[int] | None = None,
    residual: bool = False,
    bias: bool = True,
    raw_first: bool = False,
) -> Made:
    """(masks, weights, biases) with random degrees of the hidden units; fp32, activations near unit variance.

    ``order``: the degree of each feature, 1, 2, .. by default; several may have one. ``residual``: after the first
    hidden layer, whose value is not activated itself, pairs of layers of its width, as nflows has them.
    """
    of_features = torch.tensor(order) if order is not None else torch.arange(1, features + 1)
    highest = int(of_features.max())
    degrees = [of_features, *(torch.randint(0, highest, (size,)) for size in hidden)]
    activated, adds = None, None
    if residual:  # a value and its activation: two layers; the first copies what the block adds to
        degrees = [degrees[0], *degrees[1:2] * 4]
        activated, adds = (True, True, True, False), (0, 0, 1, 0)
    masks = [b[:, None] >= a for a, b in zip(degrees, degrees[1:], strict=False)]
    masks.append(of_features.repeat_interleave(per_feature)[:, None] > degrees[-1])
    weights = [torch.randn(mask.shape) / mask.shape[1] ** 0.5 for mask in masks]
    weights[-1] *= 0.5
    biases = [0.2 * torch.randn(len(mask)).to(DEVICE) if bias else None for mask in masks]
    made = AutoregressiveMasks(masks, per_feature, activated, adds, raw_first)
    return made, [weight.to(DEVICE) for weight in weights], biases
