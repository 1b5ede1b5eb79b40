"""Diagonal: A z = diagonal * z. Projection: a diagonal of learned zeros and ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_count, check_tensor
from .base import LatentOperator, hold
from .dense import Leaf, check_size
from .spectral import SVD, Eig, unless_singular


class Diagonal(Leaf):
    """A z = diagonal * z, by default with a trained diagonal that starts as ones.

    Args:
        n: size.
        diagonal: [n], or one per sample [B, n]. A Parameter is trained, any other tensor
            is a constant. ``Diagonal.of(diagonal)`` takes n from it.
    """

    diagonal: Tensor

    def __init__(self, n: int, diagonal: Tensor | None = None) -> None:
        super().__init__()
        n = check_size("Diagonal", "n", n)
        self.n = self.n_out = self.n_in = n
        diagonal = nn.Parameter(torch.ones(n)) if diagonal is None else diagonal
        check_tensor("diagonal", diagonal)
        if diagonal.ndim not in (1, 2) or diagonal.shape[-1] != n:
            raise ValueError(f"diagonal must be [{n}] or [B, {n}], of size n; got {tuple(diagonal.shape)}")
        hold(self, "diagonal", diagonal)

    @classmethod
    def of(cls, diagonal: Tensor) -> Diagonal:
        """Diagonal with this diagonal, [n] or one per sample [B, n]."""
        check_tensor("diagonal", diagonal)
        if diagonal.ndim < 1:
            raise ValueError("diagonal must be [n] or [B, n]; got ()")
        return cls(diagonal.shape[-1], diagonal)

    @property
    def batched(self) -> bool:
        return self.diagonal.ndim == 2

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        if self.batched and len(self.diagonal) != len(z):
            raise ValueError(f"A has {len(self.diagonal)} diagonals for {len(z)} rows of z")
        return z * self.diagonal

    def to_dense(self) -> Tensor:
        return torch.diag_embed(self.diagonal)

    def _transposed(self) -> Leaf:
        return self

    def _scaled(self, factor: float | Tensor) -> Leaf:
        return Diagonal.of(factor * self.diagonal)

    def _plus(self, other: Leaf) -> Leaf | None:
        return Diagonal.of(self.diagonal + other.diagonal) if isinstance(other, Diagonal) else None

    def _times(self, other: Leaf) -> Leaf | None:
        return Diagonal.of(self.diagonal * other.diagonal) if isinstance(other, Diagonal) else None

    def _power(self, n: int) -> Leaf:
        return Diagonal.of(self.diagonal**n)

    def _inverse(self, read: bool) -> Leaf:
        size = self.diagonal.detach().abs()
        condition = size.amax(-1) / size.amin(-1) if self.n else size.sum(-1)
        inverse = self.diagonal.reciprocal()
        return Diagonal.of(unless_singular(inverse, condition, f"A (diagonal [{self.n}])", read))

    def _pinv(self, rtol: float) -> Leaf:
        size = self.diagonal.abs()
        kept = size > rtol * size.amax(-1, keepdim=True) if self.n else size > 0
        return Diagonal.of(torch.where(kept, torch.where(kept, self.diagonal, 1.0).reciprocal(), 0.0))

    def _svd(self) -> SVD:
        S, order = self.diagonal.abs().sort(dim=-1, descending=True)
        eye = torch.eye(self.n, dtype=S.dtype, device=S.device)
        Vh = eye[order]
        negative = self.diagonal.gather(-1, order) < 0
        return SVD(torch.where(negative[..., None, :], -Vh.mT, Vh.mT), S, Vh)

    def _values(self) -> tuple[Tensor, float | Tensor]:
        return self.diagonal.abs().sort(dim=-1, descending=True).values, 0.0

    def _eig(self) -> Eig:
        values = self.diagonal.to(torch.promote_types(self.diagonal.dtype, torch.complex64))
        eye = torch.eye(self.n, dtype=values.dtype, device=values.device)
        return Eig(values, eye.expand(*values.shape, self.n))


class Projection(LatentOperator):
    """A = diag(round(sigmoid(logits))), which keeps some coordinates and drops the others; A A = A exactly.

    The logits [n] are trained, with the gradient of sigmoid(logits) (straight-through). Source: the
    linear idempotent generative network of arXiv 2510.08570, whose change of basis is part of g.

    Args:
        n: size.
        rank: number of coordinates that are kept at the start, the first ones; by default n // 2.
    """

    _config_names = {"rank": "initial_rank"}

    def __init__(self, n: int, rank: int | None = None) -> None:
        super().__init__()
        n = check_size("Projection", "n", n)
        kept = n // 2 if rank is None else check_count("rank", rank, least=0)
        if not 0 <= kept <= n:
            raise ValueError(f"rank must be between 0 and n = {n}; got {rank}")
        self.n = self.n_out = self.n_in = n
        self.initial_rank = kept
        logits = torch.ones(n)
        logits[kept:] = -1.0
        self.logits = nn.Parameter(logits)

    def mask(self) -> Tensor:
        """[n] of exact zeros and ones; its gradient is that of sigmoid(logits)."""
        soft = self.logits.sigmoid()
        return soft.detach().round() + (soft - soft.detach())

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        return z * self.mask()

    def to_dense(self) -> Tensor:
        return torch.diag(self.mask())

    def closed(self) -> Leaf:
        return Diagonal.of(self.mask())
