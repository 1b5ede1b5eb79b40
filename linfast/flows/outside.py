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

__all__ = ["keeps_a_piece", "made_at", "node_count", "now", "read_from_outside"]

_OPAQUE = "CheckpointFunctionBackward"  # a reentrant checkpoint: its graph is made in the backward
_SCRIPT = "DifferentiableGraphBackward"  # TorchScript's: one node or many, as its profiler sees fit


def now(like: Tensor) -> int:
    """Nodes of the graph that this thread makes from here on have this number or a larger one."""
    return made_at(torch.empty(0, device=like.device, requires_grad=True).view(0))


def made_at(tensor: Tensor) -> int:
    """The number of its node: nodes that this thread makes later have larger ones."""
    return _number(tensor.grad_fn)


def read_from_outside(
    outputs: Iterable[Tensor | None], inputs: Iterable[Tensor], leaves: Iterable[Tensor], since: int
) -> tuple[str | None, int]:
    """What in the outputs' graph is none of these and needs a gradient, in words, and how many nodes it has.

    None in place of words: nothing is read from outside, and the count is that of ``node_count``.

    Args:
        inputs: where the graph may end: arguments of the function.
        leaves: the same, parameters.
        since: of a node made before the function ran: older ones are another computation's.
    """
    known, count = {id(leaf) for leaf in leaves}, 0
    seen, pending = set(_nodes(inputs)), _nodes(outputs)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
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
            pending.extend([each for each, _ in following])
    return None, count


def node_count(outputs: Iterable[Tensor | None], since: int = 0) -> int | None:
    """How many nodes lie between the outputs and the leaves; None: the same work may make more or fewer.

    A function that is run again and has fewer reads what was computed in between: without a graph, or before
    ``since``.
    """
    inner = _inner_nodes(outputs, set(), since)
    return None if any(_SCRIPT in node.name() for node in inner) else len(inner)


class _Mark:
    """What a node holds for as long as it lives."""


def keeps_a_piece(outputs: Iterable[Tensor | None], inputs: Iterable[Tensor]) -> Callable[[], bool]:
    """Whether, once the outputs are gone, something else holds a part of their graph that no input is in.

    A tensor that was made of parameters and kept for the next call, as a cache does, unlike a tensor that was left
    behind for a penalty, which holds what it was made of as well.
    """
    depend = set(_nodes(inputs))
    marks: dict[Any, weakref.ref[_Mark]] = {}
    users: list[tuple[weakref.ref[_Mark], weakref.ref[_Mark]]] = []
    for node in sorted(_inner_nodes(outputs, depend), key=_number):
        node.metadata[_Mark] = mark = _Mark()
        marks[node] = weakref.ref(mark)
        below = [each for each, _ in node.next_functions if each is not None]
        users.extend((marks[each], marks[node]) for each in below if each in marks and each not in depend)
        if any(each in depend for each in below):
            depend.add(node)

    def kept() -> bool:
        return any(piece() is not None and user() is None for piece, user in users)

    return lambda: kept() and gc.collect() >= 0 and kept()


def _inner_nodes(outputs: Iterable[Tensor | None], ends: set[Any], since: int = 0) -> set[Any]:
    """Nodes behind the outputs and before the ends that are no leaf's, and no older than ``since``."""
    inner: set[Any] = set()
    pending = _nodes(outputs)
    while pending:
        node = pending.pop()
        if node is None or node in inner or node in ends or not (following := node.next_functions):
            continue
        if not since or _number(node) >= since:
            inner.add(node)
            pending.extend([each for each, _ in following])
    return inner


def _nodes(tensors: Iterable[Tensor | None]) -> list[Any]:
    """Their nodes in the graph, a leaf's where its gradient is accumulated."""
    tracked = (tensor for tensor in tensors if tensor is not None and tensor.requires_grad)
    return [get_gradient_edge(tensor).node if tensor.is_leaf else tensor.grad_fn for tensor in tracked]


def _number(node: Any) -> int:
    """Nodes are numbered in the order that a thread makes them."""
    number: int = node._sequence_nr()
    return number
