"""Undoing one invertible step: its input rebuilt from its output, and the pullback there.

With y, log_det = step(x), a pullback takes the gradients of y and of log_det to those of
x and of any tensors that the step was computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Outputs", "Pull", "gradients", "undo"]

Outputs = tuple[Tensor, Tensor | None]
"""(y, log_det [B] or None), or their gradients."""

Pull = Callable[[Tensor, Tensor | None, Sequence[Tensor]], list[Tensor | None]]
"""(grad of y, grad of log_det or None, tensors) -> [grad of x, *grads of the tensors]; None where unreached."""


def undo(forward: Callable[[Tensor], Outputs], inverse: Callable[[Tensor], Tensor], y: Tensor) -> tuple[Tensor, Pull]:
    """x = inverse(y), and the pullback of forward at x: one evaluation of each."""
    with torch.no_grad():
        x = inverse(y).detach().requires_grad_()
    with torch.enable_grad():
        outputs = forward(x)
    return x, lambda grad, grad_log_det, tensors: gradients(outputs, (grad, grad_log_det), (x, *tensors))


def gradients(
    outputs: Outputs,
    cotangents: tuple[Tensor | None, Tensor | None],
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
