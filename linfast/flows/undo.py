"""Undoes an invertible step (y, log_det) = step(x), or a chain of steps: rebuilds x from y, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .drift import drift
from .replay import Generators, put_back, watched

if TYPE_CHECKING:
    from .reversible import Chain

Context = Mapping[str, Any]

Outputs = tuple[Tensor, Tensor | None]
"""(y, log_det [B] or None)."""

Cotangents = tuple[Tensor, Tensor | None]
"""The gradients of y and log_det."""

Undone = tuple[Tensor, list[Tensor | None]]
"""x, and the gradients of x and of the tensors asked for (None for one that is not reached)."""


class Made(NamedTuple):
    """Inputs for undoing a step: its y, the gradients of y and log_det, and other tensors that need a gradient."""

    y: Tensor
    cotangents: Cotangents
    tensors: Sequence[Tensor]


def undo(
    forward: Callable[[Tensor], Outputs],
    inverse: Callable[[Tensor], Tensor],
    made: Made,
    module: nn.Module | None = None,
) -> Undone:
    """x = inverse(y), then forward(x) and its backward: one evaluation of each, both from the same state.

    The state is that of the random number generators and of the buffers of ``module``. Where gradients are enabled,
    the inverse runs with a graph: forward may read tensors that the inverse has cached.
    """
    generators, written = Generators([made.y.device]), watched([] if module is None else module.modules())
    state = generators.state()
    x = inverse(made.y).detach().requires_grad_()
    generators.set(state)
    put_back(written())
    with torch.enable_grad():
        outputs = forward(x)
    return x.detach(), gradients(outputs, made.cotangents, (x, *made.tensors))


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


def sum_of(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """total + part, where None counts as 0."""
    if total is None or part is None:
        return part if total is None else total
    return total + part


class Backward:
    """One backward through a chain's first ``count`` steps; a gradient that is not needed is None."""

    def __init__(self, chain: Chain, count: int, given: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.chain, self.count, self.needs_x = chain, count, needs[0]
        self.create_graph = torch.is_grad_enabled()  # this backward is itself differentiated
        n = len(chain.parameters)
        if not self.create_graph:
            given = [t.detach().requires_grad_(need) for t, need in zip(given, needs[1 + n :], strict=True)]
        self.context = chain.context_of(given)
        self.tensors = (*chain.parameters, *given)
        needed = zip(self.tensors, needs[1:], strict=True)  # a tensor may have been frozen since the forward
        self._wanted = {id(t) for t, need in needed if need and t.requires_grad}
        self._given = [t for t in given if id(t) in self._wanted]
        self._sums: dict[int, Tensor | None] = {}
        self.first = 0 if self.needs_x else next((i for i in range(count) if self._wanted_of([i])), count)

    def run(self, x: Tensor, y: Tensor, cotangents: Cotangents) -> tuple[Tensor | None, ...]:
        """(dx, *gradients of the chain's tensors)."""
        chain, span = self.chain, range(self.first, self.count)
        chain.check_parameters()
        if not span:
            return (None,) * (1 + len(self.tensors))
        with chain.replay.again(chain.parameters):
            if self.create_graph:
                grad = self._stored(x, range(self.count), cotangents)
            else:
                grad, rebuilt = self._by_inversion(y.detach(), cotangents)
                names = [chain.steps[i].name for i in span]
                if chain.guard.strayed(rebuilt, chain.checksums[span.start : span.stop], chain.budget, names):
                    self._sums.clear()
                    grad = self._by_checkpoints(x.detach(), cotangents)
        return (grad if self.needs_x else None, *(self._sums.get(id(t)) for t in self.tensors))

    def _by_inversion(self, y: Tensor, cotangents: Cotangents) -> tuple[Tensor, Tensor]:
        """dx, and the checksums of the rebuilt inputs."""
        rows = []
        for i in reversed(range(self.first, self.count)):
            self.chain.replay.rewind(i)
            wanted = self._wanted_of([i])
            with torch.enable_grad():  # the forward may need gradients of tensors that the inverse caches
                y, (grad, *found) = self.chain.steps[i].undo(Made(y, cotangents, wanted), self.context)
            assert grad is not None  # y depends on x in an invertible map
            cotangents = grad, cotangents[1]
            self._add(wanted, found)
            rows.append(self.chain.checksum(y))
        return cotangents[0], torch.stack(rows[::-1])

    def _by_checkpoints(self, x: Tensor, cotangents: Cotangents) -> Tensor:
        """dx, by running the chain again from its stored input, with checkpoints."""
        chain, n = self.chain, self.count
        every = math.ceil(math.sqrt(n - self.first))
        starts: dict[int, Tensor] = {}
        rows = []

        def note(i: int, x: Tensor) -> None:
            chain.replay.rewind(i)
            rows.append(chain.checksum(x))
            if i >= self.first and (i - self.first) % every == 0:
                starts[i] = x

        for i in range(n):
            note(i, x)
            with torch.enable_grad():  # as in the first run: without gradients other kernels may run
                x = chain.run_steps([i], x.detach().requires_grad_(), self.context)[0].detach()
        if bool((drift(torch.stack(rows), chain.checksums[:n]) > chain.budget).any()):
            raise RuntimeError(
                "a chain's forward does not repeat itself: its parameters were written to since, or it "
                "draws random numbers that are not torch's; use memory='store'"
            )
        for start in sorted(starts, reverse=True):
            leaf = starts.pop(start).requires_grad_()
            cotangents = self._stored(leaf, range(start, min(start + every, n)), cotangents), cotangents[1]
        return cotangents[0]

    def _stored(self, x: Tensor, span: range, cotangents: Cotangents) -> Any:
        """dx of the steps in ``span``, whose graph is stored; None where x needs no gradient."""
        with torch.enable_grad():
            outputs = self.chain.run_steps(span, x, self.context, lambda i, _: self.chain.replay.rewind(i))
        wanted = self._wanted_of(span)
        inputs = [x, *wanted] if x.requires_grad else wanted
        found = gradients(outputs, cotangents, inputs, create_graph=self.create_graph)
        grad = found.pop(0) if x.requires_grad else None
        self._add(wanted, found)
        return grad

    def _wanted_of(self, span: Iterable[int]) -> list[Tensor]:
        """The steps' parameters and the context's tensors that need a gradient, each once."""
        own = (p for i in span for p in self.chain.parameters_of[i])
        return list({id(t): t for t in (*own, *self._given) if id(t) in self._wanted}.values())

    def _add(self, tensors: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
        for tensor, grad in zip(tensors, found, strict=True):
            self._sums[id(tensor)] = sum_of(self._sums.get(id(tensor)), grad)
