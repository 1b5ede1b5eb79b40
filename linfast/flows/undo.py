"""Undoing one invertible step y, log_det = step(x): x from y, and the step's backward there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .replay import Buffers, Generators, put_back

__all__ = ["Cotangents", "Outputs", "Undone", "gradients", "undo"]

Outputs = tuple[Tensor, Tensor | None]
"""(y, log_det [B] or None)."""

Cotangents = tuple[Tensor, Tensor | None]
"""The gradients of y and log_det."""

Undone = tuple[Tensor, list[Tensor | None]]
"""x, and the gradients of x and of the tensors asked for; None for one that is not reached."""


def undo(
    forward: Callable[[Tensor], Outputs],
    inverse: Callable[[Tensor], Tensor],
    y: Tensor,
    cotangents: Cotangents,
    tensors: Sequence[Tensor],
    module: nn.Module | None = None,
) -> Undone:
    """By one evaluation of each: x = inverse(y), then forward(x) under autograd, both from the same state.

    That is of the random number generators, and of the buffers of ``module`` where it is given.
    """
    generators, buffers = Generators([y.device]), Buffers(module)
    state = generators.state()
    with torch.no_grad():
        x = inverse(y).detach().requires_grad_()
    generators.set(state)
    put_back(buffers.written())
    with torch.enable_grad():
        outputs = forward(x)
    return x.detach(), gradients(outputs, cotangents, (x, *tensors))


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
