"""The blocks of a residual network on a GPU: products, and one kernel between two of them (``norm_activate``).

Step k is a call of ``norm_activate``. Even steps lie between two blocks and return the sum u, which is the skip of
the next even step; the last one ends the last block. A product follows every step but the last:

    u_k, y_k = step_k(r_k, skip u_(k-2))        r_(k+1) = y_k W_k^T

In training, where nothing needs a graph of single operations, all steps and products are one autograd function. It
saves the host the time of one function per operation, and its backward computes the gradients of all W_k as one
batched product, dW_k = dr_(k+1)^T y_k, for which it stores all dr of this network at once, [2 blocks, B, H]. The
gradients of a network's W_k are parts of one tensor: who keeps one keeps all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import is_batched, is_transformed, uses_triton, without_autocast
from .norm_activate import NORMS, NUMBER_OR_NONE, norm_activate, pulled_back
from .register import launching

_TENSORS = 6  # the first fields of a step


class Step(NamedTuple):
    """Arguments of ``norm_activate``, all but those that the steps before it compute."""

    bias: Tensor | None
    gate: Tensor | None
    weight: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    of_batch: bool = False
    eps: float = 0.0

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self[:_TENSORS]

    def options(self, k: int, activation: str | None) -> tuple[int, float, int, bool]:
        """The constants of the raw op for step k."""
        norm = NORMS.index("of the batch") if self.of_batch else int(self.mean is not None)
        return norm, self.eps, NUMBER_OR_NONE[activation], k % 2 == 0


def run_blocks(
    r: Tensor, h: Tensor | None, steps: Sequence[Step], weights: Sequence[Tensor], activation: str, dropout: float
) -> tuple[Tensor, list[Any]]:
    """(u of the last step, for each other step the batch's mean and variance or None twice).

    Args:
        r: [B, H], a product, to which the first step adds its bias and h.
        h: [B, H] or None.
        steps, weights: of n blocks 2 n + 1 and 2 n.
        activation: by name.
        dropout: the probability with which an element is dropped before the second product of a block.
    """
    if dropout or not _can_join(r, h, steps, weights):
        return _one_by_one(r, h, steps, weights, activation, dropout)
    given = (*weights, *(t for step in steps for t in step.tensors))
    constants = [(step.of_batch, step.eps) for step in steps]
    u, _, *statistics = _Blocks.apply(activation, constants, r, h, *given)
    return u, [*zip(statistics[::2], statistics[1::2], strict=True)]


def _can_join(r: Tensor, h: Tensor | None, steps: Sequence[Step], weights: Sequence[Tensor]) -> bool:
    """Whether one function may compute all; where an argument does not fit, ``norm_activate`` says so."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed() or not torch.is_grad_enabled():
        return False
    rows, width = r.shape
    if rows < 2 or not r.is_contiguous():
        return False
    if not all(weight.requires_grad and weight.dtype == r.dtype for weight in weights):
        return False
    if h is not None and (h.shape != r.shape or h.dtype != r.dtype):
        return False
    if any(weight.shape != (width, width) for weight in weights):
        return False
    tensors = [r, *weights, *([] if h is None else [h])]
    for step in steps:
        bias, gate, *parameters = step.tensors
        if gate is not None and gate.shape not in ((rows, width), (1, width)):
            return False
        if any(t is not None and t.shape != (width,) for t in (bias, *parameters)):
            return False
        tensors += [t for t in step.tensors if t is not None]
    return uses_triton(*tensors) and all(
        type(t) in (Tensor, nn.Parameter) and t.device == r.device for t in tensors
    )


def _one_by_one(
    r: Tensor, h: Tensor | None, steps: Sequence[Step], weights: Sequence[Tensor], activation: str, dropout: float
) -> tuple[Tensor, list[Any]]:
    u: Any
    y: Any
    statistics = []
    for k, (step, weight) in enumerate(zip(steps, weights, strict=False)):
        given: dict[str, Any] = step._asdict() if k % 2 else {**step._asdict(), "skip": h, "with_sum": True}
        u, y, *found = norm_activate(r, activation, **given)
        statistics.append(found)
        if k % 2 == 0:
            h = u
        elif dropout:
            y = F.dropout(y, dropout, True)
        r = F.linear(y, weight)
    u = norm_activate(r, None, steps[-1].bias, skip=h, gate=steps[-1].gate)[0]
    return u, statistics


class _Blocks(torch.autograd.Function):
    """(u of the last step, u of the first, the statistics of all but the last) of r, h, weights and steps' tensors.

    The first u is an output for second derivatives, which are those of ``_one_by_one`` on it.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: str, constants: Sequence[tuple[bool, float]], r: Tensor, h: Tensor | None, *given: Any
    ) -> tuple[Tensor | None, ...]:
        n = len(constants) - 1
        weights, steps = given[:n], _steps(given[n:], constants)
        ys, sums, inputs, statistics = r.new_empty(n, *r.shape), list[Any](), list[Any](), list[Any]()
        with launching("norm_activate", r) as launch:
            for k, step in enumerate(steps):
                (bias, gate, *parameters), y = step.tensors, ys[k] if k < n else None
                skip, options = (None if k % 2 else h), step.options(k, None if y is None else activation)
                u, _, *found = launch(r, bias, skip, gate, *parameters, *options, y)
                sums.append(u)
                inputs.append(r if k % 2 or gate is not None else None)
                h = h if k % 2 else u
                if y is not None:
                    statistics += found
                    r = torch.mm(y, weights[k].t())
        ctx.mark_non_differentiable(*(t for t in statistics if t is not None))
        ctx.save_for_backward(ys, *sums, *inputs, *statistics, None, None, *given)
        ctx.activation, ctx.constants = activation, constants
        ctx.set_materialize_grads(False)
        return sums[-1], sums[0], *statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_first: Tensor | None, *_: Any) -> tuple[Any, ...]:
        n = len(ctx.constants)
        ys, *saved = ctx.saved_tensors
        sums, inputs, statistics = saved[:n], saved[n : 2 * n], saved[2 * n : 4 * n]
        weights, steps = saved[4 * n : 5 * n - 1], _steps(saved[5 * n - 1 :], ctx.constants)
        grad = torch.zeros_like(sums[0]) if grad is None else grad
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or is_batched(grad) or (grad_first is not None and is_batched(grad_first)):
            found = _differentiable(grad, grad_first, sums[0], steps, weights, ctx.activation)
        else:
            kept = ys, sums, inputs, statistics, weights, steps
            found = without_autocast(ys.device.type, _pulled, grad, grad_first, *kept, ctx.activation, needs)
        return None, None, *(t if need else None for t, need in zip(found, needs, strict=True))


def _steps(tensors: Sequence[Any], constants: Sequence[tuple[bool, float]]) -> list[Step]:
    parts = (tensors[_TENSORS * k : _TENSORS * (k + 1)] for k in range(len(constants)))
    return [Step._make((*part, *each)) for part, each in zip(parts, constants, strict=True)]


def _pulled(
    grad: Tensor, grad_first: Tensor | None, ys: Tensor, sums: Sequence[Any], inputs: Sequence[Any],
    statistics: Sequence[Any], weights: Sequence[Tensor], steps: Sequence[Step], activation: str,
    needs: Sequence[bool],
) -> list[Any]:  # fmt: skip
    """The gradients of r, h, the weights and the steps' tensors, by kernels."""
    n, of_steps, of_u, dy = len(weights), list[Any](), grad, None
    drs = torch.empty_like(ys) if any(needs[2 : 2 + n]) else None
    with launching("norm_activate_backward", ys) as launch:
        for k in range(n, -1, -1):
            own = needs[2 + n + _TENSORS * k : 2 + n + _TENSORS * (k + 1)]
            wanted = [k > 0 or needs[0], own[0], k % 2 == 0 and (k > 0 or needs[1]), *own[1:]]
            bias, gate, *parameters = steps[k].tensors
            if k == 0 and grad_first is not None:
                of_u = of_u + grad_first
            given = sums[k], inputs[k], bias, gate, *parameters, *statistics[2 * k : 2 * k + 2]
            options = steps[k].options(k, activation if k < n else None)
            of_outputs = None if k % 2 else of_u, dy, None, None
            memory = drs[k - 1] if k and drs is not None else None
            dr, dbias, dskip, *rest = launch(*given, *of_outputs, *options, wanted, memory)
            of_steps = [dbias, *rest, *of_steps]
            of_u = of_u if k % 2 else dskip
            dy = torch.mm(dr, weights[k - 1]) if k else None
    # .data: each gradient has its own version counter; a write to one does not count as a write to another.
    of_weights = [None] * n if drs is None else [g.data for g in torch.bmm(drs.mT, ys)]
    return [dr, of_u, *of_weights, *of_steps]


def _differentiable(
    grad: Tensor, grad_first: Tensor | None, first: Tensor, steps: Sequence[Step], weights: Sequence[Tensor],
    activation: str,
) -> list[Any]:  # fmt: skip
    """The same, and differentiable: those of ``_one_by_one`` on the first u."""
    n, constants = len(weights), [(step.of_batch, step.eps) for step in steps]

    def last(u: Any, *rest: Any) -> Tensor:
        return _one_by_one(u, None, _steps((None, *rest[n:]), constants), rest[:n], activation, 0.0)[0]

    bias, *rest = (t for step in steps for t in step.tensors)
    of_first, *found = pulled_back(last, (first, *weights, *rest), grad)
    assert of_first is not None
    of_first = of_first if grad_first is None else of_first + grad_first
    of_bias = None if bias is None else of_first.sum(0)
    return [of_first, of_first, *found[:n], of_bias, *found[n:]]
