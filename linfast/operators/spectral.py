"""Results of svd and eig, and the small shared pieces of spectral arithmetic.

A structured operator acts on all but a few dimensions as one number. Its svd and
eig then hold only the few, and the number is ``rest``:

    svd:  A = U diag(S) Vh + rest (I - U U^H),   U [n, k], S [k], Vh [k, n]
    eig:  A v_i = w_i v_i for i < k, and the other n - k eigenvalues are ``rest``

For a matrix without such structure rest is 0 and the formulas are the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = [
    "SVD",
    "Eig",
    "cutoff",
    "decomposed",
    "largest",
    "matrix_inverse",
    "pseudo_inverse_values",
    "unless_singular",
]

_Result = TypeVar("_Result")


class _SVDFields(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class SVD(_SVDFields):
    """U [..., n_out, k], S [..., k] descending, Vh [..., k, n_in], and ``rest``.

    Unpacks as ``U, S, Vh``. A = U diag(S) Vh + rest (I - U U^H); the n - k singular
    values not in S are all |rest|.
    """

    rest: float | Tensor

    def __new__(cls, U: Tensor, S: Tensor, Vh: Tensor, rest: float | Tensor = 0.0) -> SVD:
        self = super().__new__(cls, U, S, Vh)
        self.rest = rest
        return self

    def to_dense(self) -> Tensor:
        """U diag(S) Vh + rest (I - U U^H) [..., n_out, n_in]."""
        dense = (self.U * self.S[..., None, :]) @ self.Vh
        if isinstance(self.rest, float) and self.rest == 0.0:
            return dense
        eye = torch.eye(dense.shape[-1], dtype=dense.dtype, device=dense.device)
        return dense + self.rest * (eye - self.U @ self.U.mH)


class _EigFields(NamedTuple):
    values: Tensor
    vectors: Tensor


class Eig(_EigFields):
    """values [..., k] and vectors [..., n, k], both complex; ``rest`` is the eigenvalue of the other n - k."""

    rest: float | Tensor | None

    def __new__(cls, values: Tensor, vectors: Tensor, rest: float | Tensor | None = None) -> Eig:
        self = super().__new__(cls, values, vectors)
        self.rest = rest
        return self


def cutoff(S: Tensor, n: int, rtol: float | None) -> float:
    """Relative size below which a singular value counts as zero: rtol, or n times the dtype's epsilon."""
    return n * torch.finfo(S.dtype).eps if rtol is None else rtol


def decomposed(what: str, decompose: Callable[..., _Result], *args: Any) -> _Result:
    """``decompose(*args)``; ValueError where torch finds no decomposition of ``what``."""
    try:
        return decompose(*args)
    except RuntimeError as error:
        if not isinstance(error, torch.linalg.LinAlgError) and "infs or NaNs" not in str(error):  # eig's error
            raise
        raise ValueError(f"{what} has NaN or infinite values, or overflows when it is decomposed") from error


def largest(S: Tensor, rest: Tensor) -> Tensor:
    """The largest singular value [...] of S [..., k], k possibly 0, and the size of the rest."""
    return torch.maximum(S.amax(-1) if S.shape[-1] else S.sum(-1), rest)


def pseudo_inverse_values(S: Tensor, limit: Tensor) -> Tensor:
    """1 / S where S > limit, else 0."""
    keep = limit < S
    return torch.where(keep, torch.where(keep, S, torch.ones_like(S)).reciprocal(), torch.zeros_like(S))


def matrix_inverse(matrix: Tensor, what: str, read: bool) -> Tensor:
    """matrix^{-1} [..., n, n] ``unless_singular``."""
    inverse, info = torch.linalg.inv_ex(matrix)
    if matrix.numel() == 0:
        return inverse
    condition = torch.linalg.matrix_norm(matrix.detach(), 1) * torch.linalg.matrix_norm(inverse.detach(), 1)
    condition = condition.masked_fill(info != 0, torch.inf)
    return unless_singular(inverse, condition, f"{what} {tuple(matrix.shape)}", read)


def unless_singular(inverse: Tensor, condition: Tensor, what: str, read: bool) -> Tensor:
    """``inverse``, NaN unless the condition number [...] is below 1 / epsilon.

    Raises:
        ValueError: it is not, and ``read``: the host waits to see it. The message names pinv.
    """
    regular = condition < 1.0 / torch.finfo(condition.dtype).eps
    if read and not bool(regular.all()):
        raise ValueError(
            f"{what} is singular to working precision (condition number {float(condition.max()):.1e}): "
            "it has no inverse; use pinv()"
        )
    return torch.where(regular.reshape(*regular.shape, *(1,) * (inverse.ndim - regular.ndim)), inverse, torch.nan)
