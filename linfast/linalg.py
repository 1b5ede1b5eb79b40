"""Inverses that are made without waiting for the device: torch.linalg.inv reads from it whether there is one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_or_nan"]


def inverse_or_nan(matrix: Tensor) -> Tensor:
    """matrix^{-1} [..., n, n], in fp32 or wider; all NaN where it is singular."""
    inverse, info = torch.linalg.inv_ex(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    return torch.where((info == 0)[..., None, None], inverse, torch.nan)
