"""The one-launch Linearizer's constants, and its gradient as a chain of the stacks' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .stack_layout import StackLayout

__all__ = ["LinearizerConstants", "apply_core", "linearizer_backward"]


class LinearizerConstants(NamedTuple):
    """The raw op's constants in their order; g_y's layers run inverted."""

    n_linear: int
    hidden: int
    maps_x: int
    head_x: bool
    maps_y: int
    head_y: bool
    activation: int
    kind: int
    bound_x: float
    floor_x: float
    bound_y: float
    floor_y: float
    scale_first: bool
    moves_second_x: bool
    moves_second_y: bool
    precision: str

    @property
    def of_x(self) -> tuple[Any, ...]:
        """coupling_stack's constants for g_x."""
        return (
            self.n_linear, self.hidden, self.maps_x, self.head_x, self.activation, self.kind, self.bound_x,
            self.floor_x, self.scale_first, self.moves_second_x, False, False, self.precision,
        )  # fmt: skip

    @property
    def of_y(self) -> tuple[Any, ...]:
        """coupling_stack's constants for g_y's inverse."""
        return (
            self.n_linear, self.hidden, self.maps_y, self.head_y, self.activation, self.kind, self.bound_y,
            self.floor_y, self.scale_first, self.moves_second_y, True, False, self.precision,
        )  # fmt: skip


def apply_core(z: Tensor, core: Tensor) -> Tensor:
    """A z for z [B, D] and A as ``pack_map`` lays it out; of z's dtype."""
    layout = StackLayout(z.shape[1], 1, 1, 0, False)
    values = layout.pad(z.to(core.dtype))
    width = 2 * layout.half
    out = values * core if core.numel() == width else F.linear(values, core.view(width, width))
    return layout.unpad(out).to(z.dtype)


def linearizer_backward(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    x: Tensor,
    weights_x: Tensor,
    operands_x: Tensor,
    map_operands_x: Tensor,
    core: Tensor,
    core_operands: Tensor,
    weights_y: Tensor,
    operands_y: Tensor,
    map_operands_y: Tensor,
    grad: Tensor,
    *constants: Any,
) -> tuple[Tensor, ...]:
    """A gradient for each tensor; ``forward`` and ``backward`` are the stack's own, kernels or reference."""
    needs, c = constants[-1], LinearizerConstants(*constants[:-1])
    stack_x, stack_y = (weights_x, operands_x, map_operands_x), (weights_y, operands_y, map_operands_y)
    layout, dtype = StackLayout(x.shape[1], 1, 1, 0, False), x.dtype
    width = 2 * layout.half
    x, grad = x.to(core.dtype), grad.to(core.dtype)  # the one launch holds z and w in fp32, whatever x is
    z = forward(x, *stack_x, *c.of_x)[0]
    w = apply_core(z, core)
    dw, dweights_y, *none_y = backward(w, *stack_y, grad, None, *c.of_y, [True, needs[6], False, False])
    padded_z, padded_dw = layout.pad(z), layout.pad(dw)
    if core.numel() == width:
        dcore, dz = (padded_dw * padded_z).sum(0), padded_dw * core
    else:
        dcore, dz = (padded_dw.mT @ padded_z).flatten(), padded_dw @ core.view(width, width)
    dz = layout.unpad(dz)
    dx, dweights_x, *none_x = backward(x, *stack_x, dz, None, *c.of_x, [needs[0], needs[1], False, False])
    return dx.to(dtype), dweights_x, *none_x, dcore, core_operands.new_empty(0), dweights_y, *none_y
