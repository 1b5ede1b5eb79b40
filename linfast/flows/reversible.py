"""Training without stored activations: a chain of invertible steps whose inputs are rebuilt in the backward.

The forward stores the chain's input and output and, for each step, a checksum of its input and the states of the
random number generators and buffers that it changes. The backward goes from the last step to the first, rebuilds
each step's input from its output, and differentiates the step there:

    for step n to 1:   x, dx, dparameters = undo(y, dy);   y, dy = x, dx

Each step runs with the random numbers, buffers, autocast and backend of its first run (``Replay``). The rebuilt
inputs are compared with their checksums (``drift``). Where one deviates too far, the backward is computed anew from
the chain's input, with checkpoints every sqrt(n) steps.

A tensor that a step reads from elsewhere than its arguments, parameters and context would lose its gradient. The
forward therefore runs each step with a graph, looks for such tensors in it (``read_from_outside``), and frees it
before the next step. Where it finds one, it keeps this graph and those of the later steps. To autograd the chain is

    anchor(x, parameters, context)    whose backward returns the gradients of all of them
    x_i = link_i(anchor)              step i's input or the output; its backward notes the gradient of x_i

so that the kept graphs are connected to the steps before them. Sources: RevNet (arXiv 1707.04585), and
arXiv 1604.06174 for checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..checks import check_choice, check_kind, check_tensor
from ..dispatch import capturing, has_values, is_transformed
from ..residual_net import ResidualMLP
from .drift import DRIFT_BUDGETS, Checksum, DriftGuard, drift_budget
from .replay import Replay, keeps_a_piece, read_from_outside
from .undo import Backward, Context, Cotangents, Made, Outputs, Undone, sum_of, undo

__all__ = ["AUTO_BYTES", "MEMORY_MODES", "Context", "Step", "reversible"]

MEMORY_MODES = ("store", "invert", "auto")
"""What a flow stores for its backward: every activation, the input and output, or one of these by size."""

# "auto" inverts above this many bytes of activations. With fewer, memory is rarely short, and inverting would only
# cost a third of a training step's time.
AUTO_BYTES = 2**30
# In a flow with masked autoregressive layers inverting takes 0.7 to 3.3 times a training step's time on a CPU.
AUTO_BYTES_WITH_WALKS = 2**33

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Step:
    """One invertible map of a chain.

    Args:
        name: for messages.
        module: the module whose parameters and buffers it reads.
        forward: (x, context) -> (y, log_det [B] or None).
        undo: (made, context) -> (x, [grad of x, *grads of made.tensors]); ``made`` is a ``flows.undo.Made``.
    """

    name: str
    module: nn.Module
    forward: Callable[[Tensor, Context], Outputs]
    undo: Callable[[Made, Context], Undone]

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        forward: Callable[[Tensor, Context], Outputs],
        inverse: Callable[[Tensor, Context], Tensor],
    ) -> Step:
        """A step made of a forward and an inverse (y, context) -> x; its undo runs each once."""

        def undo_step(made: Made, context: Context) -> Undone:
            return undo(lambda x: forward(x, context), lambda y: inverse(y, context), made, module)

        return cls(name, module, forward, undo_step)


def reversible(
    steps: Sequence[Step],
    x: Tensor,
    context: Context | None = None,
    guard: DriftGuard | None = None,
    memory: str = "invert",
) -> Outputs:
    """Applies the steps in order; returns (y, sum of the log_dets). The backward rebuilds their inputs.

    Gradients reach x, the steps' parameters and the tensors in ``context``. A step that reads another tensor that
    needs a gradient (of a closure, a global, or another step's parameters) cannot be rebuilt: memory="auto" stores
    activations from this step on, and warns once; "invert" raises. "auto" also stores a step that caches tensors
    computed from its parameters and reads them later; with "invert", no other step may read them. In the backward a
    step's forward may read tensors that its inverse has cached.

    Until the backward x, y and a few numbers per step are stored and, for a step that draws random numbers or
    writes to buffers, their earlier states (5 KB for the CPU's generator). y must not be written to. A backward
    with create_graph=True stores the graph of the whole chain.

    Plain autograd runs where nothing needs a gradient, where parameters are not nn.Parameters
    (torch.func.functional_call, nn.DataParallel's replicas) or have no shape yet (lazy modules), and where dropout
    is captured into a CUDA graph.

    Args:
        steps: in the order in which they are applied; either all return a log_det or none does.
        x: [B, ...], floating point.
        context: passed to every step.
        guard: the chain's guard from call to call, so that it warns only once; None for a new guard.
        memory: "invert" or "auto".

    Raises:
        RuntimeError: with "invert", a step reads another tensor that needs a gradient. In the backward, a parameter
            was replaced or written to since the forward, or the steps do not repeat their first results, as with
            random numbers that are not torch's.
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
        return chain.run_steps(range(len(steps)), x, context)
    return chain.run(_Anchor.apply(chain, *inputs), x, memory)


def inverts(memory: str, x: Tensor, stored: float, walks: bool = False) -> bool:
    """Whether a flow on x is run by ``reversible``; ``stored`` is from ``stored_tensors``.

    ``walks``: whether undoing a layer takes a walk (linfast.ops.masked_walk).

    Every mode stores under torch.compile, whose partitioner decides by itself what to keep (Dynamo traces no
    gradient inside a backward), under torch.func transforms, with forward-mode derivatives, and where x is not real
    floating point.
    """
    if memory == "store" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if is_transformed():
        return False
    most = AUTO_BYTES_WITH_WALKS if walks else AUTO_BYTES
    return x.dtype in DRIFT_BUDGETS and (memory == "invert" or stored * x.numel() * x.element_size() > most)


class _Anchor(torch.autograd.Function):
    """Stands for all tensors that need a gradient of the chain; its backward runs after those of the links."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.chain = chain
        ctx.save_for_backward(x, *chain.given)  # not the parameters: a step may still initialise them
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        x, *given = ctx.saved_tensors  # raises where one was written to since
        noted, chain.noted = chain.noted, {}
        needs = ctx.needs_input_grad[1:]
        totals: list[Tensor | None] = [None] * len(needs)
        for count, (y, cotangents) in noted.items():
            found = Backward(chain, count, given, needs).run(x, y, cotangents)
            totals = [*map(sum_of, totals, found)]
        return None, *totals


class _Link(torch.autograd.Function):
    """The outputs y and log_det of the first ``count`` steps, as a function of the anchor."""

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
    """The steps of one call, the tensors that they read, and the state in which they ran."""

    def __init__(self, steps: Sequence[Step], context: Context, guard: DriftGuard) -> None:
        self.steps, self.guard = steps, guard
        self.parameters_of = [_parameters(step.module) for step in steps]
        self.parameters = list({id(p): p for parameters in self.parameters_of for p in parameters}.values())
        self._leaves, self._spec = tree_flatten(dict(context))
        self.given = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.noted: dict[int, tuple[Tensor, Cotangents]] = {}  # during a backward: count -> y, its gradients

    def must_store(self, x: Tensor) -> bool:
        """Whether activations must be stored, because the steps cannot be run again with the same results."""
        return (
            not has_values(x)
            or not x.numel()
            or any(not isinstance(p, nn.Parameter) or is_lazy(p) for p in self.parameters)
            or any(getattr(step.module, "_is_replica", False) for step in self.steps)
            or (capturing(x) and any(m.training and drops(m) for step in self.steps for m in step.module.modules()))
        )

    def run_steps(
        self, span: Iterable[int], x: Tensor, context: Context, before: Callable[[int, Tensor], None] | None = None
    ) -> Outputs:
        """The last step's y and the sum of these steps' log_dets; ``before(i, x)`` is called before step i."""
        total = None
        for i in span:
            if before is not None:
                before(i, x)
            x, part = self.steps[i].forward(x, context)
            total = sum_of(total, part)
        return x, total

    def run(self, anchor: Tensor, x: Tensor, memory: str) -> Outputs:
        """The first run, which records each step's state and the checksum of its input."""
        self.guard.report(x, [step.name for step in self.steps])
        self.replay = Replay((x, *self.parameters, *self.given))
        self.checksum, self.budget = Checksum(x), drift_budget(x)
        # Views: a tensor of the context that a step reads from a closure, say, is read from outside.
        given = [t.view_as(t) if t.requires_grad else t for t in self.given]
        context = self.context_of(given)
        y, log_det, rows = x.detach(), None, []
        first = x if x.requires_grad else y.requires_grad_()  # so that its graph is the same as in the backward
        with self.replay.autocast():
            for i, step in enumerate(self.steps):
                with torch.no_grad():
                    rows.append(self.checksum.with_norm(y))
                start, total = self._link(i, y, log_det, anchor) if i else (first.view_as(x), None)
                out, part, what = self._first_run(i, start, given, context, memory)
                if what is not None:
                    self._end(rows)
                    self.guard.stores(step.name, what, memory)
                    y, rest = self.run_steps(range(i + 1, len(self.steps)), out, context)
                    return y, sum_of(sum_of(total, part), rest)
                y, log_det = out.detach(), sum_of(log_det, None if part is None else part.detach())
                del start, total, out, part  # and the step's graph with them
        self._end(rows)
        return self._link(len(self.steps), y, log_det, anchor)

    def _first_run(
        self, i: int, start: Tensor, given: Sequence[Tensor], context: Context, memory: str
    ) -> tuple[Tensor, Tensor | None, str | None]:
        """Step i's outputs and, in words, a tensor for which it must be stored; None if it can be rebuilt."""
        step, own, kept_by = self.steps[i], self.parameters_of[i], self.guard.kept
        with self.replay.noting(step.module, own):
            out, part = step.forward(start, context)
        what = read_from_outside((out, part), (start, *given), own)
        if memory == "invert" or what is not None:
            return out, part, what
        if step.name not in kept_by:
            kept = keeps_a_piece((out, part), (start, *given))
            out, part = out.detach(), None if part is None else part.detach()
            if kept():  # a later run may read it, perhaps of this step
                start = start.view_as(start)  # a newer node: tensors of the first run are now outside
                with self.replay.again(own):
                    self.replay.rewind(i)
                    out, part = step.forward(start, context)
                what = read_from_outside((out, part), (start, *given), own)
            kept_by[step.name] = what
        return out, part, kept_by[step.name]

    def _link(self, count: int, y: Tensor, log_det: Tensor | None, anchor: Tensor) -> Outputs:
        made = [t.detach() for t in (y, log_det) if t is not None]
        linked = _Link.apply(self, count, made, anchor)
        return (linked, None) if isinstance(linked, Tensor) else linked

    def _end(self, rows: Sequence[Tensor]) -> None:
        self.checksums = torch.stack(tuple(rows))
        self._versions = {id(p): p._version for p in self.parameters}

    def check_parameters(self) -> None:
        """RuntimeError where a parameter was replaced or written to since the end of the forward."""
        for step, before in zip(self.steps, self.parameters_of, strict=True):
            own = _parameters(step.module)
            if [*map(id, own)] != [*map(id, before)]:
                raise RuntimeError(
                    f"{step.name}: a parameter was replaced between forward and backward "
                    "(torch.func.functional_call does that); use memory='store'"
                )
            if any(p._version != self._versions[id(p)] for p in before):
                raise RuntimeError(
                    f"{step.name}: a parameter was modified by an inplace operation between forward and backward"
                )

    def context_of(self, given: Sequence[Tensor]) -> Context:
        """The context with its tensors replaced by ``given``, in order."""
        tensors = iter(given)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return dict(tree_unflatten(leaves, self._spec))


def _parameters(module: nn.Module) -> list[Tensor]:
    """The module's parameters and its buffers that need gradients, each as often as it occurs."""
    parts = list(module.modules())
    parameters = [p for part in parts for p in part._parameters.values() if p is not None]
    buffers = (b for part in parts for b in part._buffers.values() if b is not None)
    return parameters + [b for b in buffers if b.requires_grad]


def drops(module: nn.Module) -> bool:
    """Whether it drops elements in training, by itself and not by a module that it holds."""
    if isinstance(module, ResidualMLP):
        return module.dropout > 0
    return isinstance(module, DROPOUTS) and module.p > 0
