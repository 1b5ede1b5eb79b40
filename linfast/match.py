"""Decides which code runs a whole Linearizer, y = g_y^{-1}(A g_x(x)): one launch, or its three parts in turn.

One launch reads x once and writes y once. It needs g_x and g_y to be coupling stacks (linfast.flows.stack) that one
tile fits, and A to be a square matrix or a diagonal of their size, the same for all samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import are_plain, call_key, has_global_hook, is_plain, outside_autocast, why_reference
from .flows.bijection import Conditioned
from .flows.flow import Flow
from .flows.match import Launch, match, mode_for
from .flows.segments import Couplings
from .flows.stack import FlowStack, stack_of
from .freeze import kept, kept_values
from .kernels.stack_configs import StackEntry, entry_for, target_of
from .kernels.stack_spec import StackSpec
from .operators.base import LatentOperator
from .operators.dense import Dense
from .operators.diagonal import Diagonal
from .operators.low_rank import LowRank
from .ops.linearizer_stack import PackedLinearizer, pack_linearizer, run_packed
from .ops.plain_couplings import run_couplings
from .ops.stack_weights import CouplingStack
from .rows import SHORT

Part = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class LinearizerLaunch:
    """A Linearizer's call as one launch; spec_x and spec_y describe g_x and the inverse of g_y to the kernel."""

    g_x: CouplingStack
    tiles: StackEntry
    packed: PackedLinearizer
    spec_x: StackSpec
    spec_y: StackSpec

    def __call__(self, x: Tensor) -> Tensor:
        """y = g_y^{-1}(A g_x(x))."""
        return run_packed(x, self.packed, self.spec_x, self.spec_y)


@dataclass(eq=False)
class Parts:
    """A Linearizer's call in three parts, each already matched to its code; for vectors, without gradients."""

    g_x: Part
    A: Part
    g_y_inverse: Part

    def __call__(self, x: Tensor) -> Tensor:
        """y = g_y^{-1}(A g_x(x))."""
        return self.g_y_inverse(self.A(self.g_x(x)))


def match_linearizer(
    f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]
) -> LinearizerLaunch | Parts | str:
    """The code that runs f(x) as a whole, or why there is none; cached per kind of input while f is frozen."""
    values = kept_values(f)
    key = None if values is None or isinstance(t, Tensor) else call_key(x, context, t, torch.is_grad_enabled())
    if values is None or key is None:
        return _decide(f, x, t, context)
    return kept(values, f, key, lambda: _decide(f, x, t, context))


def _decide(
    f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]
) -> LinearizerLaunch | Parts | str:
    f._check_time(t, x)
    launch = why_reference(x) or _as_one(f, x, t, context)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if isinstance(launch, LinearizerLaunch) or torch.is_grad_enabled() or traced:
        return launch
    return _in_parts(f, x, t, context) or launch


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
    D, H, n_linear = stack_x.sizes
    tiles = entry_for(D, H, n_linear, precision, target_of(x), maps, linearizer=True)
    if tiles is None:
        return f"D = {D}, H = {H} in {precision!r} fit no tile on {target_of(x)} with g_x and g_y in one"
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
    return LinearizerLaunch(g_x, tiles, *launch)


def _in_parts(f: Any, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]) -> Parts | None:
    (g_x, context_x), (g_y, context_y) = unwrap(f.g_x, context), unwrap(f.g_y, context)
    own_code = are_plain((g_x, g_y), (Flow,)) and is_plain(f.A, (type(f.A),)) and not has_global_hook()
    if x.ndim != 2 or not own_code:
        return None
    z = x.new_empty(0, f.A.n_out)
    f.g_x._check("x", x, f.g_x.features)
    f.g_y._check("z", z, f.g_y.features_out)
    launch_x = match(g_x.bijections, x, context_x, False, False)
    launch_y = match(g_y.bijections, z, context_y, True, False)
    A = f.A if t is None else f.A.at(t)
    return Parts(_part(launch_x, context_x, False), _product(A, x), _part(launch_y, context_y, True))


def _part(launch: Launch, context: Mapping[str, Any], inverse: bool) -> Part:
    """Runs a flow's launch; where it is a single loop of couplings, short batches go to that loop directly."""
    loop = launch.segments[0] if len(launch.segments) == 1 else None
    if not isinstance(loop, Couplings):
        return lambda x: launch(x, context, inverse, False)[0]
    couplings, given = loop.couplings, context.get("context")

    def run(x: Tensor) -> Tensor:
        if x.shape[0] < SHORT and x.dtype == loop.dtype:  # autocast may have rounded A's product
            return run_couplings(x, couplings, given, inverse, False)[0]
        return launch(x, context, inverse, False)[0]

    return run


def _product(A: LatentOperator, x: Tensor) -> Part:
    """z -> A z for z of x's dtype and device; a Dense matrix without argument checks, which were made before."""
    if type(A) is Dense and A.weight.ndim == 2 and (A.weight.dtype, A.weight.device) == (x.dtype, x.device):
        return functools.partial(F.linear, weight=A.weight)
    return A


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
