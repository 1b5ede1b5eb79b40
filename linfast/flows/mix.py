"""Linear mixing of channels, each an invertible C x C matrix W: y = W x at every position.

    Mix "lu"     W = P L (U + diag(sign exp(log_diagonal))), inverse by triangular solves,
                 log|det W| = sum(log_diagonal)
    Mix "free"   W itself, inverse by a solve, log|det W| by slogdet
    Householder  W = H_1 ... H_k, H_i = I - 2 v_i v_i^T / |v_i|^2, orthogonal, log|det| = 0
    Permute      y[:, i] = x[:, permutation[i]], log|det| = 0

x [B, C, ...]. The C x C matrix and its inverse are formed in the graph at every
call. Source: Glow (arXiv 1807.03039).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.channel_mix import channel_mix
from .bijection import Bijection, constant_log_det, position_count

__all__ = ["Householder", "Mix", "Permute"]


class _LinearMix(Bijection):
    """y = W x with W, W^{-1} and log|det W| from the subclass."""

    def _weight(self, inverse: bool) -> Tensor:
        raise NotImplementedError

    def _log_abs_det(self) -> Tensor | float:
        return 0.0

    def _transform(
        self, x: Tensor, context: Mapping[str, Any], inverse: bool, log_det: bool
    ) -> tuple[Tensor, Tensor | None]:
        y = channel_mix(x, self._weight(inverse))
        if not log_det:
            return y, None
        total = self._log_abs_det() * position_count(x)
        return y, constant_log_det(x, -total if inverse else total)

    def extra_repr(self) -> str:
        return f"features={self.features}"


class Mix(_LinearMix):
    """y = W x over channels, W an invertible matrix started as a random rotation.

    Args:
        features: C.
        kind: "lu" keeps W = P L (U + diag(sign e^log_diagonal)): invertible whatever
            the parameters. "free" keeps W, which training may make singular.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, features: int, kind: str = "lu") -> None:
        super().__init__()
        if kind not in ("lu", "free"):
            raise ValueError(f"kind must be 'lu' or 'free'; got {kind!r}")
        self.features = features
        self.kind = kind
        rotation = torch.linalg.qr(torch.randn(features, features)).Q
        if kind == "free":
            self.weight = nn.Parameter(rotation.contiguous())
            return
        P, L, U = torch.linalg.lu(rotation)
        diagonal = U.diagonal()
        self.lower = nn.Parameter(L.tril(-1))
        self.upper = nn.Parameter(U.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.register_buffer("sign", diagonal.sign())
        self.register_buffer("permutation", P.argmax(dim=1))

    def _factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.lower.shape[0], dtype=self.lower.dtype, device=self.lower.device)
        diagonal = torch.diag(self.sign * self.log_diagonal.exp())
        return self.lower.tril(-1) + eye, self.upper.triu(1) + diagonal

    def _weight(self, inverse: bool) -> Tensor:
        if self.kind == "free":
            return torch.linalg.inv(self.weight) if inverse else self.weight
        L, U = self._factors()
        if not inverse:
            return (L @ U)[self.permutation]
        eye = torch.eye(L.shape[0], dtype=L.dtype, device=L.device)
        permuted = eye[self.permutation].mT
        half = torch.linalg.solve_triangular(L, permuted, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(U, half, upper=True)

    def _log_abs_det(self) -> Tensor:
        if self.kind == "free":
            return torch.linalg.slogdet(self.weight).logabsdet
        return self.log_diagonal.sum()

    def extra_repr(self) -> str:
        return f"features={self.features}, kind={self.kind!r}"


class Householder(_LinearMix):
    """y = H_1 ... H_k x over channels, a learned product of k reflections; orthogonal, log|det| = 0.

    Args:
        features: C.
        count: k, at least 1; C reflections reach every orthogonal matrix of that determinant.
    """

    def __init__(self, features: int, count: int = 4) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count must be at least 1; got {count}")
        self.features = features
        self.count = count
        self.vectors = nn.Parameter(torch.randn(count, features))

    def _weight(self, inverse: bool) -> Tensor:
        Q = torch.eye(self.vectors.shape[1], dtype=self.vectors.dtype, device=self.vectors.device)
        for v in self.vectors.unbind(0):
            Q = Q - (2.0 / v.square().sum()) * torch.outer(Q @ v, v)
        return Q.mT if inverse else Q

    def extra_repr(self) -> str:
        return f"features={self.features}, count={self.count}"


class Permute(Bijection):
    """y[:, i] = x[:, permutation[i]]; log|det| = 0.

    Args:
        features: C.
        permutation: [C] integers, "reverse", or None for a random one.

    Raises:
        ValueError: not a permutation of 0 to C - 1.
    """

    permutation: Tensor

    def __init__(self, features: int, permutation: Tensor | str | None = None) -> None:
        super().__init__()
        if permutation is None:
            order = torch.randperm(features)
        elif isinstance(permutation, str):
            if permutation != "reverse":
                raise ValueError(f"permutation must be a tensor, 'reverse' or None; got {permutation!r}")
            order = torch.arange(features - 1, -1, -1)
        else:
            order = torch.as_tensor(permutation, dtype=torch.long)
            if order.shape != (features,) or not torch.equal(order.sort().values.cpu(), torch.arange(features)):
                raise ValueError(f"permutation must hold 0 to {features - 1} once each; got {order.tolist()}")
        self.features = features
        self.register_buffer("permutation", order)

    def _transform(
        self, x: Tensor, context: Mapping[str, Any], inverse: bool, log_det: bool
    ) -> tuple[Tensor, Tensor | None]:
        order = self.permutation.argsort() if inverse else self.permutation
        return x.index_select(1, order), constant_log_det(x) if log_det else None

    def extra_repr(self) -> str:
        return f"features={self.features}"
