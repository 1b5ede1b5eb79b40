"""What a flow's backward keeps: memory="store", "invert" or "auto".

store    every activation, in autograd's graph, which grows with depth
invert   input and output; activations are rebuilt by inverting (see ``reversible``)
auto     store while that is small, and invert otherwise
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..checks import check_choice
from .bijection import Bijection, run
from .drift import DRIFT_BUDGETS
from .reversible import Context, Step
from .undo import Cotangents, Outputs, Undone

__all__ = ["AUTO_BYTES", "MEMORY_MODES", "check_memory", "inverts", "steps_of", "stored_tensors"]

MEMORY_MODES = ("store", "invert", "auto")

# "auto" inverts above this many bytes. Below it no machine that such a model is trained on is short of memory, and
# inverting would cost a third of a step's time for nothing.
AUTO_BYTES = 2**30


def check_memory(memory: str) -> str:
    """memory, or ValueError."""
    check_choice("memory", memory, MEMORY_MODES)
    return memory


def inverts(memory: str, x: Tensor, stored: float) -> bool:
    """Whether a flow on x is run by ``reversible``; ``stored`` is from ``stored_tensors``.

    Every mode stores under torch.compile, whose partitioner decides by itself what to keep (Dynamo traces no
    gradient inside a backward), under torch.func transforms, with forward-mode derivatives, and where x is not real
    floating point.
    """
    if memory == "store" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    return x.dtype in DRIFT_BUDGETS and (memory == "invert" or stored * x.numel() * x.element_size() > AUTO_BYTES)


def stored_tensors(bijections: Iterable[nn.Module]) -> float:
    """About how many tensors of its input's size autograd keeps of bijections one after another.

    Each layer keeps 4 of its own width, and 2 of the output width of each of its weights.
    """
    return sum(4 + 2 * _widths(b) / (getattr(b, "features", None) or 1) for b in bijections)


def _widths(module: nn.Module) -> int:
    return sum(parameter.shape[0] for parameter in module.parameters() if parameter.ndim > 1)


def steps_of(bijections: Sequence[Bijection], inverse: bool, log_det: bool) -> list[Step]:
    """The steps of bijections one after another, or of the inverse of that."""
    steps = [_step(f"bijections[{i}]", b, inverse, log_det) for i, b in enumerate(bijections)]
    return steps[::-1] if inverse else steps


def _step(place: str, bijection: Bijection, inverse: bool, log_det: bool) -> Step:
    # A layer's own undo need not call the layer: with hooks on it, it is inverted and run as a whole.
    hooked = bijection._forward_hooks or bijection._forward_pre_hooks or bijection._backward_hooks
    undo_layer = partial(Bijection._undo, bijection) if hooked else bijection._undo

    def forward(x: Tensor, context: Context) -> Outputs:
        return run(bijection, x, context, inverse, log_det)

    def undo(y: Tensor, cotangents: Cotangents, tensors: Sequence[Tensor], context: Context) -> Undone:
        return undo_layer(y, cotangents, tensors, context, inverse, log_det)

    return Step(f"{place} ({type(bijection).__name__})", bijection, forward, undo)
