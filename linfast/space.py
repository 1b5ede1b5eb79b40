"""InducedSpace: the vector space that an invertible g induces on its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_dense, check_factor, check_tensor, said_of
from .operators.spectral import decomposed


def check_invertible(name: str, g: object) -> None:
    """Raise unless g can be called and has an inverse."""
    if not callable(g) or not callable(getattr(g, "inverse", None)):
        raise TypeError(f"{name} must be a Bijection, or have forward and inverse; got {type(g).__name__}")


def decode_latents(g: nn.Module, z: Tensor, context: Mapping[str, Any]) -> Tensor:
    """g^{-1}(z), after reshaping z to g's sample shape where g has one, its latents share it, and it fits z."""
    check_dense("z", z)
    shape: Any = getattr(g, "shape", None)
    as_many = shape is not None and z.ndim and z.shape[1:].numel() == torch.Size(shape).numel()
    if as_many and getattr(g, "features_out", None) in (None, shape[0]):
        z = z.reshape(z.shape[0], *shape)
    return g.inverse(z, **context)  # type: ignore[operator]


class InducedSpace:
    """The vector space that g induces on its inputs, by computing with g(v) in place of v.

        u (+) v = g^{-1}(g(u) + g(v))      a (.) v = g^{-1}(a g(v))      <u, v> = g(u)^T g(v)

    It is a Hilbert space with zero vector g^{-1}(0). Methods take batches [B, ...] of vectors. Source: arXiv
    2510.08570.

    Args:
        g: a Bijection, or any module with forward and inverse.
        context: keywords that every call passes to g.
    """

    def __init__(self, g: nn.Module, **context: Any) -> None:
        check_invertible("g", g)
        self.g = g
        self.context = context

    def add(self, u: Tensor, v: Tensor) -> Tensor:
        """u (+) v = g^{-1}(g(u) + g(v)), per sample. A batch of size 1 is broadcast."""
        z, w = self._encode_two(u, v)
        return self._decode(z + w)

    def scale(self, a: float | Tensor, v: Tensor) -> Tensor:
        """a (.) v = g^{-1}(a g(v)); a is a number, a 0-d tensor, or [B], one value per sample."""
        z = self._encode("v", v)
        return self._decode(_per_row("a", a, z) * z)

    def neg(self, v: Tensor) -> Tensor:
        """The additive inverse g^{-1}(-g(v))."""
        return self._decode(-self._encode("v", v))

    def zero(self, like: Tensor) -> Tensor:
        """The zero vector g^{-1}(0), as a batch of the size of ``like``."""
        return self._decode(torch.zeros_like(self._encode("like", like)))

    def combine(self, weights: Tensor | Sequence[float], vectors: Tensor) -> Tensor:
        """g^{-1}(sum_k weights[m, k] g(vectors[k])): combinations of K vectors.

        Args:
            weights: [M, K], or [K] for one combination.
            vectors: [K, ...].

        Returns:
            [M, ...]; [1, ...] for weights [K].
        """
        check_tensor("vectors", vectors)
        weights = _weights(weights, vectors)
        if not vectors.ndim or weights.ndim not in (1, 2) or weights.shape[-1] != vectors.shape[0]:
            raise ValueError(
                f"weights must be [K] or [M, K] for vectors [K, ...], {tuple(vectors.shape)}; "
                f"got {tuple(weights.shape)}"
            )
        z = self._encode("vectors", vectors)
        combined = torch.atleast_2d(weights.to(z.dtype)) @ z.flatten(1)
        return self._decode(combined.reshape(-1, *z.shape[1:]))

    def interpolate(self, u: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
        """(1 - t) (.) u (+) t (.) v, per sample; t is a number, 0-d or [B]. A batch of size 1 is broadcast."""
        start, end = torch.broadcast_tensors(*self._encode_two(u, v))
        t = _per_row("t", t, start)
        return self._decode((1 - t) * start + t * end)

    def mean(self, xs: Tensor) -> Tensor:
        """The mean g^{-1}(1/B sum_b g(x_b)) of a batch, as a batch of size 1; ValueError for B = 0."""
        z = self._encode("xs", xs)
        if z.shape[0] == 0:
            raise ValueError(f"the mean of no vectors is not defined; got xs {tuple(xs.shape)}")
        return self._decode(z.mean(dim=0, keepdim=True))

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """``<u, v> = g(u)^T g(v)`` per sample, [B]."""
        z, w = self._encode_two(u, v)
        return (z * w).flatten(1).sum(-1)

    def norm(self, v: Tensor) -> Tensor:
        """|v| = |g(v)| per sample, [B]."""
        return self._encode("v", v).flatten(1).norm(dim=-1)

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """|g(u) - g(v)| per sample, [B]."""
        z, w = self._encode_two(u, v)
        return (z - w).flatten(1).norm(dim=-1)

    def project(self, v: Tensor, basis: Tensor) -> Tensor:
        """The orthogonal projections of v [B, ...] onto the span of basis [K, ...], which may be dependent."""
        z, spanning = self._encode("v", v), self._encode("basis", basis).flatten(1)
        _, S, Vh = decomposed("basis", lambda: torch.linalg.svd(spanning, full_matrices=False))
        keep = S[:1] * (max(spanning.shape) * torch.finfo(S.dtype).eps) < S
        directions = Vh * keep[:, None]
        return self._decode(((z.flatten(1) @ directions.mT) @ directions).reshape(z.shape))

    def _encode(self, name: str, x: Tensor) -> Tensor:
        return said_of(name, self.g, x, **self.context)

    def _encode_two(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """g(u) and g(v); ValueError unless their batch sizes are equal or one of them is 1."""
        z, w = self._encode("u", u), self._encode("v", v)
        if z.shape[1:] != w.shape[1:] or (z.shape[0] != w.shape[0] and 1 not in (z.shape[0], w.shape[0])):
            raise ValueError(
                "u and v must have one sample shape, and equal batch sizes or one of size 1; "
                f"got u {tuple(u.shape)} and v {tuple(v.shape)}"
            )
        return z, w

    def _decode(self, z: Tensor) -> Tensor:
        return decode_latents(self.g, z, self.context)


def _weights(weights: Tensor | Sequence[float], vectors: Tensor) -> Tensor:
    """The weights of a combination as a tensor; ValueError unless they are real numbers."""
    if isinstance(weights, Tensor):
        check_dense("weights", weights)
    try:
        weights = torch.as_tensor(weights, device=vectors.device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"weights must be numbers [K] or [M, K]; {error}") from error
    if weights.is_complex() or weights.dtype == torch.bool:
        raise ValueError(f"weights must be real numbers; got {weights.dtype}")
    return weights


def _per_row(name: str, a: float | Tensor, z: Tensor) -> float | Tensor:
    """a; where it is a [B] tensor, in z's dtype and reshaped to scale the samples of z."""
    if not isinstance(a, Tensor) or a.ndim == 0:
        check_factor(name, a, z, "the vectors")
        return a
    check_tensor(name, a, z, "the vectors")
    if a.shape != z.shape[:1]:
        raise ValueError(f"{name} must be a number, 0-d or [{z.shape[0]}], one per row; got {tuple(a.shape)}")
    return a.to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1))
