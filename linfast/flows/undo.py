"""Undoing one invertible step y, log_det = step(x): x from y, and the step's backward there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .outside import node_count, now
from .replay import Buffers, Generators, put_back

__all__ = ["Cotangents", "Outputs", "Undone", "gradients", "undo"]

Outputs = tuple[Tensor, Tensor | None]
"""(y, log_det [B] or None)."""

Cotangents = tuple[Tensor, Tensor | None]
"""The gradients of y and log_det."""

Undone = tuple[Tensor, list[Tensor | None], int | None]
"""x, the gradients of x and of the tensors asked for (None for one that is not reached), and ``node_count`` of the
step that was run again (None where it is not run as at first).
"""


def undo(
    forward: Callable[[Tensor], Outputs],
    inverse: Callable[[Tensor], Tensor],
    y: Tensor,
    cotangents: Cotangents,
    tensors: Sequence[Tensor],
    module: nn.Module | None = None,
) -> Undone:
    """By one evaluation of each: x = inverse(y), then forward(x) under autograd, both from the same state.

    That is of the random number generators, and of the buffers of ``module`` where it is given. Where gradients are
    enabled, what the inverse computes has a graph, and forward may read what it kept; its nodes are not counted.
    """
    generators, buffers = Generators([y.device]), Buffers(module)
    state = generators.state()
    x = inverse(y).detach().requires_grad_()
    generators.set(state)
    put_back(buffers.written())
    since = now(x) if torch.is_grad_enabled() else 0
    with torch.enable_grad():
        outputs = forward(x)
    count = node_count(outputs, since)
    return x.detach(), gradients(outputs, cotangents, (x, *tensors)), count


def gradients(
    outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """d(sum of outputs times cotangents) / d inputs; None for an input that is not reached."""
    pairs = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    values, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(values, inputs, weights, allow_unused=True, create_graph=create_graph))
