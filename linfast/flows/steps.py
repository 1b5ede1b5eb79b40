"""One step of a chain of invertible maps, and the steps one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .undo import Cotangents, Outputs, Undone, undo

__all__ = ["Context", "Step", "run_steps", "summed"]

Context = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One invertible map of a chain.

    Args:
        name: for messages.
        module: whose parameters and buffers it reads.
        forward: (x, context) -> (y, log_det [B] or None).
        undo: (y, gradients of y and log_det, tensors, context) -> (x, [grad of x, *grads of tensors], count of the
            graph's nodes or None).
    """

    name: str
    module: nn.Module
    forward: Callable[[Tensor, Context], Outputs]
    undo: Callable[[Tensor, Cotangents, Sequence[Tensor], Context], Undone]

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        forward: Callable[[Tensor, Context], Outputs],
        inverse: Callable[[Tensor, Context], Tensor],
    ) -> Step:
        """A step of a forward and an inverse (y, context) -> x; its undo runs each once."""

        def undo_step(y: Tensor, cotangents: Cotangents, tensors: Sequence[Tensor], context: Context) -> Undone:
            return undo(
                lambda x: forward(x, context), lambda y: inverse(y, context), y, cotangents, tensors, module
            )

        return cls(name, module, forward, undo_step)


def run_steps(
    steps: Iterable[Step], x: Tensor, context: Context, before: Callable[[int, Tensor], None] | None = None
) -> Outputs:
    """The steps' last y and the sum of their log_dets; ``before(i, x)`` is called ahead of step i."""
    total = None
    for i, step in enumerate(steps):
        if before is not None:
            before(i, x)
        x, part = step.forward(x, context)
        total = summed(total, part)
    return x, total


def summed(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """total + part, None for one that is not there."""
    if total is None or part is None:
        return part if total is None else total
    return total + part
