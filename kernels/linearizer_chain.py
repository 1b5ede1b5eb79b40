"""A Linearizer of coupling stacks as a chain: its constants are two specs, its gradient is made of the stacks' own.

A is packed as a stack of one map, so that its values are [1, map | bias]; its bias is zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .stack_spec import N_CONSTANTS, StackLayout, StackSpec, spec_of

__all__ = ["apply_core", "linearizer_backward", "specs_of"]


def specs_of(constants: Sequence[Any]) -> tuple[StackSpec, StackSpec]:
    """(g_x's, g_y's inverse's) of the raw op's constants."""
    return spec_of(*constants[:N_CONSTANTS]), spec_of(*constants[N_CONSTANTS:])


def _matrix(core: Tensor, layout: StackLayout) -> Tensor:
    """The padded A of its values: [2 P, 2 P], or a diagonal [2 P]."""
    width = 2 * layout.half
    values = core[0, :-width]
    return values if values.shape[0] == width else values.view(width, width)


def apply_core(z: Tensor, core: Tensor, layout: StackLayout) -> Tensor:
    """A z for z [B, D]; of z's dtype."""
    values, A = layout.pad(z.to(core.dtype)), _matrix(core, layout)
    return layout.unpad(values * A if A.ndim == 1 else F.linear(values, A)).to(z.dtype)


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
    needs, (spec_x, spec_y) = constants[-1], specs_of(constants[:-1])
    stack_x, stack_y = (weights_x, operands_x, map_operands_x), (weights_y, operands_y, map_operands_y)
    dtype, A = x.dtype, _matrix(core, spec_x)
    x, grad = x.to(core.dtype), grad.to(core.dtype)  # the one launch holds z and w in fp32, whatever x is
    z = forward(x, *stack_x, *spec_x.constants)[0]
    w = apply_core(z, core, spec_x)
    dw, dweights_y, *none_y = backward(w, *stack_y, grad, None, *spec_y.constants, [True, needs[6], False, False])
    padded_z, padded_dw = spec_x.pad(z), spec_x.pad(dw)
    if A.ndim == 1:
        dA, dz = (padded_dw * padded_z).sum(0), padded_dw * A
    else:
        dA, dz = (padded_dw.mT @ padded_z).flatten(), padded_dw @ A
    dcore = torch.cat((dA, padded_dw.sum(0)))[None]
    dz = spec_x.unpad(dz)
    dx, dweights_x, *none_x = backward(x, *stack_x, dz, None, *spec_x.constants, [needs[0], needs[1], False, False])
    return dx.to(dtype), dweights_x, *none_x, dcore, core_operands.new_empty(0), dweights_y, *none_y
