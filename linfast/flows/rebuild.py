"""The backward of a chain of invertible steps: inputs are rebuilt, or come from checkpoints where they strayed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .drift import drift
from .steps import run_steps
from .undo import Cotangents, gradients

if TYPE_CHECKING:
    from .reversible import Chain

__all__ = ["Backward"]


class Backward:
    """One backward through a chain's first ``count`` steps: (dx, *dtensors) for the chain's tensors, None where not
    needed.
    """

    def __init__(self, chain: Chain, count: int, given: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.chain, self.count, self.needs_x = chain, count, needs[0]
        self.again = torch.is_grad_enabled()  # create_graph: this backward is itself differentiated
        n = len(chain.parameters)
        if not self.again:
            given = [t.detach().requires_grad_(need) for t, need in zip(given, needs[1 + n :], strict=True)]
        self.context = chain.context_of(given)
        self.tensors = (*chain.parameters, *given)
        needed = {id(t) for t, need in zip(self.tensors, needs[1:], strict=True) if need}
        self._frozen = needed - {id(t) for t in self.tensors if t.requires_grad}  # since the forward
        self._wanted = needed - self._frozen
        self._given = [t for t in given if id(t) in self._wanted]
        self._sums: dict[int, Tensor] = {}
        own = chain.parameters_of[:count]
        reached = (i for i, parameters in enumerate(own) if self._wanted & {id(p) for p in parameters})
        self.first = 0 if self.needs_x or self._given else next(reached, count)

    def run(self, x: Tensor, y: Tensor, cotangents: Cotangents) -> tuple[Tensor | None, ...]:
        chain, span = self.chain, range(self.first, self.count)
        chain.check_parameters()
        if not span:
            return (None,) * (1 + len(self.tensors))
        with chain.replay.again(chain.parameters):
            grad: Tensor | None
            if self.again:
                grad = self._segment(x, range(self.count), cotangents)
            else:
                grad, rebuilt = self._by_inversion(y.detach(), cotangents)
                names = [chain.steps[i].name for i in span]
                if chain.guard.strayed(rebuilt, chain.kept[span.start : span.stop], chain.budget, names):
                    self._sums.clear()
                    grad = self._by_checkpoints(x.detach(), cotangents)
        return (grad if self.needs_x else None, *(self._sums.get(id(t)) for t in self.tensors))

    def _by_inversion(self, y: Tensor, cotangents: Cotangents) -> tuple[Tensor, Tensor]:
        """dx, and the checksums of the rebuilt inputs."""
        grad: Tensor | None
        grad, grad_log_det = cotangents
        rows = []
        for i in reversed(range(self.first, self.count)):
            self.chain.replay.rewind(i)
            wanted = self._of([i])
            y, (grad, *found) = self._undo(i, y, (grad, grad_log_det), wanted)
            assert grad is not None  # an invertible map reaches its input
            self._add(wanted, found)
            rows.append(self.chain.checksum(y))
        return grad, torch.stack(rows[::-1])

    def _undo(
        self, i: int, y: Tensor, cotangents: Cotangents, wanted: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Step i undone; its inverse has a graph until its forward is known to read nothing that this kept."""
        step, alone, first = self.chain.steps[i], self.chain.guard.undone_alone, self.chain.counts[i]
        with torch.set_grad_enabled((i, step.name) not in alone):
            x, found, count = step.undo(y, cotangents, wanted, self.context)
        if count is not None and count >= first:
            alone.add((i, step.name))
        elif (i, step.name) in alone and not self._frozen & {id(p) for p in self.chain.parameters_of[i]}:
            raise RuntimeError(
                f"{step.name} reads what its inverse computed without a graph and kept, and the gradient of that "
                "is lost: use memory='store'"
            )
        return x, found

    def _by_checkpoints(self, x: Tensor, cotangents: Cotangents) -> Tensor:
        """dx, from the chain's own input."""
        chain, n = self.chain, self.count
        every = math.ceil(math.sqrt(n - self.first))
        starts: dict[int, Tensor] = {}
        rows = []

        def note(i: int, x: Tensor) -> None:
            chain.replay.rewind(i)
            rows.append(chain.checksum(x))
            if i >= self.first and (i - self.first) % every == 0:
                starts[i] = x

        with torch.no_grad():
            run_steps(chain.steps[:n], x, self.context, note)
        if bool((drift(torch.stack(rows), chain.kept[:n]) > chain.budget).any()):
            raise RuntimeError(
                "a chain's forward does not repeat itself: its parameters were written to since, or it "
                "draws random numbers that are not torch's; use memory='store'"
            )
        grad, grad_log_det = cotangents
        for start in sorted(starts, reverse=True):
            leaf = starts.pop(start).requires_grad_()
            found = self._segment(leaf, range(start, min(start + every, n)), (grad, grad_log_det))
            assert found is not None
            grad = found
        return grad

    def _segment(self, x: Tensor, span: range, cotangents: Cotangents) -> Tensor | None:
        """dx of the steps in ``span``, stored."""
        steps = [self.chain.steps[i] for i in span]
        with torch.enable_grad():
            outputs = run_steps(steps, x, self.context, lambda i, _: self.chain.replay.rewind(span[i]))
        wanted = self._of(span)
        inputs = [x, *wanted] if x.requires_grad else wanted
        found = gradients(outputs, cotangents, inputs, create_graph=self.again)
        grad = found.pop(0) if x.requires_grad else None
        self._add(wanted, found)
        return grad

    def _of(self, span: Iterable[int]) -> list[Tensor]:
        """What of the steps' parameters, and of the context, needs a gradient; each once."""
        own = (p for i in span for p in self.chain.parameters_of[i])
        return list({id(t): t for t in (*own, *self._given) if id(t) in self._wanted}.values())

    def _add(self, tensors: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
        for tensor, grad in zip(tensors, found, strict=True):
            if grad is not None:
                before = self._sums.get(id(tensor))
                self._sums[id(tensor)] = grad if before is None else before + grad
