"""Fewer columns for the same operator: A = U^T Q (rows U, Q [R, N]) to L (A^T L)^T with L [N, k] orthonormal.

What is lost is A - L L^T A, and its Frobenius norm is measured, not estimated: with the thin QR
Q^T = O R, A = Y O^T for Y = U^T R^T, and norms of A are those of Y. L is found block by block,
each the range of what the blocks before it have left of Y, which is subtracted explicitly; then
an SVD of L^T Y drops the columns that the tolerance can spare. All in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["range_within", "weighted_columns"]

_BLOCK = 32  # columns found at a time: a product this wide runs at full speed, and few are found in vain


def weighted_columns(U: Tensor, Q: Tensor) -> Tensor:
    """Y with Y Y^T = A A^T for A = U^T Q: [N, R] of rows U and Q [R, N], float64."""
    _, R = torch.linalg.qr(Q.double().mT, mode="r")
    return U.double().mT @ R.mT


def range_within(Y: Tensor, allowed: float, widest: int) -> tuple[Tensor, float] | None:
    """Orthonormal L [N, k], k least within the range found, and |Y - L L^T Y|_F <= allowed.

    None where more than ``widest`` columns would be needed.
    """
    random = torch.Generator(device=Y.device).manual_seed(0)
    L, rest = Y.new_zeros(Y.shape[0], 0), Y
    while (left := float(rest.norm())) > 0.5 * allowed:
        block = min(_BLOCK, Y.shape[0] - L.shape[1])
        if L.shape[1] >= widest + _BLOCK or block == 0:
            return None
        sketch = rest @ torch.randn(Y.shape[1], block, generator=random, dtype=Y.dtype, device=Y.device)
        found = torch.linalg.qr(rest @ (rest.mT @ torch.linalg.qr(sketch).Q)).Q
        found = torch.linalg.qr(found - L @ (L.mT @ found)).Q
        rest = rest - found @ (found.mT @ rest)
        L = torch.cat((L, found), 1)
    X, S, _ = torch.linalg.svd(L.mT @ Y, full_matrices=False)
    lost = torch.cat((S.square().flip(0).cumsum(0).flip(0), S.new_zeros(1))).add(left**2).sqrt()
    k = int((lost > allowed).sum())
    return None if k > widest else (L @ X[:, :k], float(lost[k]))
