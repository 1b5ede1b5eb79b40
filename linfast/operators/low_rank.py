"""LowRank: A = alpha I + U V^T, and its algebra in O(n r^2) without an n x n matrix.

With S = V^T U [r, r], and Q an orthonormal basis of span[U V] (k <= 2 r columns):

    product   (a I + U V^T)(b I + P Q^T) = ab I + [b U | a P + U (V^T P)] [V | Q]^T
    power     A^m = a_m I + U M_m V^T,  a_{p+q} = a_p a_q,  M_{p+q} = a_p M_q + a_q M_p + M_p S M_q
    inverse   1/alpha I - 1/alpha U (alpha I + S)^{-1} V^T                       (Woodbury)
    svd       alpha (I - Q Q^T) + Q (alpha I + Q^T U V^T Q) Q^T: the core's svd, rest = alpha
    pinv      1/alpha I + Q (core^+ - 1/alpha I) Q^T;  for alpha = 0 from two thin QRs
    eig       alpha + eig(S), vectors U X; the other n - r eigenvalues are alpha
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.low_rank import low_rank
from .base import Leaf, hold
from .diagonal import Diagonal
from .spectral import SVD, Eig, cutoff, inverse_or_raise, pseudo_inverse_values

__all__ = ["LowRank"]


class LowRank(Leaf):
    """A = alpha I + U V^T.

    Args:
        alpha: a number or a 0-d tensor.
        U: [n, r], or one a sample [B, n, r].
        V: like U. With alpha the number 0, U and V may differ in n: A is n_out x n_in.

    Parameters are trained; other tensors are constants.

    Raises:
        ValueError: shapes or dtypes of U and V that do not fit together.
    """

    U: Tensor
    V: Tensor

    def __init__(self, alpha: float | Tensor, U: Tensor, V: Tensor) -> None:
        super().__init__()
        if U.ndim not in (2, 3) or U.ndim != V.ndim or U.shape[-1] != V.shape[-1] or U.shape[:-2] != V.shape[:-2]:
            raise ValueError(
                f"U and V must be [n, r], or both [B, n, r]; got {tuple(U.shape)} and {tuple(V.shape)}"
            )
        if U.dtype != V.dtype:
            raise ValueError(f"U and V must have one dtype; got {U.dtype} and {V.dtype}")
        self.n_out, self.n_in = U.shape[-2], V.shape[-2]
        if self.n_out != self.n_in and not (isinstance(alpha, (int, float)) and alpha == 0):
            raise ValueError(f"alpha must be 0 for a {self.n_out} x {self.n_in} operator; got {alpha}")
        hold(self, "alpha", alpha)
        hold(self, "U", U)
        hold(self, "V", V)

    @property
    def batched(self) -> bool:
        return self.U.ndim == 3

    @property
    def _is_plain(self) -> bool:
        """Whether alpha is zero: A = U V^T."""
        return float(self.alpha) == 0.0

    @property
    def absorbs(self) -> bool:
        return self._is_plain and not self.batched

    @property
    def _is_wide(self) -> bool:
        """Whether span[U V] may be everything: structure no longer pays."""
        return 2 * self.U.shape[-1] >= min(self.n_out, self.n_in)

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        U, V = (self.V, self.U) if transpose else (self.U, self.V)
        return low_rank(z, U, V, self.alpha)

    def to_dense(self) -> Tensor:
        dense = self.U @ self.V.mT
        if self.n_out != self.n_in:
            return dense
        return dense + self.alpha * torch.eye(self.n_in, dtype=dense.dtype, device=dense.device)

    def _transposed(self) -> Leaf:
        return LowRank(self.alpha, self.V, self.U)

    def _scaled(self, factor: float | Tensor) -> Leaf:
        return LowRank(factor * self.alpha, factor * self.U, self.V)

    def _plus(self, other: Leaf) -> Leaf | None:
        if not isinstance(other, LowRank) or self.batched != other.batched:
            return None
        return LowRank(self.alpha + other.alpha, torch.cat((self.U, other.U), -1), torch.cat((self.V, other.V), -1))

    def _times(self, other: Leaf) -> Leaf | None:
        if self.absorbs and not other.batched:  # U (V^T B) = U (B^T V)^T
            return LowRank(0.0, self.U, other._product(self.V.mT, transpose=True).mT)
        if not isinstance(other, LowRank) or self.batched != other.batched:
            return None
        P = self.alpha * other.U + self.U @ (self.V.mT @ other.U)
        U = torch.cat((other.alpha * self.U, P), -1)
        return LowRank(self.alpha * other.alpha, U, torch.cat((self.V, other.V), -1))

    def _power(self, n: int) -> Leaf:
        if n == 0:
            return Diagonal.of(torch.ones(self.n_in, dtype=self.U.dtype, device=self.U.device))
        S = self.V.mT @ self.U
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        # (a, M) stands for a I + U M V^T; binary powers.
        result: tuple[float | Tensor, Tensor] = (1.0, torch.zeros_like(S))
        square: tuple[float | Tensor, Tensor] = (self.alpha, eye.expand_as(S))
        while n:
            if n & 1:
                result = _multiply(result, square, S)
            n >>= 1
            square = _multiply(square, square, S) if n else square
        return LowRank(result[0], self.U @ result[1], self.V)

    def _inverse(self) -> Leaf:
        if self._is_plain:
            if self.U.shape[-1] < self.n_in:
                raise ValueError(
                    f"A = U V^T has rank at most {self.U.shape[-1]} of {self.n_in}: it is singular and has no "
                    "inverse; use pinv()"
                )
            return self._dense()._inverse()
        S = self.V.mT @ self.U
        core = self.alpha * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) + S
        U = self.U @ inverse_or_raise(core, "alpha I + V^T U")
        return LowRank(1.0 / self.alpha, U / -self.alpha, self.V)

    def _pinv(self, rtol: float | None) -> Leaf:
        if self._is_wide:
            return self._dense()._pinv(rtol)
        left, core, right = self._thin()
        X, S, Yh = torch.linalg.svd(core)
        largest = S.amax(-1, keepdim=True).clamp(min=abs(float(self.alpha)))
        limit = cutoff(S, max(self.n_out, self.n_in), rtol) * largest
        core_pinv = (Yh.mT * pseudo_inverse_values(S, limit)[..., None, :]) @ X.mT
        if abs(float(self.alpha)) <= float(limit.max()):
            return LowRank(0.0, right @ core_pinv, left)
        eye = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        return LowRank(1.0 / self.alpha, right @ (core_pinv - eye / self.alpha), left)

    def _svd(self) -> SVD:
        if self._is_wide:
            return self._dense()._svd()
        left, core, right = self._thin()
        X, S, Yh = torch.linalg.svd(core)
        return SVD(left @ X, S, Yh @ right.mT, rest=0.0 if self._is_plain else self.alpha)

    def _eig(self) -> Eig:
        if self._is_plain or self._is_wide:
            return self._dense()._eig()
        values, X = torch.linalg.eig(self.V.mT @ self.U)
        return Eig(values + self.alpha, self.U.to(X.dtype) @ X, rest=self.alpha)

    def _thin(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal L, R and a small core with A = L core R^T, plus alpha off span L = span R."""
        if self._is_plain:
            Qu, Ru = torch.linalg.qr(self.U)
            Qv, Rv = torch.linalg.qr(self.V)
            return Qu, Ru @ Rv.mT, Qv
        Q = torch.linalg.qr(torch.cat((self.U, self.V), -1)).Q
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return Q, self.alpha * eye + (Q.mT @ self.U) @ (self.V.mT @ Q), Q


def _multiply(
    left: tuple[float | Tensor, Tensor], right: tuple[float | Tensor, Tensor], S: Tensor
) -> tuple[float | Tensor, Tensor]:
    """(a I + U M V^T)(b I + U N V^T) = ab I + U (a N + b M + M S N) V^T."""
    (a, M), (b, N) = left, right
    return a * b, a * N + b * M + M @ S @ N
