"""Training without stored activations: a chain of invertible steps, undone step by step in the backward.

The forward keeps the input, the output and a checksum a step. The backward rebuilds each
step's input from its output and takes the step's gradients there:

    for step n to 1:   x, dx, dparameters = undo(y, dy);   y, dy = x, dx

Steps get the random numbers, the autocast state and the backend that they had. Where a
rebuilt input has strayed from its checksum, the backward is redone from the chain's input,
with checkpoints every sqrt(n) steps. Sources: RevNet (arXiv 1707.04585), and 1604.06174
for checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..checks import check_kind, check_tensor
from .drift import Checksum, DriftGuard, capturing, drift, drift_budget
from .replay import Replay
from .undo import Cotangents, Outputs, Undone, gradients, undo

__all__ = ["Step", "reversible"]

Context = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One invertible map of a chain.

    Args:
        name: for messages.
        module: whose parameters and buffers it reads.
        forward: (x, context) -> (y, log_det [B] or None).
        undo: (y, gradients of y and log_det, tensors, context) -> (x, [grad of x, *grads of tensors]).
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
            return undo(lambda x: forward(x, context), lambda y: inverse(y, context), y, cotangents, tensors)

        return cls(name, module, forward, undo_step)


def reversible(
    steps: Sequence[Step], x: Tensor, context: Context | None = None, guard: DriftGuard | None = None
) -> Outputs:
    """(y, log_det): the steps one after another, their log_dets added, undone in the backward.

    Gradients reach x, the steps' parameters and the tensors in ``context``, not tensors that
    a step gets at otherwise. Until the backward x, y and a few numbers a step are kept, and
    of a step that draws random numbers the generators' state (5 KB for the CPU's). A
    backward with create_graph stores the chain after all.

    Plain autograd runs where nothing needs a gradient, where parameters are not
    nn.Parameters (torch.func.functional_call), and where dropout is captured into a CUDA graph.

    Args:
        steps: in the order they are applied; each gives a log_det, or none does.
        x: [B, ...].
        context: passed to every step.
        guard: this chain's, where it is kept from call to call: it warns once.

    Raises:
        RuntimeError: in the backward, where a parameter was replaced or the steps do not
            repeat themselves: parameters written to since, or random numbers not torch's.
    """
    check_kind("steps", steps, Sequence)
    for i, step in enumerate(steps):
        check_kind(f"steps[{i}]", step, Step)
    check_tensor("x", x)
    context = {} if context is None else context
    check_kind("context", context, Mapping)
    check_kind("guard", guard, (DriftGuard, NoneType))
    chain = _Chain(steps, context, DriftGuard() if guard is None else guard)
    inputs = (x, *chain.parameters, *chain.given)
    nothing_to_rebuild = x.is_meta or not x.numel()
    if (
        nothing_to_rebuild
        or not torch.is_grad_enabled()
        or not any(t.requires_grad for t in inputs)
        or chain.must_store(x)
    ):
        return run_steps(steps, x, context)
    outputs = _Reversible.apply(chain, *inputs)
    return (outputs, None) if isinstance(outputs, Tensor) else outputs


def run_steps(
    steps: Iterable[Step], x: Tensor, context: Context, before: Callable[[int, Tensor], None] | None = None
) -> Outputs:
    """The steps' last y and the sum of their log_dets; ``before(i, x)`` is called ahead of step i."""
    total = None
    for i, step in enumerate(steps):
        if before is not None:
            before(i, x)
        x, part = step.forward(x, context)
        total = part if total is None or part is None else total + part
    return x, total


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: _Chain, x: Tensor, *tensors: Tensor) -> Any:
        y, log_det = chain.run(x)
        ctx.chain = chain
        ctx.save_for_backward(x, y, *tensors)
        return y if log_det is None else (y, log_det)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, y, *tensors = ctx.saved_tensors  # raises where one was written to since
        needs = ctx.needs_input_grad[1:]
        return None, *_Backward(ctx.chain, tensors, needs).run(x, y, (grad, grad_log_det))


class _Chain:
    """One call's steps, what they read, and the state that they ran in."""

    def __init__(self, steps: Sequence[Step], context: Context, guard: DriftGuard) -> None:
        self.steps, self.guard, self._context = steps, guard, context
        owned = [_owned(step.module) for step in steps]
        self.parameters_of = [parameters for parameters, _ in owned]
        self.parameters = list({id(p): p for parameters in self.parameters_of for p in parameters}.values())
        self._buffers = [group for _, buffers in owned for group in buffers]
        self._leaves, self._spec = tree_flatten(dict(context))
        self.given = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def must_store(self, x: Tensor) -> bool:
        """Whether a replay would not be the first run."""
        swapped = any(not isinstance(p, nn.Parameter) for own in self.parameters_of for p in own)
        return swapped or (capturing(x) and any(_drops(m) for step in self.steps for m in step.module.modules()))

    def run(self, x: Tensor) -> Outputs:
        """The first run, without a graph: notes the state of each step and its input's checksum."""
        self.guard.report(x, [step.name for step in self.steps])
        self.replay = Replay((x, *self.parameters, *self.given), self._buffers)
        self.checksum, self.budget = Checksum(x), drift_budget(x)
        rows: list[Tensor] = []

        def note(i: int, x: Tensor) -> None:
            if i:
                self.replay.note_step()
            rows.append(self.checksum.with_norm(x))

        with self.replay.autocast():
            outputs = run_steps(self.steps, x, self._context, note)
        self.replay.note_step()
        self.replay.note_end()
        self.kept = torch.stack(rows)
        return outputs

    def check_parameters(self) -> None:
        for step, before in zip(self.steps, self.parameters_of, strict=True):
            now, _ = _owned(step.module)
            if len(now) != len(before) or any(p is not q for p, q in zip(now, before, strict=True)):
                raise RuntimeError(
                    f"{step.name}: a parameter was replaced between forward and backward "
                    "(torch.func.functional_call does that); use memory='store'"
                )

    def context_of(self, given: Sequence[Tensor]) -> Context:
        """The context with these tensors in place of those it came with."""
        tensors = iter(given)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec)


class _Backward:
    """One backward through a chain: (dx, *dtensors) for the chain's tensors, None where not needed."""

    def __init__(self, chain: _Chain, tensors: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.chain, self.needs_x = chain, needs[0]
        self.again = torch.is_grad_enabled()  # create_graph: this backward is itself differentiated
        n = len(chain.parameters)
        given = tensors[n:]
        if not self.again:
            given = [t.detach().requires_grad_(need) for t, need in zip(given, needs[1 + n :], strict=True)]
        self.context = chain.context_of(given)
        self.tensors = (*chain.parameters, *given)
        self._wanted = {id(t) for t, need in zip(self.tensors, needs[1:], strict=True) if need}
        self._given = [t for t in given if id(t) in self._wanted]
        self._sums: dict[int, Tensor] = {}
        reached = (i for i, own in enumerate(chain.parameters_of) if self._wanted & {id(p) for p in own})
        self.first = 0 if self.needs_x or self._given else next(reached)

    def run(self, x: Tensor, y: Tensor, cotangents: Cotangents) -> tuple[Tensor | None, ...]:
        chain = self.chain
        chain.check_parameters()
        with chain.replay.again(chain.parameters):
            grad: Tensor | None
            if self.again:
                grad = self._segment(x, range(len(chain.steps)), cotangents)
            else:
                grad, rebuilt = self._by_inversion(y.detach(), cotangents)
                names = [step.name for step in chain.steps[self.first :]]
                if chain.guard.strayed(rebuilt, chain.kept[self.first :], chain.budget, names):
                    self._sums.clear()
                    grad = self._by_checkpoints(x.detach(), cotangents)
        return (grad if self.needs_x else None, *(self._sums.get(id(t)) for t in self.tensors))

    def _by_inversion(self, y: Tensor, cotangents: Cotangents) -> tuple[Tensor, Tensor]:
        """dx, and the checksums of the rebuilt inputs."""
        grad: Tensor | None
        grad, grad_log_det = cotangents
        rows = []
        for i in reversed(range(self.first, len(self.chain.steps))):
            self.chain.replay.set_random(i)
            wanted = self._of([i])
            y, (grad, *found) = self.chain.steps[i].undo(y, (grad, grad_log_det), wanted, self.context)
            assert grad is not None  # an invertible map reaches its input
            self._add(wanted, found)
            rows.append(self.chain.checksum(y))
        return grad, torch.stack(rows[::-1])

    def _by_checkpoints(self, x: Tensor, cotangents: Cotangents) -> Tensor:
        """dx, from the chain's own input."""
        chain, n = self.chain, len(self.chain.steps)
        every = math.ceil(math.sqrt(n - self.first))
        starts: dict[int, Tensor] = {}
        rows = []

        def note(i: int, x: Tensor) -> None:
            chain.replay.set_random(i)
            rows.append(chain.checksum(x))
            if i >= self.first and (i - self.first) % every == 0:
                starts[i] = x

        with torch.no_grad():
            run_steps(chain.steps, x, self.context, note)
        if bool((drift(torch.stack(rows), chain.kept) > chain.budget).any()):
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
            outputs = run_steps(steps, x, self.context, lambda i, _: self.chain.replay.set_random(span[i]))
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


def _owned(module: nn.Module) -> tuple[list[Tensor], list[list[Tensor]]]:
    """(its parameters and the buffers that need gradients, all its buffers by submodule)."""
    parts = list(module.modules())
    parameters = [p for part in parts for p in part._parameters.values() if p is not None]
    buffers = [[b for b in part._buffers.values() if b is not None] for part in parts if part._buffers]
    return parameters + [b for group in buffers for b in group if b.requires_grad], buffers


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
