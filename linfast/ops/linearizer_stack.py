"""A whole Linearizer of coupling stacks, y = g_y^-1(A g_x(x)), as one op: x read once, y written once.

One launch (linfast.kernels.linearizer_stack) where both stacks fit on chip with one tile; else,
and on a CPU, g_x's stack, the product with A and g_y's inverse stack one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_kind, check_tensor
from ..dispatch import uses_triton
from ..kernels.linearizer_chain import LinearizerConstants, apply_core, linearizer_backward
from ..kernels.stack_configs import mode_on, stack_path, target_of
from ..precision import half_dtype, resolve_precision
from ..scale_maps import ScaleMap
from .activations import ACTIVATION_NAMES
from .coupling_stack import check, coupling_stack, raw_backward, raw_forward
from .register import RawOp, define_op
from .stack_weights import AffineMap, CouplingLayer, PackedMap, PackedStack, pack_map, pack_stack, stack_layout

__all__ = ["CouplingStack", "PackedLinearizer", "linearizer_path_of", "linearizer_stack", "pack_linearizer"]


@dataclass(frozen=True)
class CouplingStack:
    """``coupling_stack``'s arguments for one network g."""

    layers: Sequence[CouplingLayer]
    activation: str
    scale_map: ScaleMap
    order: str = "shift_first"
    moves: str = "first"
    head: AffineMap | None = None


@dataclass(frozen=True)
class PackedLinearizer:
    """What the one launch reads: g_x, A, and g_y with its maps inverted."""

    g_x: PackedStack
    A: PackedMap
    g_y: PackedStack


def linearizer_stack(
    x: Tensor,
    g_x: CouplingStack,
    A: Tensor,
    g_y: CouplingStack,
    *,
    precision: str | None = None,
    packed: PackedLinearizer | None = None,
) -> Tensor:
    """y = g_y^-1(A g_x(x)).

    Args:
        x: [B, D], any strides.
        g_x, g_y: the stacks; they may hold the same tensors.
        A: [D_y, D], or a diagonal [D].
        precision: as for ``coupling_stack``.
        packed: ``pack_linearizer`` of these, where the weights are promised still.

    Raises:
        TypeError: an argument of another type.
        ValueError: A's shape does not fit x; and as ``coupling_stack``.
    """
    check_tensor("x", x)
    check_tensor("A", A, x)
    check_kind("packed", packed, (PackedLinearizer, NoneType))
    if A.ndim not in (1, 2) or x.ndim != 2 or A.shape[-1] != x.shape[-1] or A.shape[0] < 2:
        raise ValueError(
            f"A must be [D_y, D] or [D], D and D_y at least 2, for x {tuple(x.shape)}; got {tuple(A.shape)}"
        )
    parts = (None, None) if packed is None else (packed.g_x, packed.g_y)
    sides = (("g_x", g_x, x), ("g_y", g_y, x.new_empty(0, A.shape[0])))
    for (name, g, width), part in zip(sides, parts, strict=True):
        check_kind(name, g, CouplingStack)
        try:
            check(width, g.layers, g.activation, g.scale_map, g.order, g.moves, g.head, part)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} for A {tuple(A.shape)}: {error}") from None
    precision = mode_on(target_of(x), resolve_precision(x, precision))
    if linearizer_path_of(x, g_x, A, g_y, precision) != "stack":
        return _one_after_another(x, g_x, A, g_y, precision)
    if packed is None:
        packed = pack_linearizer(x, g_x, A, g_y, precision)
    layout_x, layout_y = packed.g_x.layout, packed.g_y.layout
    constants = LinearizerConstants(
        layout_x.n_linear, layout_x.hidden, layout_x.maps, layout_x.head, layout_y.maps, layout_y.head,
        ACTIVATION_NAMES.index(g_x.activation), g_x.scale_map.constexpr_id, *g_x.scale_map.constants,
        *g_y.scale_map.constants, g_x.order == "scale_first", g_x.moves == "second", g_y.moves == "second",
        precision,
    )  # fmt: skip
    return _linearizer_stack(
        x, packed.g_x.weights, packed.g_x.operands, packed.g_x.map_operands, packed.A.values, packed.A.operands,
        packed.g_y.weights, packed.g_y.operands, packed.g_y.map_operands, *constants,
    )  # fmt: skip


def pack_linearizer(
    x: Tensor, g_x: CouplingStack, A: Tensor, g_y: CouplingStack, precision: str
) -> PackedLinearizer:
    """Both stacks and A for inputs such as x; a stack without maps that is both g_x and g_y is packed once.

    Not so under torch.compile: Dynamo takes no function that is given one tensor twice.
    """
    D, dtype = x.shape[1], half_dtype(x)
    packed_x = pack_stack(g_x.layers, D, inverse=False, precision=precision, dtype=dtype, head=g_x.head)
    if g_y is g_x and not packed_x.layout.maps and not torch.compiler.is_compiling():
        packed_y = packed_x
    else:
        packed_y = pack_stack(g_y.layers, D, inverse=True, precision=precision, dtype=dtype, head=g_y.head)
    return PackedLinearizer(packed_x, pack_map(A, precision=precision, dtype=dtype), packed_y)


def linearizer_path_of(x: Tensor, g_x: CouplingStack, A: Tensor, g_y: CouplingStack, precision: str) -> str:
    """ "stack" for one launch; else "layers": the three parts one after another, each on its own path."""
    layouts = [stack_layout(g.layers, x.shape[1], g.head) for g in (g_x, g_y)]
    same = (g_x.activation, g_x.scale_map.kind, g_x.order) == (g_y.activation, g_y.scale_map.kind, g_y.order)
    one_tile = len({(layout.n_linear, layout.hidden) for layout in layouts}) == 1 and A.shape[0] == x.shape[1]
    weights = [weight for g in (g_x, g_y) for weight in g.layers[0].weights]
    if not (same and one_tile and uses_triton(x, A, *weights)):
        return "layers"
    layout, maps = layouts[0], max(layout.maps for layout in layouts)
    sizes = (layout.features, layout.hidden, layout.n_linear)
    path = stack_path(*sizes, precision, target_of(x), maps, linearizer=True)
    return "stack" if path == "stack" else "layers"


def _one_after_another(x: Tensor, g_x: CouplingStack, A: Tensor, g_y: CouplingStack, precision: str) -> Tensor:
    """z and A z are as wide as A, as in one launch; in "fast" x's half type is what products round to anyway."""
    wide = torch.promote_types(x.dtype, A.dtype)
    state, A = x.dtype if precision == "fast" else wide, A.to(wide)
    z = _run(x.to(state), g_x, False, precision).to(wide)
    w = z * A if A.ndim == 1 else F.linear(z, A)
    return _run(w.to(state), g_y, True, precision).to(x.dtype)


def _run(x: Tensor, g: CouplingStack, inverse: bool, precision: str) -> Tensor:
    return coupling_stack(
        x, g.layers, activation=g.activation, scale_map=g.scale_map, order=g.order, moves=g.moves, inverse=inverse,
        precision=precision, head=g.head,
    )[0]  # fmt: skip


def _raw_linearizer(x: Tensor, *rest: Any) -> Tensor:
    stack_x, core, stack_y, c = rest[:3], rest[3], rest[5:8], LinearizerConstants(*rest[8:])
    z = raw_forward(x.to(core.dtype), *stack_x, *c.of_x)[0]  # z and w stay as wide as the weights
    return raw_forward(apply_core(z, core), *stack_y, *c.of_y)[0].to(x.dtype)


def _raw_linearizer_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return linearizer_backward(raw_forward, raw_backward, *arguments)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    wanted = (True, True, False, False, True, False, True, False, False)
    pairs = zip((x, *tensors[:8]), wanted, strict=True)
    return tuple(tensor.new_empty(tensor.shape if want else 0) for tensor, want in pairs)


_STACKS = (
    "Tensor x, Tensor weights_x, Tensor operands_x, Tensor map_operands_x, Tensor core, Tensor core_operands, "
    "Tensor weights_y, Tensor operands_y, Tensor map_operands_y"
)
_CONSTANTS = (
    "int n_linear, int hidden, int maps_x, bool head_x, int maps_y, bool head_y, int activation, int kind, "
    "float bound_x, float floor_x, float bound_y, float floor_y, bool scale_first, bool moves_second_x, "
    "bool moves_second_y, str precision"
)
_linearizer_stack = define_op(
    RawOp(
        f"linearizer_stack({_STACKS}, {_CONSTANTS}) -> Tensor",
        _fake,
        _raw_linearizer,
        "linearizer_stack:launch_linearizer_stack",
    ),
    RawOp(
        f"linearizer_stack_backward({_STACKS}, Tensor grad, {_CONSTANTS}, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake_backward,
        _raw_linearizer_backward,
        "linearizer_stack:launch_linearizer_stack_backward",
    ),
    saves=lambda inputs, _: tuple(inputs[:9]),
    n_tensors=9,
)
