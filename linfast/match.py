"""Decides which code runs a whole Linearizer, y = g_y^{-1}(A g_x(x)): one launch, or its three parts in turn.

One launch reads x once and writes y once. It needs g_x and g_y to be coupling stacks (linfast.flows.stack) that one
tile fits, and A to be a square matrix or a diagonal of their size, the same for all samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dispatch import outside_autocast, why_reference
from .flows.bijection import Conditioned
from .flows.flow import Flow
from .flows.match import Launch, kind_of, match, mode_for
from .flows.stack import FlowStack, are_plain, is_plain, stack_of
from .freeze import kept, kept_values
from .kernels.stack_configs import StackConfig, config_for, target_of
from .kernels.stack_spec import StackSpec
from .operators.base import LatentOperator
from .operators.diagonal import Diagonal
from .operators.low_rank import LowRank
from .ops.coupling_stack import CouplingStack
from .ops.linearizer_stack import PackedLinearizer, pack_linearizer, run_packed

__all__ = ["LinearizerLaunch", "Parts", "match_linearizer", "unwrap"]


@dataclass(eq=False)
class LinearizerLaunch:
    """A Linearizer's call as one launch.

    Args:
        g_x: the weights and options of g_x.
        tile: of the kernel.
        packed: all weights as the kernel reads them.
        spec_x, spec_y: descriptions of g_x and of the inverse of g_y for the kernel.
    """

    g_x: CouplingStack
    tile: StackConfig
    packed: PackedLinearizer
    spec_x: StackSpec
    spec_y: StackSpec

    def __call__(self, x: Tensor) -> Tensor:
        """y = g_y^{-1}(A g_x(x))."""
        return run_packed(x, self.packed, self.spec_x, self.spec_y)


@dataclass(eq=False)
class Parts:
    """A frozen Linearizer's call in its three parts, all decided; for vectors, where no gradient is required."""

    g_x: Launch
    context_x: Mapping[str, Any]
    A: LatentOperator
    g_y: Launch
    context_y: Mapping[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        """y = g_y^{-1}(A g_x(x))."""
        z = self.g_x(x, self.context_x, False, False)[0]
        return self.g_y(self.A(z), self.context_y, True, False)[0]


def match_linearizer(
    f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]
) -> LinearizerLaunch | Parts | str:
    """What runs f(x), or why nothing runs it as a whole; while f is frozen, decided once per kind of input."""
    values = kept_values(f)
    key = None if values is None or isinstance(t, Tensor) else kind_of(x, context, t, torch.is_grad_enabled())
    if values is None or key is None:
        return _decide(f, x, t, context, False)
    return kept(values, f, key, lambda: _decide(f, x, t, context, True))


def _decide(
    f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any], still: bool
) -> LinearizerLaunch | Parts | str:
    """``still``: whether the weights are frozen."""
    launch = why_reference(x) or _as_one(f, x, t, context)
    if isinstance(launch, str) and still and not torch.is_grad_enabled():
        return _in_parts(f, x, t, context) or launch
    return launch


def _as_one(f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]) -> LinearizerLaunch | str:
    if x.ndim != 2:
        return f"x has {x.ndim} dimensions: not a batch of vectors"
    stack_x = _stack("g_x", f.g_x, x, context)
    stack_y = stack_x if f.g_y is f.g_x else _stack("g_y", f.g_y, x, context)
    if isinstance(stack_x, str):
        return stack_x
    if isinstance(stack_y, str):
        return stack_y
    precision, shared, maps = mode_for(x), stack_y is stack_x, max(stack_x.maps, stack_y.maps)
    sizes = stack_x.features, stack_x.hidden, stack_x.n_linear
    tile = config_for(*sizes, precision, target_of(x), maps, linearizer=True)
    if tile is None:
        return (
            f"D = {sizes[0]}, H = {sizes[1]} in {precision!r} fit no tile on {target_of(x)} with g_x and g_y in one"
        )
    found = _core(f.A, t)
    if isinstance(found, str):
        return found
    core, alpha = found
    f.g_x._check("x", x, f.g_x.features)
    f.g_y._check("x", x, None)  # A x may have another number of features: only dtype and device are checked
    g_x = stack_x.weights(inverse=shared)
    g_y = g_x if shared else stack_y.weights(inverse=True)
    launch = pack_linearizer(x, g_x, core, g_y, precision, alpha)
    if launch is None:
        return "g_x and g_y differ in more than their weights, or A is not square"
    return LinearizerLaunch(g_x, tile, *launch)


def _in_parts(f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]) -> Parts | None:
    (g_x, context_x), (g_y, context_y) = unwrap(f.g_x, context), unwrap(f.g_y, context)
    if x.ndim != 2 or not are_plain((g_x, g_y), (Flow,)) or not is_plain(f.A, (type(f.A),)):
        return None
    z = x.new_empty(0, f.A.n_out)
    f.g_x._check("x", x, f.g_x.features)
    f.g_y._check("z", z, f.g_y.features_out)
    launch_x = match(g_x.bijections, x, context_x, False, False)
    launch_y = match(g_y.bijections, z, context_y, True, False)
    return Parts(launch_x, context_x, f.A if t is None else f.A.at(t), launch_y, context_y)


def unwrap(g: Any, context: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The bijection inside g = bijection.at(...), and its context."""
    while is_plain(g, (Conditioned,)):
        g, context = g.bijection, {**g.context, **context}
    return g, context


def _stack(name: str, g: Any, x: Tensor, context: Mapping[str, Any]) -> FlowStack | str:
    g, context = unwrap(g, context)
    found = (
        stack_of(g.bijections, x, context) if is_plain(g, (Flow,)) else f"{type(g).__name__} is not a plain Flow"
    )
    return f"{name}: {found}" if isinstance(found, str) else found


@outside_autocast
def _core(A: LatentOperator, t: float | Tensor | None) -> tuple[Tensor, float] | str:
    """(core, alpha) with A = alpha I + core, a matrix [n_out, n] or a diagonal [n]; or why A is neither."""
    if not is_plain(A, (type(A),)):
        return f"A: {type(A).__name__} has hooks"
    leaf = None if isinstance(t, Tensor) and t.ndim else (A if t is None else A.at(t)).closed()
    if leaf is None or leaf.batched:
        return "A: one operator per sample"
    if isinstance(leaf, LowRank) and isinstance(leaf.alpha, (int, float)):
        return leaf.U @ leaf.V.mT, float(leaf.alpha)
    return leaf.diagonal if isinstance(leaf, Diagonal) else leaf.to_dense(), 0.0
