"""Leaf, the base class of operators that hold tensors, and Dense, the matrix that any operator can become."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_count, check_tensor
from ..ops.latent_matmul import latent_matmul
from .base import LatentOperator, hold
from .spectral import SVD, Eig, matrix_inverse


class Leaf(LatentOperator):
    """An operator that holds tensors. Powers, inverses and decompositions by default use ``_general()``."""

    @property
    def batched(self) -> bool:
        """Whether it holds one operator per sample."""
        return False

    @property
    def absorbs(self) -> bool:
        """Whether its product with any operator, on either side, has its structure."""
        return False

    def closed(self) -> Leaf:
        return self

    def _dense(self) -> Dense:
        return Dense.of(self.to_dense())

    def _general(self) -> Leaf:
        """The operator in a more general structure, which computes what this class does not override."""
        return self._dense()

    def _transposed(self) -> Leaf:
        raise NotImplementedError

    def _scaled(self, factor: float | Tensor) -> Leaf:
        raise NotImplementedError

    def _plus(self, other: Leaf) -> Leaf | None:
        """self + other in closed form, or None."""
        return None

    def _times(self, other: Leaf) -> Leaf | None:
        """self @ other in closed form, or None."""
        return None

    def _power(self, n: int) -> LatentOperator:
        return self._general()._power(n)

    def _inverse(self, read: bool) -> LatentOperator:
        return self._general()._inverse(read)

    def _pinv(self, rtol: float) -> LatentOperator:
        return self._general()._pinv(rtol)

    def _svd(self) -> SVD:
        return self._general()._svd()

    def _values(self) -> tuple[Tensor, float | Tensor]:
        """(S, rest) of ``_svd``; overridden where they cost less without the singular vectors."""
        svd = self._svd()
        return svd.S, svd.rest

    def _eig(self) -> Eig:
        return self._general()._eig()


class Dense(Leaf):
    """A z = weight z, by default with a trained matrix that starts with orthonormal rows or columns.

    Args:
        n_out, n_in: size; n_in defaults to n_out.
        weight: the matrix, [n_out, n_in] or one per sample [B, n_out, n_in]. A Parameter is trained,
            any other tensor is a constant. ``Dense.of(weight)`` takes the size from it.
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
                f"weight must be [{self.n_out}, {self.n_in}] or one per sample [B, {self.n_out}, {self.n_in}]; "
                f"got {tuple(weight.shape)}"
            )
        hold(self, "weight", weight)

    @classmethod
    def of(cls, weight: Tensor) -> Dense:
        """Dense with this matrix, [n_out, n_in] or one per sample [B, n_out, n_in]."""
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

    def _transposed(self) -> Leaf:
        return Dense.of(self.weight.mT)

    def _scaled(self, factor: float | Tensor) -> Leaf:
        return Dense.of(factor * self.weight)

    def _plus(self, other: Leaf) -> Leaf:
        return Dense.of(self.weight + other.to_dense())

    def _times(self, other: Leaf) -> Leaf:
        if self.batched or other.batched:
            return Dense.of(self.weight @ other.to_dense())
        # The rows of A B are B^T applied to the rows of A, without forming the matrix of B.
        return Dense.of(other._product(self.weight, transpose=True))

    def _power(self, n: int) -> Leaf:
        return Dense.of(torch.linalg.matrix_power(self.weight, n))

    def _inverse(self, read: bool) -> Leaf:
        return Dense.of(matrix_inverse(self.weight, "A", read))

    def _pinv(self, rtol: float) -> Leaf:
        return Dense.of(torch.linalg.pinv(self.weight, rtol=rtol))

    def _svd(self) -> SVD:
        return SVD(*torch.linalg.svd(self.weight, full_matrices=False))

    def _values(self) -> tuple[Tensor, float | Tensor]:
        return torch.linalg.svdvals(self.weight), 0.0

    def _eig(self) -> Eig:
        return Eig(*torch.linalg.eig(self.weight))


def check_size(kind: str, name: str, n: object) -> int:
    """n as an int of at least 0. TypeError for a tensor, which belongs in ``of``, and for any other type."""
    if isinstance(n, Tensor):
        raise TypeError(f"{kind}: {name} is a size; {kind}.of(...) takes the tensor")
    return check_count(f"{kind}: {name}", n, least=0)
