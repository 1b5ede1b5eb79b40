"""Finding what a function read from elsewhere than its arguments, by the graph that autograd made of it.

    y = f(x, w)      every path back from y ends at x or w, or at something that f got at otherwise

A closure, a global, an attribute that is no parameter: where such a tensor needs a gradient, it is in the graph,
and where it needs none, nothing is lost with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["now", "read_from_outside"]

_OPAQUE = "CheckpointFunctionBackward"  # a reentrant checkpoint: its graph is made in the backward


def now(like: Tensor) -> int:
    """Nodes of the graph that this thread makes from here on have this number or a larger one."""
    probe = torch.empty(0, device=like.device, requires_grad=True)
    return _number(probe.view_as(probe).grad_fn)


def read_from_outside(
    outputs: Iterable[Tensor | None], inputs: Iterable[Tensor], leaves: Iterable[Tensor], since: int
) -> str | None:
    """What in the outputs' graph is none of these and needs a gradient, in words; None: nothing.

    Args:
        inputs: where the graph may end: arguments of the function.
        leaves: the same, parameters.
        since: ``now`` before the function ran: older nodes are another computation's.
    """
    ends = {_edge(tensor) for tensor in inputs if tensor.requires_grad}
    known = {id(leaf) for leaf in leaves}
    pending = [_edge(output) for output in outputs if output is not None and output.requires_grad]
    seen = set(ends)
    while pending:
        edge = pending.pop()
        if edge in seen:
            continue
        seen.add(edge)
        node: Any = edge[0]
        following = node.next_functions
        if not following and hasattr(node, "variable"):  # where a leaf's gradient is accumulated
            if id(node.variable) not in known:
                return f"a tensor {tuple(node.variable.shape)}"
        elif _number(node) < since:
            return f"a tensor that was computed before ({node.name().removesuffix('0').removesuffix('Backward')})"
        elif node.name() == _OPAQUE:
            return "what a checkpoint with use_reentrant=True hides"
        else:
            pending.extend(each for each in following if each[0] is not None)
    return None


def _edge(tensor: Tensor) -> tuple[Any, int]:
    node, number, *_ = get_gradient_edge(tensor)
    return node, number


def _number(node: Any) -> int:
    """Nodes are numbered in the order that a thread makes them."""
    number: int = node._sequence_nr()
    return number
