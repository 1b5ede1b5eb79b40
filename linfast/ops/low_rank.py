"""Low-rank product: y = alpha x + U (V^T x), in O(N r) and never through an N x N matrix.

Shapes: x [B, N], U and V [N, r] shared or [B, N, r] one pair a sample, y [B, N].
With alpha = 0 U and V may have different N: U [M, r], V [N, r], y [B, M].
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["low_rank"]


def low_rank(x: Tensor, U: Tensor, V: Tensor, alpha: float | Tensor = 0.0) -> Tensor:
    """y_b = alpha x_b + U_b (V_b^T x_b).

    Args:
        x: [B, N].
        U: [M, r] or [B, M, r]; M = N unless alpha is the number 0.
        V: [N, r] or [B, N, r].
        alpha: a number or a 0-d tensor.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, U, V)
    projected = x @ V if V.ndim == 2 else torch.einsum("bn,bnr->br", x, V)
    y = projected @ U.mT if U.ndim == 2 else torch.einsum("br,bnr->bn", projected, U)
    if isinstance(alpha, (int, float)) and alpha == 0:
        return y
    if U.shape[-2] != V.shape[-2]:
        raise ValueError(
            f"alpha must be 0 when U and V have different N; got U {tuple(U.shape)}, V {tuple(V.shape)}"
        )
    return alpha * x + y


def _check(x: Tensor, U: Tensor, V: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be [B, N]; got {tuple(x.shape)}")
    for name, factor in (("U", U), ("V", V)):
        if factor.ndim not in (2, 3) or (factor.ndim == 3 and factor.shape[0] != x.shape[0]):
            raise ValueError(
                f"{name} must be [N, r] or [{x.shape[0]}, N, r] for x {tuple(x.shape)}; got {tuple(factor.shape)}"
            )
    if V.shape[-2] != x.shape[1]:
        raise ValueError(f"V must have N = {x.shape[1]} rows for x {tuple(x.shape)}; got {tuple(V.shape)}")
    if U.shape[-1] != V.shape[-1]:
        raise ValueError(f"U and V must have the same rank r; got U {tuple(U.shape)}, V {tuple(V.shape)}")
