"""A whole Linearizer in one launch: y = g_y^{-1}(A g_x(x)), x read once and y written once.

Where g_x and g_y are flows that run as coupling stacks (linfast.flows.stack) of one tile, and A, at a time
that all samples share, is a square matrix or a diagonal of their size.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .autocast import outside_autocast
from .flows.bijection import Conditioned
from .flows.flow import Flow
from .flows.fusion import is_plain
from .flows.stack import FlowStack, find_stack, kind_of, mode_for
from .freeze import derived, is_kept
from .operators.base import LatentOperator
from .operators.diagonal import Diagonal
from .operators.low_rank import LowRank
from .ops.linearizer_stack import (
    CouplingStack,
    PackedLinearizer,
    linearizer_path_of,
    linearizer_stack,
    pack_linearizer,
)

__all__ = ["OneLaunch", "find_one_launch", "planned_launch", "unwrap"]


@dataclass(frozen=True)
class OneLaunch:
    """A Linearizer's call as ``linearizer_stack`` takes it.

    Args:
        owner: the Linearizer; what is derived is kept under its name.
        stack: g_x's layers.
        g_x, core, g_y: the weights of the three.
        alpha: A is alpha I + core.
        precision: resolved.
        key: what packed weights are kept under while they are frozen; None where they are not kept.
    """

    owner: nn.Module
    stack: FlowStack
    g_x: CouplingStack
    core: Tensor
    alpha: float
    g_y: CouplingStack
    precision: str
    key: Hashable | None

    def run(self, x: Tensor) -> Tensor:
        """y = g_y^{-1}(A g_x(x))."""

        def pack() -> PackedLinearizer:
            return pack_linearizer(x, self.g_x, self.core, self.g_y, self.precision, self.alpha)

        packed = pack() if self.key is None else derived(self.owner, self.key, pack)
        return linearizer_stack(
            x, self.g_x, self.core, self.g_y, alpha=self.alpha, precision=self.precision, packed=packed
        )


def find_one_launch(f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]) -> OneLaunch | str:
    """f(x) of a Linearizer f as one launch, or why it is none."""
    stack_x = _stack("g_x", f.g_x, x, context)
    stack_y = stack_x if f.g_y is f.g_x else _stack("g_y", f.g_y, x, context)
    if not isinstance(stack_x, FlowStack):
        return stack_x
    if not isinstance(stack_y, FlowStack):
        return stack_y
    found = _core(f.A, t)
    if isinstance(found, str):
        return found
    core, alpha = found
    f.g_x._check("x", x, f.g_x.features)
    f.g_y._check("x", x, None)  # of A x, which may have another number of features: dtype and device alone
    precision, shared = mode_for(x), stack_y is stack_x
    g_x = stack_x.weights(inverse=shared)
    g_y = g_x if shared else stack_y.weights(inverse=True)
    if linearizer_path_of(x, g_x, core, g_y, precision) != "stack":
        return "g_x and g_y differ in more than their weights, or A is not square"
    keys = (stack_x.key(x), stack_y.key(x), t)
    key = None if None in keys[:2] or isinstance(t, Tensor) else ("one launch", *keys)
    return OneLaunch(f, stack_x, g_x, core, alpha, g_y, precision, key)


def planned_launch(f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]) -> OneLaunch | None:
    """f(x) as one launch, or None; while f is frozen, asked once for inputs of one kind."""

    def find() -> OneLaunch | None:
        found = find_one_launch(f, x, t, context)
        return found if isinstance(found, OneLaunch) else None

    asks_once = is_kept(f) and not isinstance(t, Tensor)
    key = kind_of(x, context, "which path", t) if asks_once else None
    return find() if key is None else derived(f, key, find)


def unwrap(g: Any, context: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """What g.at(...) was taken of, and the context it then has."""
    while is_plain(g, (Conditioned,)):
        g, context = g.bijection, {**g.context, **context}
    return g, context


def _stack(name: str, g: Any, x: Tensor, context: Mapping[str, Any]) -> FlowStack | str:
    g, context = unwrap(g, context)
    found = find_stack(g.bijections, x, context) if is_plain(g, (Flow,)) else f"{type(g).__name__} is no plain Flow"
    return found if isinstance(found, FlowStack) else f"{name}: {found}"


@outside_autocast
def _core(A: LatentOperator, t: float | Tensor | None) -> tuple[Tensor, float] | str:
    """(core, alpha) with A = alpha I + core, a matrix [n_out, n] or a diagonal [n]; or why A is neither."""
    if not is_plain(A, (type(A),)):
        return f"A: {type(A).__name__} has hooks"
    leaf = None if isinstance(t, Tensor) and t.ndim else (A if t is None else A.at(t)).closed()
    if leaf is None or leaf.batched:
        return "A: one operator a sample"
    if isinstance(leaf, LowRank) and isinstance(leaf.alpha, (int, float)):
        return leaf.U @ leaf.V.mT, float(leaf.alpha)
    return leaf.diagonal if isinstance(leaf, Diagonal) else leaf.to_dense(), 0.0
