"""A whole Linearizer of coupling stacks, y = g_y^-1(A g_x(x)), as one op.

Where a tile fits both stacks, it is one launch (linfast.kernels.linearizer_stack), which reads x once and writes y
once, after the two launches of packing. Elsewhere g_x's stack, the product with A and the inverse of g_y's stack
run one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_kind, check_number, check_tensor
from ..dispatch import uses_triton
from ..kernels.stack_configs import entry_for, mode_on, target_of
from ..kernels.stack_spec import StackSpec, schema_of, specs_of
from ..precision import half_dtype, resolve_precision
from .coupling_stack import CouplingStack, check, coupling_stack, raw_forward, stack_spec
from .register import define_op
from .stack_weights import AffineMap, PackedStack, StackWeights, pack_stacks


@dataclass(frozen=True)
class PackedLinearizer:
    """The weights that the one launch reads: of g_x, of A as a stack of one map, of g_y with inverted maps."""

    g_x: PackedStack
    A: PackedStack
    g_y: PackedStack


def linearizer_stack(
    x: Tensor,
    g_x: CouplingStack,
    A: Tensor,
    g_y: CouplingStack,
    *,
    alpha: float = 0.0,
    precision: str | None = None,
    packed: PackedLinearizer | None = None,
) -> Tensor:
    """y = g_y^-1((alpha I + A) g_x(x)).

    Args:
        x: [B, D], any strides.
        g_x, g_y: the stacks, of D and D_y features; they may share tensors.
        A: [D_y, D], or a diagonal [D].
        alpha: a number, 0 unless A is square. alpha I + U V^T needs no launch for alpha I: A = U V^T.
        precision: as for ``coupling_stack``.
        packed: the weights as ``pack_linearizer`` packed them, while they do not change.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: A's shape does not fit x, or a stack is invalid as in ``coupling_stack``.
    """
    check_tensor("x", x)
    check_tensor("A", A, x)
    check_kind("packed", packed, (PackedLinearizer, NoneType))
    if A.ndim not in (1, 2) or x.ndim != 2 or A.shape[-1] != x.shape[-1] or A.shape[0] < 2:
        raise ValueError(
            f"A must be [D_y, D] or [D], D and D_y at least 2, for x {tuple(x.shape)}; got {tuple(A.shape)}"
        )
    if check_number("alpha", alpha) and A.shape[0] != A.shape[-1]:
        raise ValueError(f"alpha must be 0 unless A is square; got {alpha} and A {tuple(A.shape)}")
    if A.ndim == 1 and alpha:
        A, alpha = A + alpha, 0.0
    parts = (None, None) if packed is None else (packed.g_x, packed.g_y)
    sides = (("g_x", g_x, x), ("g_y", g_y, x.new_empty(0, A.shape[0])))
    for (name, g, width), part in zip(sides, parts, strict=True):
        check_kind(name, g, CouplingStack)
        try:
            check(width, g, part)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} for A {tuple(A.shape)}: {error}") from None
    precision = mode_on(target_of(x), resolve_precision(x, precision))
    launch = pack_linearizer(x, g_x, A, g_y, precision, alpha, packed)
    if launch is None:
        return _one_after_another(x, g_x, A, g_y, alpha, precision)
    return run_packed(x, *launch)


def pack_linearizer(
    x: Tensor, g_x: CouplingStack, A: Tensor, g_y: CouplingStack, precision: str, alpha: float = 0.0,
    packed: PackedLinearizer | None = None,
) -> tuple[PackedLinearizer, StackSpec, StackSpec] | None:  # fmt: skip
    """(packed weights, g_x's spec, spec of g_y's inverse) for one launch on inputs like x.

    None where no kernel runs, A is not square, the stacks differ in activation, kind of scale map, order or sizes
    of the conditioners, or no tile fits. ``alpha`` must be 0 where A is a diagonal. A stack without maps that is
    both g_x and g_y is packed once, except under torch.compile: Dynamo rejects a function that is given one tensor
    twice.
    """
    if A.shape[0] != x.shape[1] or (g_x.activation, g_x.scale_map.kind, g_x.order) != (
        g_y.activation, g_y.scale_map.kind, g_y.order
    ):  # fmt: skip
        return None
    if not uses_triton(x, A, *g_x.layers[0].weights, *g_y.layers[0].weights):
        return None
    D = x.shape[1]
    stacks = [StackWeights(g_x.layers, D, g_x.head), StackWeights((), D, AffineMap(A), shift=alpha)]
    if g_y is not g_x or stacks[0].layout.maps or torch.compiler.is_compiling():
        stacks.append(StackWeights(g_y.layers, D, g_y.head, inverse=True))
    layout_x, layout_y = stacks[0].layout, stacks[-1 if len(stacks) == 3 else 0].layout
    if (layout_x.n_linear, layout_x.hidden) != (layout_y.n_linear, layout_y.hidden):
        return None
    maps = max(layout_x.maps, layout_y.maps)
    if entry_for(D, layout_x.hidden, layout_x.n_linear, precision, target_of(x), maps, linearizer=True) is None:
        return None
    if packed is None:
        packed_x, core, *packed_y = pack_stacks(stacks, precision, half_dtype(x))
        packed = PackedLinearizer(packed_x, core, packed_y[0] if packed_y else packed_x)
    spec_x = stack_spec(g_x, layout_x, inverse=False, log_det=False, precision=precision)
    return packed, spec_x, stack_spec(g_y, layout_y, inverse=True, log_det=False, precision=precision)


def run_packed(x: Tensor, packed: PackedLinearizer, spec_x: StackSpec, spec_y: StackSpec) -> Tensor:
    """Run the one launch: y [B, D]."""
    core, core_operands = packed.A.weights, packed.A.map_operands
    tensors = (x, *packed.g_x.tensors, core, core_operands, *packed.g_y.tensors)
    return _linearizer_stack(*tensors, *spec_x.constants, *spec_y.constants)


def _one_after_another(
    x: Tensor, g_x: CouplingStack, A: Tensor, g_y: CouplingStack, alpha: float, precision: str
) -> Tensor:
    """As three ops. z and A z are as wide as A, as in one launch; in "fast" the stacks run in x's dtype."""
    wide = torch.promote_types(x.dtype, A.dtype)
    state, A = x.dtype if precision == "fast" else wide, A.to(wide)
    z = _run(x.to(state), g_x, False, precision).to(wide)
    w = z * A if A.ndim == 1 else F.linear(z, A)
    w = w + alpha * z if alpha else w
    return _run(w.to(state), g_y, True, precision).to(x.dtype)


def _run(x: Tensor, g: CouplingStack, inverse: bool, precision: str) -> Tensor:
    return coupling_stack(
        x, g.layers, activation=g.activation, scale_map=g.scale_map, order=g.order, moves=g.moves, inverse=inverse,
        precision=precision, head=g.head,
    )[0]  # fmt: skip


def _raw_linearizer(x: Tensor, *rest: Any) -> Tensor:
    stack_x, core, stack_y, (spec_x, spec_y) = rest[:3], rest[3], rest[5:8], specs_of(rest[8:])
    z = raw_forward(x.to(core.dtype), *stack_x, *spec_x.constants)[0]  # z and w stay as wide as the weights
    return raw_forward(spec_x.apply_core(z, core), *stack_y, *spec_y.constants)[0].to(x.dtype)


_linearizer_stack = define_op(
    "linearizer_stack(Tensor x, Tensor weights_x, Tensor operands_x, Tensor map_operands_x, Tensor core, "
    "Tensor core_operands, Tensor weights_y, Tensor operands_y, Tensor map_operands_y, "
    f"{schema_of('_x')}, {schema_of('_y')}) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    _raw_linearizer,
    saves="x weights_x operands_x map_operands_x core core_operands weights_y operands_y map_operands_y",
)
