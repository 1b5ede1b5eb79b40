"""LowRank: A = alpha I + U V^T, and its algebra in O(n r^2) without an n x n matrix.

With S = V^T U [r, r], and Q an orthonormal basis of span[U V] (k <= 2 r columns):

    product   (a I + U V^T)(b I + P Q^T) = ab I + [b U | a P + U (V^T P)] [V | Q]^T;  U (B^T V)^T for a = 0
    power     A^m = a_m I + U M_m V^T,  a_{p+q} = a_p a_q,  M_{p+q} = a_p M_q + a_q M_p + M_p S M_q
    inverse   1/alpha I - 1/alpha U (alpha I + S)^{-1} V^T                       (Woodbury)
    svd       alpha (I - Q Q^T) + Q core Q^T, core = alpha I + Q^T U V^T Q: the core's svd, with rest = alpha
    pinv      1/alpha I + Q (core^+ - 1/alpha I) Q^T;  for alpha = 0 from two thin QRs
    eig       with the thin QR U = Q R: (w, Q X) for the eigenpairs (w, X) of alpha I + R V^T Q; rest = alpha

Where alpha is the number 0, A = U V^T may be rectangular, and its products have at most
its rank. The gradients of svd, eig and pinv pass through the QR of U, V or [U V], whose
columns must then be independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_factor, check_tensor
from ..dispatch import has_values, outside_autocast
from ..ops.low_rank import low_rank
from .base import hold
from .dense import Leaf
from .spectral import SVD, Eig, largest, matrix_inverse, unless_singular


class LowRank(Leaf):
    """A = alpha I + U V^T.

    Args:
        alpha: a number or a 0-d tensor.
        U: [n, r], or one per sample [B, n, r].
        V: like U. Where alpha is the number 0, U may be [n_out, r] and V [n_in, r].

    Parameters are trained; other tensors are constants.

    Raises:
        ValueError: U and V differ in dtype, r or B; or in n, where alpha is not the number 0.

    Examples:
        >>> A = lf.LowRank(0.5, 0.1 * torch.randn(64, 4), torch.randn(64, 4))
        >>> A.inverse()                                         # by the Woodbury identity
        LowRank(64 x 64)
    """

    alpha: float | Tensor
    U: Tensor
    V: Tensor

    def __init__(self, alpha: float | Tensor, U: Tensor, V: Tensor) -> None:
        super().__init__()
        check_tensor("LowRank: U", U)
        check_tensor("LowRank: V", V, U, "U")
        check_factor("LowRank: alpha", alpha, U, "U")
        for name, value in (("alpha", alpha), ("U", U), ("V", V)):
            hold(self, name, value)
        if U.ndim not in (2, 3) or U.ndim != V.ndim or U.shape[-1] != V.shape[-1] or U.shape[:-2] != V.shape[:-2]:
            raise ValueError(
                f"U and V must be [n, r], or both [B, n, r]; got {tuple(U.shape)} and {tuple(V.shape)}"
            )
        if U.dtype != V.dtype:
            raise ValueError(f"U and V must have one dtype; got {U.dtype} and {V.dtype}")
        self.n_out, self.n_in = U.shape[-2], V.shape[-2]
        if self.n_out != self.n_in and not (isinstance(alpha, (int, float)) and alpha == 0):
            raise ValueError(
                f"alpha must be 0 for a {self.n_out} x {self.n_in} operator; got {alpha}, U {tuple(U.shape)} and "
                f"V {tuple(V.shape)}"
            )

    @property
    def batched(self) -> bool:
        return self.U.ndim == 3

    @property
    def _is_plain(self) -> bool:
        """Whether alpha is the number 0, so that A = U V^T. A tensor does not count: its value may change."""
        return isinstance(self.alpha, (int, float)) and self.alpha == 0

    @property
    def absorbs(self) -> bool:
        return self._is_plain and not self.batched

    @property
    def _is_wide(self) -> bool:
        """Whether [U V] has at least as many columns as rows: a dense computation then costs less."""
        return 2 * self.U.shape[-1] >= min(self.n_out, self.n_in)

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        U, V = (self.V, self.U) if transpose else (self.U, self.V)
        return low_rank(z, U, V, self.alpha)

    @outside_autocast
    def to_dense(self) -> Tensor:
        return self._plus_identity(self.U @ self.V.mT)

    def _plus_identity(self, square: Tensor) -> Tensor:
        """square + alpha I."""
        if self._is_plain:
            return square
        return square + self.alpha * torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)

    def _alpha_size(self) -> Tensor:
        """|alpha| as a 0-d tensor without gradient."""
        return torch.as_tensor(self.alpha, dtype=self.U.dtype, device=self.U.device).detach().abs()

    def _transposed(self) -> Leaf:
        return LowRank(self.alpha, self.V, self.U)

    def _scaled(self, factor: float | Tensor) -> Leaf:
        return LowRank(0.0 if self._is_plain else factor * self.alpha, factor * self.U, self.V)

    def _plus(self, other: Leaf) -> Leaf | None:
        if not isinstance(other, LowRank) or self.batched != other.batched:
            return None
        return LowRank(self.alpha + other.alpha, torch.cat((self.U, other.U), -1), torch.cat((self.V, other.V), -1))

    def _times(self, other: Leaf) -> Leaf | None:
        if isinstance(other, LowRank) and self.batched == other.batched:
            return self._times_low_rank(other)
        if self.absorbs and not other.batched:  # U (V^T B) = U (B^T V)^T
            return LowRank(0.0, self.U, other._product(self.V.mT, transpose=True).mT)
        return None

    def _times_low_rank(self, other: LowRank) -> LowRank:
        smaller = self.U.shape[-1] <= other.U.shape[-1]
        if self._is_plain and (smaller or not other._is_plain):
            return LowRank(0.0, self.U, other._on_columns(self.V, transpose=True))
        P = self._on_columns(other.U)
        if other._is_plain:
            return LowRank(0.0, P, other.V)
        U = torch.cat((other.alpha * self.U, P), -1)
        return LowRank(self.alpha * other.alpha, U, torch.cat((self.V, other.V), -1))

    def _on_columns(self, columns: Tensor, transpose: bool = False) -> Tensor:
        """A, or A^T, times columns [..., n, k]."""
        U, V = (self.V, self.U) if transpose else (self.U, self.V)
        result = U @ (V.mT @ columns)
        return result if self._is_plain else self.alpha * columns + result

    def _power(self, n: int) -> Leaf:
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
        return LowRank(result[0], self.U @ result[1], self.V.clone())

    def _inverse(self, read: bool) -> Leaf:
        rank = self.U.shape[-1]
        if rank >= self.n_in:  # alpha need not be an eigenvalue of A: dividing by it could lose all digits
            return self._dense()._inverse(read)
        if self._is_plain:
            raise ValueError(
                f"A = U V^T has rank at most {rank} of {self.n_in}: it is singular and has no inverse; use pinv()"
            )
        core = matrix_inverse(self._plus_identity(self.V.mT @ self.U), "alpha I + V^T U", read)
        alpha, U, V = 1.0 / self.alpha, self.U @ core / -self.alpha, self.V.clone()
        what = f"A = alpha I + U V^T [{self.n_out}, {self.n_in}]"
        return LowRank(alpha, unless_singular(U, self._size() * LowRank(alpha, U, V)._size(), what, read), V)

    def _size(self) -> Tensor:
        """|alpha| + |U V^T|_F [...], which bounds the norm of A."""
        U, V = self.U.detach(), self.V.detach()
        product = ((U.mT @ U) * (V.mT @ V)).sum((-2, -1)).clamp(min=0.0).sqrt()
        return product + self._alpha_size()

    def _pinv(self, rtol: float) -> Leaf:
        unread = torch.compiler.is_compiling() or not has_values(self.U)
        if self._is_wide or (unread and not self._is_plain):
            return self._dense()._pinv(rtol)  # the choice of a branch below would read values
        left, core, right = self._thin()
        S = torch.linalg.svdvals(core.detach())
        alpha = self._alpha_size()
        limit = rtol * largest(S, alpha)
        core_pinv = torch.linalg.pinv(core, atol=limit, rtol=torch.zeros_like(limit))
        vanishes = alpha <= limit
        if self._is_plain or bool(vanishes.all()):
            return LowRank(0.0, right @ core_pinv, left)
        if bool(vanishes.any()):  # in some samples only
            return self._dense()._pinv(rtol)
        eye = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        return LowRank(1.0 / self.alpha, right @ (core_pinv - eye / self.alpha), left)

    def _svd(self) -> SVD:
        if self._is_wide:
            return self._dense()._svd()
        left, core, right = self._thin()
        X, S, Yh = torch.linalg.svd(core)
        return SVD(left @ X, S, Yh @ right.mT, rest=self._rest())

    def _eig(self) -> Eig:
        if self._is_wide:
            return self._dense()._eig()
        Q, R = torch.linalg.qr(self.U)  # span U is invariant: A Q = Q core
        values, X = torch.linalg.eig(self._plus_identity(R @ (self.V.mT @ Q)))
        return Eig(values, Q.to(X.dtype) @ X, rest=self._rest())

    def _rest(self) -> float | Tensor:
        """alpha as the ``rest`` of an svd or eig: a copy that does not follow changes of A."""
        return self.alpha.clone() if isinstance(self.alpha, Tensor) else float(self.alpha)

    def _thin(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal L, R and a small core with A = L core R^T, or L core L^T + alpha (I - L L^T) where L = R."""
        if self._is_plain:
            Qu, Ru = torch.linalg.qr(self.U)
            Qv, Rv = torch.linalg.qr(self.V)
            return Qu, Ru @ Rv.mT, Qv
        Q = torch.linalg.qr(torch.cat((self.U, self.V), -1)).Q
        return Q, self._plus_identity((Q.mT @ self.U) @ (self.V.mT @ Q)), Q


def _multiply(
    left: tuple[float | Tensor, Tensor], right: tuple[float | Tensor, Tensor], S: Tensor
) -> tuple[float | Tensor, Tensor]:
    """(a I + U M V^T)(b I + U N V^T) = ab I + U (a N + b M + M S N) V^T."""
    (a, M), (b, N) = left, right
    return a * b, a * N + b * M + M @ S @ N
