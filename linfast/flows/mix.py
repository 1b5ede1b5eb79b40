"""Linear mixing of channels, each an invertible C x C matrix W: y = W x at every position.

    Mix "lu"     W = P L U: P a fixed permutation, L unit lower triangular, U upper triangular
                 with diagonal exp(log_diagonal). Inverse by triangular solves,
                 log|det W| = sum(log_diagonal)
    Mix "free"   W itself, inverse by a solve, log|det W| by slogdet
    Householder  W = H_1 ... H_k, H_i = I - 2 v_i v_i^T / |v_i|^2, orthogonal, log|det| = 0
    Permute      y[:, i] = x[:, permutation[i]], log|det| = 0

x [B, C, ...]. W or W^{-1} is computed with gradients at every call (once while frozen),
in fp32 or wider and outside autocast. Source: Glow (arXiv 1807.03039).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_dense
from ..dispatch import inverse_or_nan, outside_autocast
from ..freeze import derived
from ..ops.channel_mix import channel_mix
from .bijection import ChannelLinear, constant_log_det, wide
from .undo import Context, Outputs


class _LinearMix(ChannelLinear):
    """y = W x with W, W^{-1} and log|det W| from the subclass."""

    def _wide_weight(self, numbers: Sequence[Tensor], inverse: bool) -> Tensor:
        """W, or W^{-1} for ``inverse``, in fp32 or wider; the first of ``numbers`` is a parameter."""
        raise NotImplementedError

    @outside_autocast
    def _weight(self, inverse: bool) -> Tensor:
        numbers = self.numbers()
        return derived(self, inverse, lambda: self._wide_weight(numbers, inverse).to(numbers[0].dtype))

    def after(self, numbers: Sequence[Tensor], weight: Tensor, bias: Tensor | None, inverse: bool) -> Outputs:
        matrix = self._wide_weight(numbers, inverse)
        return matrix @ weight, None if bias is None else (matrix @ bias[..., None])[..., 0]

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        y = channel_mix(x, self._weight(inverse))
        if not log_det:
            return y, None
        of_position = derived(self, "log_abs_det", lambda: self.log_abs_det(self.numbers()))
        return y, constant_log_det(x, of_position, inverse)


class Mix(_LinearMix):
    """y = W x over channels, W an invertible matrix.

    Args:
        features: C.
        kind: "lu" has the factors of W = P L U, which is invertible for any parameters. W
            starts as the random permutation P: at L = U = I, noise on the factors does the
            least harm. (At the factors of a random rotation, Glow's start, 5% noise at C = 64
            loses seven digits over eight layers.) "free" has W itself, which starts as a
            random orthogonal matrix; if training makes it singular, its inverse is NaN.
    """

    _shown = ("features", "kind")
    permutation: Tensor

    def __init__(self, features: int, kind: str = "lu") -> None:
        super().__init__()
        check_choice("kind", kind, ("lu", "free"))
        self.features = features = check_count("features", features)
        self.kind = kind
        if kind == "free":
            self.weight = nn.Parameter(torch.linalg.qr(torch.randn(features, features)).Q.contiguous())
            return
        self.register_buffer("permutation", torch.randperm(features))
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))

    def numbers(self) -> tuple[Tensor, ...]:
        if self.kind == "free":
            return (self.weight,)
        return self.lower, self.upper, self.log_diagonal, self.permutation

    def _wide_weight(self, numbers: Sequence[Tensor], inverse: bool) -> Tensor:
        if self.kind == "free":
            weight = wide(numbers[0])
            return inverse_or_nan(weight) if inverse else weight
        (lower, upper, log_diagonal), permutation = map(wide, numbers[:3]), numbers[3]
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        L, U = lower.tril(-1) + eye, upper.triu(1) + torch.diag_embed(log_diagonal.exp())
        if not inverse:
            return torch.take_along_dim(L @ U, permutation[..., None], -2)
        half = torch.linalg.solve_triangular(L, eye[permutation].mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(U, half, upper=True)

    def log_abs_det(self, numbers: Sequence[Tensor]) -> Tensor:
        if self.kind == "free":
            return torch.linalg.slogdet(wide(numbers[0])).logabsdet
        return wide(numbers[2]).sum(-1)


class Householder(_LinearMix):
    """y = H_1 ... H_k x over channels, a learned product of k reflections; orthogonal, log|det| = 0.

    Args:
        features: C.
        count: k, at least 1; k = C reaches every orthogonal matrix of determinant (-1)^C.
    """

    _shown = ("features", "count")

    def __init__(self, features: int, count: int = 4) -> None:
        super().__init__()
        self.features = features = check_count("features", features)
        self.count = count = check_count("count", count)
        self.vectors = nn.Parameter(torch.randn(count, features))

    def numbers(self) -> tuple[Tensor, ...]:
        return (self.vectors,)

    def _wide_weight(self, numbers: Sequence[Tensor], inverse: bool) -> Tensor:
        V = wide(numbers[0])
        eye = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
        Q = eye - V.mT @ reflections(V)
        return Q.mT if inverse else Q


def reflections(vectors: Tensor) -> Tensor:
    """T V with H_1 ... H_k = I - V^T T V, for the vectors V [..., k, C] of k reflections.

    T^{-1} is the strict upper triangle of V V^T plus half its diagonal.
    """
    products = vectors @ vectors.mT
    halved = products.triu() - torch.diag_embed(0.5 * products.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.solve_triangular(halved, vectors, upper=True)


class Permute(ChannelLinear):
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
        features = check_count("features", features)
        if permutation is None:
            order = torch.randperm(features)
        elif isinstance(permutation, str):
            if permutation != "reverse":
                raise ValueError(f"permutation must be a tensor, 'reverse' or None; got {permutation!r}")
            order = torch.arange(features - 1, -1, -1)
        else:
            order = _integers("permutation", permutation)
            check_permutation(order, features)
        self.features = features
        self.register_buffer("permutation", order)

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        order = self.permutation.argsort() if inverse else self.permutation
        return x.index_select(1, order), constant_log_det(x) if log_det else None

    def numbers(self) -> tuple[Tensor, ...]:
        return (self.permutation,)

    def after(self, numbers: Sequence[Tensor], weight: Tensor, bias: Tensor | None, inverse: bool) -> Outputs:
        order = numbers[0].argsort() if inverse else numbers[0]
        weight = torch.take_along_dim(weight.expand(*order.shape, -1), order[..., None], -2)
        return weight, None if bias is None else torch.take_along_dim(bias, order, -1)


def _integers(name: str, values: Any) -> Tensor:
    """A tensor, an array or a sequence of integers as an int64 tensor."""
    if isinstance(values, Tensor):
        check_dense(name, values)
    try:
        tensor = torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be integers; {error}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {tensor.dtype}")
    return tensor.long()


def check_permutation(order: Tensor, features: int | None, name: str = "permutation") -> None:
    """ValueError unless ``order`` holds 0 to features - 1 once each; on the meta device only shapes are checked."""
    right = order.shape == (features,)
    if right and not order.is_meta:
        right = torch.equal(order.sort().values, torch.arange(len(order), device=order.device))
    if not right:
        got = f"shape {tuple(order.shape)}" if order.is_meta else order.tolist()
        last = "n" if features is None else features - 1
        raise ValueError(f"{name} must hold 0 to {last} once each for features = {features}; got {got}")
