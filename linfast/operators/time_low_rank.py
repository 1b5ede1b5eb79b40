"""TimeLowRank: A_t = alpha I + U(t) V(t)^T with U and V generated from an embedded time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_count, check_dense, check_number, check_time
from ..dispatch import tensor_of
from ..flows.conditioners import MLP, SinusoidalEmbedding, check_time_features
from .base import LatentOperator, Leaf
from .low_rank import LowRank

__all__ = ["TimeLowRank"]


class TimeLowRank(LatentOperator):
    """A_t = alpha I + U(t) V(t)^T on z [B, n]; U(t), V(t) [n, r] come from two MLPs.

    ``A_t.at(t)`` is a LowRank operator for a number, a 0-d or a [B] tensor; ``A_t(z, t=t)``
    applies it. Source: the one-step generator of arXiv 2510.08570.

    Args:
        n: size.
        rank: r.
        alpha: weight of the identity, a constant.
        time_features: size of the sinusoidal embedding of t.
        hidden: width of the generators' two hidden layers.
    """

    _config_names = {"rank": "rank_bound"}

    def __init__(self, n: int, rank: int, alpha: float = 0.0, time_features: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.n = self.n_out = self.n_in = n = check_count("n", n)
        self.rank_bound = rank = check_count("rank", rank)
        self.alpha = check_number("alpha", alpha)
        self.time_features, self.hidden = check_time_features(time_features, least=4), check_count("hidden", hidden)
        self.embedding = SinusoidalEmbedding(time_features)
        self.u_net = self._generator()
        self.v_net = self._generator()

    def _generator(self) -> MLP:
        net = MLP(self.time_features, self.n * self.rank_bound, (self.hidden, self.hidden), "gelu", zero_last=False)
        # U V^T z is of z's size when the entries of U and V have variance 1 / sqrt(n r).
        nn.init.normal_(net.layers[-1].bias, std=(self.n * self.rank_bound) ** -0.25)  # type: ignore[arg-type]
        return net

    @property
    def time_dependent(self) -> bool:
        return True

    def to_dense(self) -> Tensor:
        return self.closed().to_dense()

    def closed(self) -> Leaf:
        raise ValueError("TimeLowRank depends on time: its algebra is that of A.at(t)")

    @property
    def _like(self) -> Tensor:
        weight = tensor_of(self.u_net)
        assert weight is not None
        return weight

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """U and V, each [K, n, r], at the times t [K]."""
        check_dense("t", t)
        check_time(t, self._like)
        if t.ndim != 1:
            raise ValueError(f"t must be [K]; got {tuple(t.shape)}")
        embedded = self.embedding(t.to(self._like))
        shape = (t.shape[0], self.n, self.rank_bound)
        U, V = self.u_net(embedded), self.v_net(embedded)  # rounded by autocast, kept in the parameters' dtype
        return U.to(self._like.dtype).reshape(shape), V.to(self._like.dtype).reshape(shape)

    def at(self, t: float | Tensor) -> LowRank:
        check_time(t, self._like)
        like = self._like
        times = t if isinstance(t, Tensor) else torch.full((), t, dtype=like.dtype, device=like.device)
        U, V = self.factors(times.reshape(-1))
        return LowRank(self.alpha, U, V) if times.ndim else LowRank(self.alpha, U[0], V[0])

    def extra_repr(self) -> str:
        return f"{self.n} x {self.n}, rank={self.rank_bound}"
