"""TimeDiagonal: A_t = alpha I + U diag(w(t)) V^T, the factors fixed and r weights generated from time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_count, check_dense, check_number, check_time
from ..flows.conditioners import MLP, SinusoidalEmbedding, check_time_features
from .base import LatentOperator, Leaf
from .low_rank import LowRank

__all__ = ["TimeDiagonal"]


class TimeDiagonal(LatentOperator):
    """A_t = alpha I + U diag(w(t)) V^T on z [B, n]; U, V [n, r] are parameters, w(t) [r] comes from an MLP.

    ``A_t.at(t)`` is a LowRank operator for a number, a 0-d or a [B] tensor; ``A_t(z, t=t)``
    applies it. All times share the factors, so the collapse of any number of steps has rank r.

    Args:
        n: size.
        rank: r.
        alpha: weight of the identity, a constant.
        time_features: size of the sinusoidal embedding of t.
        hidden: width of the generator's two hidden layers.
    """

    _config_names = {"rank": "rank_bound"}

    def __init__(self, n: int, rank: int, alpha: float = 1.0, time_features: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.n = self.n_out = self.n_in = n = check_count("n", n)
        self.rank_bound = rank = check_count("rank", rank)
        self.alpha = check_number("alpha", alpha)
        self.time_features, self.hidden = check_time_features(time_features, least=4), check_count("hidden", hidden)
        self.embedding = SinusoidalEmbedding(time_features)
        # U diag(w) V^T z is of z's size at most for orthonormal columns and w of size 1.
        self.U = nn.Parameter(nn.init.orthogonal_(torch.empty(n, rank)))
        self.V = nn.Parameter(nn.init.orthogonal_(torch.empty(n, rank)))
        self.w_net = MLP(time_features, rank, (hidden, hidden), "gelu", zero_last=False)

    @property
    def time_dependent(self) -> bool:
        return True

    def to_dense(self) -> Tensor:
        return self.closed().to_dense()

    def closed(self) -> Leaf:
        raise ValueError("TimeDiagonal depends on time: its algebra is that of A.at(t)")

    def weights(self, t: Tensor) -> Tensor:
        """w [K, r] at the times t [K]."""
        check_dense("t", t)
        check_time(t, self.U)
        if t.ndim != 1:
            raise ValueError(f"t must be [K]; got {tuple(t.shape)}")
        return self.w_net(self.embedding(t.to(self.U))).to(self.U.dtype)  # rounded by autocast

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """U diag(w(t)) and V, each [K, n, r], at the times t [K]."""
        scaled = self.U * self.weights(t)[:, None, :]
        return scaled, self.V.expand_as(scaled)

    def at(self, t: float | Tensor) -> LowRank:
        check_time(t, self.U)
        times = t if isinstance(t, Tensor) else torch.full((), t, dtype=self.U.dtype, device=self.U.device)
        U, V = self.factors(times.reshape(-1))
        return LowRank(self.alpha, U, V) if times.ndim else LowRank(self.alpha, U[0], V[0])

    def extra_repr(self) -> str:
        return f"{self.n} x {self.n}, rank={self.rank_bound}"
