"""Latent product: y_b = A_b z_b for column vectors kept as rows, y = z @ A.mT.

Shapes: z [B, n_in], A [n_out, n_in] shared or [B, n_out, n_in] one a sample, y [B, n_out].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["latent_matmul"]


def latent_matmul(z: Tensor, A: Tensor) -> Tensor:
    """y_b = A_b z_b.

    Args:
        z: [B, n_in].
        A: [n_out, n_in], or [B, n_out, n_in] for one operator a sample.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if z.ndim != 2 or A.ndim not in (2, 3) or A.shape[-1] != z.shape[1]:
        raise ValueError(
            f"z must be [B, n_in] and A [..., n_out, n_in]; got z {tuple(z.shape)} and A {tuple(A.shape)}"
        )
    if A.ndim == 2:
        return F.linear(z, A)
    if A.shape[0] != z.shape[0]:
        raise ValueError(f"A has {A.shape[0]} operators for {z.shape[0]} rows of z")
    return torch.einsum("bn,bmn->bm", z, A)
