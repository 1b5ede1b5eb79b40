"""The raw coupling stack on packed weights, in plain differentiable torch.

x [B, D] is held as z [B, 2 P], both halves padded with zeros (linfast.kernels.stack_spec). Its gradient is its
vector-Jacobian product: recomputed from x, and not by inverting y, so that nothing drifts.
In mode "fast" the operands of the conditioner's products are rounded as the kernel rounds them, and a gradient
passes the rounding unchanged; the other modes' rounding is fp32's, or is left to the kernel's budget.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.stack_spec import DENSE, StackSpec
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap
from .activations import ACTIVATION_NAMES, ACTIVATIONS
from .affine_coupling import ORDERS, couple

__all__ = ["stack_forward"]


def stack_forward(x: Tensor, weights: Tensor, operands: Tensor, spec: StackSpec) -> tuple[Tensor, Tensor | None]:
    """(y of x's dtype, log_det [B] of the couplings or None)."""
    z = spec.pad(x.to(weights.dtype))
    scale_map = ScaleMap(SCALE_MAP_KINDS[spec.kind], spec.bound, spec.floor)
    total = z.new_zeros(z.shape[0]) if spec.log_det else None
    for layer, row in spec.steps(weights):
        matrices, biases, matrix, bias = spec.unpack(weights[row])
        if layer is None:
            z = (z @ matrix.mT if spec.maps == DENSE else z * matrix) + bias
            continue
        kept, moved = spec.halves(z, layer)
        h = kept
        for i, (W, b) in enumerate(zip(matrices, biases, strict=True)):
            h = ACTIVATIONS[ACTIVATION_NAMES[spec.activation]](h) if i else h
            h = F.linear(_rounded(h, operands.dtype, spec), _rounded(W, operands.dtype, spec), b)
        shift, raw = h.unflatten(1, (-1, 2)).unbind(2)
        log_s = scale_map.log_scale(raw)
        moved = couple(moved, shift, log_s, ORDERS[spec.scale_first], spec.inverse)
        z = torch.cat((moved, kept) if spec.moves_first(layer) else (kept, moved), dim=1)
        if total is not None:
            total = total + log_s[:, : spec.moved_size(layer)].sum(1)
    if total is not None and spec.inverse:
        total = -total
    return spec.unpad(z).to(x.dtype), total


def _rounded(tensor: Tensor, half: torch.dtype, spec: StackSpec) -> Tensor:
    if spec.precision != "fast":
        return tensor
    return tensor + (tensor.to(half).to(tensor.dtype) - tensor).detach()
