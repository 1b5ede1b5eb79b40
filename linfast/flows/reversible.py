"""Training without stored activations: a chain of invertible steps, undone step by step in the backward.

The forward keeps the input, the output and a checksum a step. The backward rebuilds each
step's input from its output and takes the step's gradients there:

    for step n to 1:   x, dx, dparameters = undo(y, dy);   y, dy = x, dx

Steps get the random numbers, the buffers, the autocast state and the backend that they had. Where a
rebuilt input has strayed from its checksum, the backward is redone from the chain's input,
with checkpoints every sqrt(n) steps. Sources: RevNet (arXiv 1707.04585), and 1604.06174
for checkpoints.

The forward runs each step with a graph, which shows what the step reads from elsewhere than its arguments
(outside.py), and lets the graph go with the step. Where something would be lost, the graph stays, and is
connected already:

    anchor(x, parameters, context)       its backward returns the gradients of them all
    step i runs on link_i(anchor)        x_i, whose backward notes its gradient; so does y's, link_n
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..checks import check_choice, check_kind, check_tensor
from ..dispatch import has_values
from .drift import Checksum, DriftGuard, capturing, drift_budget
from .outside import keeps_a_piece, made_at, now, read_from_outside
from .rebuild import Backward
from .replay import Replay
from .steps import Context, Step, run_steps, summed
from .undo import Cotangents, Outputs

__all__ = ["Context", "Step", "reversible"]


def reversible(
    steps: Sequence[Step],
    x: Tensor,
    context: Context | None = None,
    guard: DriftGuard | None = None,
    memory: str = "invert",
) -> Outputs:
    """(y, log_det): the steps one after another, their log_dets added, undone in the backward.

    Gradients reach x, the steps' parameters and the tensors in ``context``. A step that gets at another tensor
    that needs a gradient (a closure's, a global's, another step's parameter) cannot be rebuilt: with
    memory="auto" it and those after it are stored, which is said once; with "invert" it is an error. "auto" stores
    a step that keeps what its first call made of its parameters and reads it again, too; with "invert" one step
    may read that. In a step's first backward its inverse has a graph: what it keeps has gradients.

    Until the backward x, y and a few numbers a step are kept, and of a step that draws random
    numbers or writes to buffers what these were (5 KB of the CPU's generator); y must not be written to. A
    backward with create_graph stores the chain after all.

    Plain autograd runs where nothing needs a gradient, where parameters are not
    nn.Parameters (torch.func.functional_call, replicas of nn.DataParallel) or have no shape yet (lazy
    modules), and where dropout is captured into a CUDA graph.

    Args:
        steps: in the order they are applied; each gives a log_det, or none does.
        x: [B, ...], floating point.
        context: passed to every step.
        guard: this chain's, where it is kept from call to call: it warns once.
        memory: "invert" or "auto".

    Raises:
        RuntimeError: with "invert", for a step that reads what cannot be rebuilt. In the backward,
            where a parameter was replaced or written to since, or the steps do not repeat themselves:
            random numbers not torch's, a tensor without a graph that a later call's inverse kept.
    """
    check_kind("steps", steps, Sequence)
    for i, step in enumerate(steps):
        check_kind(f"steps[{i}]", step, Step)
    check_tensor("x", x)
    context = {} if context is None else context
    check_kind("context", context, Mapping)
    check_kind("guard", guard, (DriftGuard, NoneType))
    check_choice("memory", memory, ("invert", "auto"))
    chain = Chain(steps, context, DriftGuard() if guard is None else guard)
    inputs = (x, *chain.parameters, *chain.given)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs) or chain.must_store(x):
        return run_steps(steps, x, context)
    return chain.run(_Anchor.apply(chain, *inputs), x, memory)


class _Anchor(torch.autograd.Function):
    """Stands for all that a chain is differentiated by; does what its links noted, after the last of them."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.chain = chain
        ctx.save_for_backward(x, *chain.given)  # parameters are not yet what they will be: a step may initialise
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        x, *given = ctx.saved_tensors  # raises where one was written to since
        noted, chain.noted = chain.noted, {}
        needs = ctx.needs_input_grad[1:]
        found = [Backward(chain, count, given, needs).run(x, y, grads) for count, (y, grads) in noted.items()]
        totals = found[0]
        for more in found[1:]:
            totals = tuple(summed(a, b) for a, b in zip(totals, more, strict=True))
        return None, *totals


class _Link(torch.autograd.Function):
    """What ``count`` steps made, y and log_det, as a function of the anchor."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, count: int, made: list[Tensor], anchor: Tensor) -> Any:
        ctx.chain, ctx.count = chain, count
        ctx.save_for_backward(made[0])
        return tuple(made) if len(made) > 1 else made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor | None = None) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        ctx.chain.noted[ctx.count] = (y, (grad, grad_log_det))
        return None, None, None, grad.new_empty(0)


class Chain:
    """One call's steps, what they read, and the state that they ran in."""

    def __init__(self, steps: Sequence[Step], context: Context, guard: DriftGuard) -> None:
        self.steps, self.guard, self._context = steps, guard, context
        self.parameters_of = [_owned(step.module) for step in steps]
        self.parameters = list({id(p): p for parameters in self.parameters_of for p in parameters}.values())
        self._leaves, self._spec = tree_flatten(dict(context))
        self.given = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.counts: list[int] = []  # of the nodes of each step's graph
        self.noted: dict[int, tuple[Tensor, Cotangents]] = {}  # of a backward on its way: count -> y, its gradients

    def must_store(self, x: Tensor) -> bool:
        """Whether a replay would not be the first run."""
        swapped = any(not isinstance(p, nn.Parameter) or is_lazy(p) for p in self.parameters)
        swapped = swapped or any(getattr(step.module, "_is_replica", False) for step in self.steps)
        nothing_to_rebuild = not has_values(x) or not x.numel()
        dropping = capturing(x) and any(_drops(m) for step in self.steps for m in step.module.modules())
        return nothing_to_rebuild or swapped or dropping

    def run(self, anchor: Tensor, x: Tensor, memory: str) -> Outputs:
        """The first run: notes the state of each step and its input's checksum."""
        self.guard.report(x, [step.name for step in self.steps])
        self.replay = Replay((x, *self.parameters, *self.given))
        self.checksum, self.budget = Checksum(x), drift_budget(x)
        # Under names of its own: what is read under another is not the context.
        given = [t.view_as(t) if t.requires_grad else t for t in self.given]
        context = self.context_of(given)
        y, log_det, rows = x.detach(), None, []
        first = x if x.requires_grad else y.requires_grad_()  # so that its graph is what it is in the backward
        with self.replay.autocast():
            for i, step in enumerate(self.steps):
                with torch.no_grad():
                    rows.append(self.checksum.with_norm(y))
                start, total = self._link(i, y, log_det, anchor) if i else (first.view_as(x), None)
                own = self.parameters_of[i]
                with self.replay.noting(step.module, own):
                    out, part = step.forward(start, context)
                what, count = read_from_outside((out, part), (start, *given), own, made_at(start))
                self.counts.append(count)
                if memory == "auto" and what is None:
                    if step.name not in self.guard.kept:
                        kept = keeps_a_piece((out, part), (start, *given))
                        out, part = out.detach(), None if part is None else part.detach()
                        if kept():  # for whoever reads it next, which may be this step
                            out, part, what = self._again(i, start, given)
                        self.guard.kept[step.name] = what
                    what = self.guard.kept[step.name]
                if what is not None:
                    self._end(rows)
                    self.guard.stores(step.name, what, memory)
                    y, rest = run_steps(self.steps[i + 1 :], out, context)
                    return y, summed(summed(total, part), rest)
                y, log_det = out.detach(), summed(log_det, None if part is None else part.detach())
                del start, total, out, part  # and the step's graph with them
        self._end(rows)
        return self._link(len(self.steps), y, log_det, anchor)

    def _again(self, i: int, start: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, str | None]:
        """Step i run once more, and what it reads of its first run, in words."""
        own, since = self.parameters_of[i], now(start)
        with self.replay.again(own):
            self.replay.rewind(i)
            out, part = self.steps[i].forward(start, self.context_of(given))
        return out, part, read_from_outside((out, part), (start, *given), own, since)[0]

    def _link(self, count: int, y: Tensor, log_det: Tensor | None, anchor: Tensor) -> Outputs:
        made = [t.detach() for t in (y, log_det) if t is not None]
        linked = _Link.apply(self, count, made, anchor)
        return (linked, None) if isinstance(linked, Tensor) else linked

    def _end(self, rows: Sequence[Tensor]) -> None:
        self.kept = torch.stack(tuple(rows))
        self._versions = {id(p): p._version for p in self.parameters}

    def check_parameters(self) -> None:
        for step, before in zip(self.steps, self.parameters_of, strict=True):
            own = _owned(step.module)
            if len(own) != len(before) or any(p is not q for p, q in zip(own, before, strict=True)):
                raise RuntimeError(
                    f"{step.name}: a parameter was replaced between forward and backward "
                    "(torch.func.functional_call does that); use memory='store'"
                )
            if any(p._version != self._versions[id(p)] for p in before):
                raise RuntimeError(
                    f"{step.name}: a parameter was modified by an inplace operation between forward and backward"
                )

    def context_of(self, given: Sequence[Tensor]) -> Context:
        """The context with these tensors in place of those it came with."""
        tensors = iter(given)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        context: Mapping[str, Any] = tree_unflatten(leaves, self._spec)
        return context


def _owned(module: nn.Module) -> list[Tensor]:
    """Its parameters and the buffers that need gradients."""
    parts = list(module.modules())
    parameters = [p for part in parts for p in part._parameters.values() if p is not None]
    buffers = (b for part in parts for b in part._buffers.values() if b is not None)
    return parameters + [b for b in buffers if b.requires_grad]


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
