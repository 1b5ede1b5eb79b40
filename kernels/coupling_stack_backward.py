"""The coupling stack's gradient on a GPU.

For now the plain torch formulas of linfast.ops.stack_reference, a run of rows at a time so
that what one run keeps stays small; its products are cuBLAS. Nothing is saved but x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ROWS_AT_A_TIME", "launch_coupling_stack_backward"]

# At D = 64, H = 128 a run keeps about 2 KB a row and layer: 256 MB at depth 8.
ROWS_AT_A_TIME = 16384


def launch_coupling_stack_backward(
    x: Tensor,
    weights: Tensor,
    operands: Tensor,
    map_operands: Tensor,
    grad: Tensor | None,
    grad_log_det: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweights, nothing, nothing): operands are rounded copies, which no gradient reaches."""
    # Here and not above: ops import kernels. It goes with the torch formulas.
    from linfast.ops.stack_reference import StackOptions, stack_backward

    options = StackOptions.of(x.shape[1], *constants[:-1])
    dx, dweights = x.new_empty(x.shape), torch.zeros_like(weights)
    for start in range(0, x.shape[0], ROWS_AT_A_TIME):
        run = slice(start, start + ROWS_AT_A_TIME)
        dx[run], part = stack_backward(
            x[run], weights, operands, None if grad is None else grad[run],
            None if grad_log_det is None else grad_log_det[run], options,
        )  # fmt: skip
        dweights += part
    return dx, dweights, operands.new_empty(0), map_operands.new_empty(0)
