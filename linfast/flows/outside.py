"""Finding what a function read from elsewhere than its arguments, by the graph that autograd made of it.

    y = f(x, w)      every path back from y ends at x or w, or at something that f got at otherwise

A closure, a global, an attribute that is no parameter: where such a tensor needs a gradient, it is in the graph,
and where it needs none, nothing is lost with it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["keeps_a_piece", "node_count", "now", "read_from_outside"]

_OPAQUE = "CheckpointFunctionBackward"  # a reentrant checkpoint: its graph is made in the backward
_SCRIPT = "DifferentiableGraphBackward"  # TorchScript's: one node or many, as its profiler sees fit


def now(like: Tensor) -> int:
    """Nodes of the graph that this thread makes from here on have this number or a larger one."""
    probe = torch.empty(0, device=like.device, requires_grad=True)
    return _number(probe.view_as(probe).grad_fn)


def read_from_outside(
    outputs: Iterable[Tensor | None], inputs: Iterable[Tensor], leaves: Iterable[Tensor], since: int
) -> tuple[str | None, int]:
    """What in the outputs' graph is none of these and needs a gradient, in words, and how many nodes it has.

    None in place of words: nothing is read from outside, and the count is that of ``node_count``.

    Args:
        inputs: where the graph may end: arguments of the function.
        leaves: the same, parameters.
        since: ``now`` before the function ran: older nodes are another computation's.
    """
    ends = {_edge(tensor) for tensor in inputs if tensor.requires_grad}
    known = {id(leaf) for leaf in leaves}
    pending = [_edge(output) for output in outputs if output is not None and output.requires_grad]
    seen, count = set(ends), 0
    while pending:
        edge = pending.pop()
        if edge in seen:
            continue
        seen.add(edge)
        node: Any = edge[0]
        following = node.next_functions
        if not following and hasattr(node, "variable"):  # where a leaf's gradient is accumulated
            if id(node.variable) not in known:
                return f"a tensor {tuple(node.variable.shape)}", count
        elif _number(node) < since:
            kind = node.name().removesuffix("0").removesuffix("Backward")
            return f"a tensor that was computed before ({kind})", count
        elif node.name() == _OPAQUE:
            return "what a checkpoint with use_reentrant=True hides", count
        else:
            count += 1
            pending.extend(each for each in following if each[0] is not None)
    return None, count


def node_count(outputs: Iterable[Tensor | None], since: int = 0) -> int | None:
    """How many nodes lie between the outputs and the leaves; None: the same work may make more or fewer.

    A function that is run again and has fewer reads what was computed in between: without a graph, or before
    ``since``.
    """
    pending = [_edge(output) for output in outputs if output is not None and output.requires_grad]
    seen = set()
    while pending:
        edge = pending.pop()
        if edge in seen or not (following := edge[0].next_functions) or _number(edge[0]) < since:
            continue
        if _SCRIPT in edge[0].name():
            return None
        seen.add(edge)
        pending.extend(each for each in following if each[0] is not None)
    return len(seen)


class _Mark:
    """What a node holds for as long as it lives."""


def keeps_a_piece(outputs: Iterable[Tensor | None], inputs: Iterable[Tensor]) -> Callable[[], bool]:
    """Whether, once the outputs are gone, something else holds a part of their graph that no input is in.

    A tensor that was made of parameters and kept for the next call, as a cache does, unlike a tensor that was left
    behind for a penalty, which holds what it was made of as well.
    """
    depend = {tensor.grad_fn for tensor in inputs if tensor.requires_grad}
    nodes: set[Any] = set(depend)
    pending: list[Any] = [output.grad_fn for output in outputs if output is not None]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending.extend(each for each, _ in node.next_functions)
    inner = sorted((node for node in nodes - depend if node.next_functions), key=_number)
    marks: dict[Any, weakref.ref[_Mark]] = {}
    users: list[tuple[weakref.ref[_Mark], weakref.ref[_Mark]]] = []
    for node in inner:
        node.metadata[_Mark] = mark = _Mark()
        marks[node] = weakref.ref(mark)
        below = [each for each, _ in node.next_functions if each is not None]
        users.extend((marks[each], marks[node]) for each in below if each in marks and each not in depend)
        if any(each in depend for each in below):
            depend.add(node)

    def kept() -> bool:
        return any(piece() is not None and user() is None for piece, user in users)

    return lambda: kept() and gc.collect() >= 0 and kept()


def _edge(tensor: Tensor) -> tuple[Any, int]:
    node, number, *_ = get_gradient_edge(tensor)
    return node, number


def _number(node: Any) -> int:
    """Nodes are numbered in the order that a thread makes them."""
    number: int = node._sequence_nr()
    return number
