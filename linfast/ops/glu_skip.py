"""The end of a gated residual block: out = h + (r + b) sigmoid(g).

On a CPU and in float64 the op runs in plain torch; on a GPU it is one kernel forward and one backward
(linfast.kernels.glu_skip), which returns the gradient of the bias too. Saved for the backward: r, b and g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensor
from ..dispatch import uses_triton
from .register import define_op


def glu_skip(h: Tensor, r: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """out = h + (r + bias) sigmoid(gate), of h's dtype.

    Args:
        h: [B, H], the block's input.
        r: [B, H], the result of its last linear layer, without the bias, of h's dtype.
        gate: g [B or 1, H], one row for all samples.
        bias: b [H]; None for 0.

    The op is computed in fp32 or wider.

    Raises:
        TypeError: an argument is not a dense tensor.
        ValueError: a shape or r's dtype does not fit h.
    """
    check_tensor("h", h)
    if h.ndim != 2:
        raise ValueError(f"h must be [B, H]; got {tuple(h.shape)}")
    rows, width = h.shape
    _check("r", r, h, (rows, width))
    _check("gate", gate, h, (rows, width), (1, width))
    if bias is not None:
        _check("bias", bias, h, (width,))
    runs = uses_triton(h, r, gate, *([] if bias is None else [bias]))
    return (_glu_skip if runs else glu_skip_reference)(h, r, bias, gate)


def _check(name: str, tensor: Tensor, h: Tensor, *shapes: tuple[int, ...]) -> None:
    check_tensor(name, tensor, h, "h", same_dtype=name == "r")
    if tensor.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {wanted} for h {tuple(h.shape)}; got {tuple(tensor.shape)}")


def glu_skip_reference(h: Tensor | None, r: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """``glu_skip`` in plain torch; h is None, for 0, in a backward that does not need its gradient."""
    dtype, compute = r.dtype, torch.promote_types(r.dtype, torch.float32)
    r = r.to(compute) if bias is None else r.to(compute) + bias.to(compute)
    s = gate.to(compute).sigmoid()
    return (r * s if h is None else torch.addcmul(h.to(compute), r, s)).to(dtype)


def _gradients(r: Tensor, bias: Tensor | None, gate: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    of_bias = None if bias is None else bias.new_empty(bias.shape)
    of_gate = gate.new_empty(gate.shape) if gate.shape[0] == 1 else torch.empty_like(gate)
    return torch.empty_like(r), torch.empty_like(r), of_bias, of_gate


_glu_skip = define_op(
    "glu_skip(Tensor h, Tensor r, Tensor? bias, Tensor gate) -> Tensor",
    lambda h, *_: torch.empty_like(h),
    glu_skip_reference,
    saves="r bias gate",
    gradients=_gradients,
)
