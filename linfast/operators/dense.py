"""Dense: A is a matrix, A(z) = z @ weight.mT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_tensor
from ..ops.latent_matmul import latent_matmul
from .base import Leaf, check_size, hold
from .spectral import SVD, Eig, matrix_inverse

__all__ = ["Dense"]


class Dense(Leaf):
    """A z for a matrix ``weight`` [n_out, n_in]; by default trained, and started orthonormal.

    Args:
        n_out, n_in: size; n_in is n_out where left out.
        weight: the matrix, [n_out, n_in] or one a sample [B, n_out, n_in]. A Parameter
            is trained, any other tensor is a constant. ``Dense.of(weight)`` reads the
            size off it.
    """

    weight: Tensor

    def __init__(self, n_out: int, n_in: int | None = None, weight: Tensor | None = None) -> None:
        super().__init__()
        self.n_out = check_size("Dense", "n_out", n_out)
        self.n_in = self.n_out if n_in is None else check_size("Dense", "n_in", n_in)
        if weight is None:
            weight = nn.Parameter(nn.init.orthogonal_(torch.empty(self.n_out, self.n_in)))
        check_tensor("weight", weight)
        if weight.ndim not in (2, 3) or weight.shape[-2:] != (self.n_out, self.n_in):
            raise ValueError(
                f"weight must be [{self.n_out}, {self.n_in}] or one a sample [B, {self.n_out}, {self.n_in}]; "
                f"got {tuple(weight.shape)}"
            )
        hold(self, "weight", weight)

    @classmethod
    def of(cls, weight: Tensor) -> Dense:
        """The operator of this matrix."""
        check_tensor("weight", weight)
        if weight.ndim < 2:
            raise ValueError(f"weight must be [n_out, n_in] or [B, n_out, n_in]; got {tuple(weight.shape)}")
        return cls(weight.shape[-2], weight.shape[-1], weight)

    @property
    def batched(self) -> bool:
        return self.weight.ndim == 3

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        return latent_matmul(z, self.weight.mT if transpose else self.weight)

    def to_dense(self) -> Tensor:
        return self.weight

    def _dense(self) -> Dense:
        return self

    def _transposed(self) -> Leaf:
        return Dense.of(self.weight.mT)

    def _scaled(self, factor: float | Tensor) -> Leaf:
        return Dense.of(factor * self.weight)

    def _plus(self, other: Leaf) -> Leaf:
        return Dense.of(self.weight + other.to_dense())

    def _times(self, other: Leaf) -> Leaf:
        if self.batched or other.batched:
            return Dense.of(self.weight @ other.to_dense())
        # Rows of A B are B^T applied to rows of A: B stays in its own structure.
        return Dense.of(other._product(self.weight, transpose=True))

    def _power(self, n: int) -> Leaf:
        return Dense.of(torch.linalg.matrix_power(self.weight, n))

    def _inverse(self, read: bool) -> Leaf:
        return Dense.of(matrix_inverse(self.weight, "A", read))

    def _pinv(self, rtol: float | None) -> Leaf:
        return Dense.of(torch.linalg.pinv(self.weight, rtol=rtol))

    def _svd(self) -> SVD:
        return SVD(*torch.linalg.svd(self.weight, full_matrices=False))

    def _values(self) -> tuple[Tensor, float | Tensor]:
        return torch.linalg.svdvals(self.weight), 0.0

    def _eig(self) -> Eig:
        return Eig(*torch.linalg.eig(self.weight))
