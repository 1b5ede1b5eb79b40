"""Random masked networks (MADE) for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from linfast.ops.affine_coupling import couple
from linfast.ops.autoregressive_masks import AutoregressiveMasks
from linfast.ops.masked_autoregressive import MASKED_ACTIVATIONS as ACTIVATIONS
from linfast.scale_maps import ScaleMap
from tests.ops.budget import DEVICE

Made = tuple[AutoregressiveMasks, list[Tensor], list[Tensor | None]]
Extras = Sequence[tuple[Tensor | None, Tensor | None]]


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

    ``order``: the degree of each feature, 1, 2, .. by default; several may have one. ``residual``: two blocks of
    two layers as wide as the first hidden layer, whose last value is not activated, as in nflows.
    """
    of_features = torch.tensor(order) if order is not None else torch.arange(1, features + 1)
    highest = int(of_features.max())
    degrees = [of_features, *(torch.randint(0, highest, (size,)) for size in hidden)]
    activated, adds = None, None
    if residual:
        degrees = [degrees[0], *degrees[1:2] * 5]
        activated, adds = (True, True, True, True, False), (0, 0, 1, 0, 3)
    masks = [b[:, None] >= a for a, b in pairwise(degrees)]
    masks.append(of_features.repeat_interleave(per_feature)[:, None] > degrees[-1])
    weights = [torch.randn(mask.shape) / mask.shape[1] ** 0.5 for mask in masks]
    weights[-1] *= 0.5
    biases = [0.2 * torch.randn(len(mask)).to(DEVICE) if bias else None for mask in masks]
    made = AutoregressiveMasks(masks, per_feature, activated, adds, raw_first)
    return made, [weight.to(DEVICE) for weight in weights], biases


def random_extras(masks: AutoregressiveMasks, batch: int) -> Extras:
    """For each hidden layer in turn both, a term, a gate or neither."""
    sizes = [shape[0] for shape in masks.shapes[:-1]]
    drawn = [(torch.randn(batch, size), torch.rand(batch, size) + 0.5) for size in sizes]
    drawn = [(term.to(DEVICE), gate.to(DEVICE)) for term, gate in drawn]
    return [
        (term if i % 4 < 2 else None, gate if i % 4 in (0, 2) else None) for i, (term, gate) in enumerate(drawn)
    ]


def tensors_of(made: Made, extras: Extras | None = None) -> list[Tensor]:
    """Every tensor, in the order of ``rebuilt``."""
    return [t for t in (*made[1], *made[2], *(t for pair in extras or () for t in pair)) if t is not None]


def rebuilt(made: Made, tensors: Sequence[Tensor], extras: Extras | None = None) -> tuple[Made, Extras | None]:
    """The same network and extras with other tensors in place of theirs."""
    it = iter(tensors)
    weights = [next(it) for _ in made[1]]
    biases = [None if b is None else next(it) for b in made[2]]
    given = [(t if t is None else next(it), g if g is None else next(it)) for t, g in extras or ()]
    return (made[0], weights, biases), given if extras is not None else None


def plain_masked(
    x: Tensor,
    made: Made,
    activation: str,
    scale_map: ScaleMap | None,
    *,
    order: str = "scale_first",
    extras: Extras | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, log_det) written out from the formulas; the inverse evaluates the network once for each degree."""
    masks, *_ = made
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    y = torch.zeros_like(x) if inverse else x
    for _ in range(max(masks.degrees[0]) if inverse else 1):
        params = _network(y if inverse else x, made, ACTIVATIONS[activation], extras).unflatten(1, (x.shape[1], -1))
        shift = params[..., int(masks.raw_first)]
        raw = params[..., int(not masks.raw_first)] if scale_map else None
        log_s = torch.zeros_like(x) if raw is None else scale_map.log_scale(raw)
        y = couple(x, shift, log_s, order, inverse)
    return y.to(dtype), log_s.sum(1) * (-1 if inverse else 1)


def _network(x: Tensor, made: Made, activate: Callable[[Tensor], Tensor], extras: Extras | None) -> Tensor:
    masks, weights, biases = made
    values, read = [x], x
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        mask = masks.masks(x.device, torch.float32)[i].to(x.dtype)
        value = F.linear(read, weight.to(x.dtype) * mask, None if bias is None else bias.to(x.dtype))
        if i == len(weights) - 1:
            return value
        term, gate = (None, None) if extras is None else extras[i]
        value = value if term is None else value + term
        value = value if gate is None else value * gate
        value = value + values[masks.adds[i]] if masks.adds[i] else value
        values.append(value)
        read = activate(value) if masks.activated[i] else value
    raise AssertionError("a network has a last layer")
