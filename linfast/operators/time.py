"""Operators that depend on time: networks compute their factors or kernels from an embedding of t.

    TimeLowRank          A_t = alpha I + U(t) V(t)^T
    TimeDiagonal         A_t = alpha I + U diag(w(t)) V^T
    TimeDepthwiseConv    A_t = one correlation per channel, with kernels that depend on t

A subclass defines ``_generate``, which computes tensors from the embedding, and ``_made_of``, which makes the
operator from them. Where A_t is a LowRank operator, ``factors_at(times)`` returns its factors for ``collapse``,
and ``_factor_columns`` their number of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_count, check_counts, check_dense, check_number, check_time
from ..conditioning import SinusoidalEmbedding, check_time_features
from ..dispatch import tensors_of, uploaded
from ..nets import MLP
from .base import LatentOperator
from .dense import Leaf
from .depthwise import DepthwiseConv, check_pair
from .low_rank import LowRank


class TimeFactors(NamedTuple):
    """A_t = alpha I + U_t diag(w_t) V_t^T at T times."""

    alpha: float
    U: Tensor  # [T, n, r], or [n, r] where all times share it
    V: Tensor  # like U
    weights: Tensor | None  # w [T, r] where all times share U and V; None: w = 1


class TimeOperator(LatentOperator):
    """A square operator that networks compute from t. ``A_t.at(t)`` is a Leaf, which ``A_t(z, t=t)`` applies.

    Args:
        n: size.
        time_features: size of the sinusoidal embedding of t.
    """

    def __init__(self, n: int, time_features: int) -> None:
        super().__init__()
        self.n_out = self.n_in = n
        self.time_features = check_time_features(time_features, least=4)
        self.embedding = SinusoidalEmbedding(self.time_features)

    def _generate(self, embedded: Tensor) -> tuple[Tensor, ...]:
        """The tensors that A_t is made of, each [T, ...], from embedded times [T, time_features]."""
        raise NotImplementedError

    def _made_of(self, *generated: Tensor) -> Leaf:
        """The operator from generated tensors, [...] for one time or [B, ...] for one time per sample."""
        raise NotImplementedError

    @property
    def time_dependent(self) -> bool:
        return True

    def to_dense(self) -> Tensor:
        return self.closed().to_dense()

    def closed(self) -> Leaf:
        raise ValueError(f"{type(self).__name__} depends on time: its algebra is that of A.at(t)")

    def _generated_at(self, t: Tensor) -> tuple[Tensor, ...]:
        """The tensors that A_t is made of at the times t [T]: each [T, ...], in the parameters' dtype."""
        like = self._like
        check_dense("t", t)
        check_time(t, like)
        if t.ndim != 1:
            raise ValueError(f"t must be [T]; got {tuple(t.shape)}")
        generated = self._generate(self.embedding(t.to(like)))
        return tuple(part.to(like.dtype) for part in generated)  # under autocast, networks return half precision

    def at(self, t: float | Tensor) -> Leaf:
        like = self._like
        check_time(t, like)
        times = t if isinstance(t, Tensor) else torch.full((), t, dtype=like.dtype, device=like.device)
        generated = self._generated_at(times.reshape(-1))
        return self._made_of(*(generated if times.ndim else (part[0] for part in generated)))

    def _at_each(self, times: Sequence[float]) -> Callable[[int], LatentOperator]:
        generated = self._generated_at(uploaded(times, self._like.device, self._like.dtype))
        return lambda k: self._made_of(*(part[k] for part in generated))

    @property
    def _like(self) -> Tensor:
        """A parameter, read for its dtype and device."""
        return next(tensors_of(self))


class _LowRankAtAnyTime(TimeOperator):
    """The base class of TimeLowRank and TimeDiagonal, with their constructor's arguments."""

    _config_names = {"rank": "rank_bound"}

    def __init__(self, n: int, rank: int, alpha: float, time_features: int, hidden: int) -> None:
        super().__init__(check_count("n", n), time_features)
        self.n, self.rank_bound = self.n_in, check_count("rank", rank)
        self.alpha, self.hidden = check_number("alpha", alpha), check_count("hidden", hidden)

    def extra_repr(self) -> str:
        return f"{self.n} x {self.n}, rank={self.rank_bound}"


class TimeLowRank(_LowRankAtAnyTime):
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

    def __init__(self, n: int, rank: int, alpha: float = 0.0, time_features: int = 64, hidden: int = 256) -> None:
        super().__init__(n, rank, alpha, time_features, hidden)
        self.u_net = self._generator()
        self.v_net = self._generator()

    def _generator(self) -> MLP:
        net = MLP(self.time_features, self.n * self.rank_bound, (self.hidden, self.hidden), "gelu", zero_last=False)
        # With entries of variance 1 / sqrt(n r) in U and V, |U V^T z| is about |z|.
        nn.init.normal_(net.layers[-1].bias, std=(self.n * self.rank_bound) ** -0.25)  # type: ignore[arg-type]
        return net

    def _generate(self, embedded: Tensor) -> tuple[Tensor, ...]:
        shape = (embedded.shape[0], self.n, self.rank_bound)
        return self.u_net(embedded).reshape(shape), self.v_net(embedded).reshape(shape)

    def _made_of(self, *generated: Tensor) -> LowRank:
        return LowRank(self.alpha, *generated)

    def _factor_columns(self, count: int) -> int:
        return self.rank_bound * count

    def factors_at(self, t: Tensor) -> TimeFactors:
        """U(t) and V(t), each [T, n, r], at the times t [T]."""
        U, V = self._generated_at(t)
        return TimeFactors(self.alpha, U, V, None)


class TimeDiagonal(_LowRankAtAnyTime):
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

    def __init__(self, n: int, rank: int, alpha: float = 1.0, time_features: int = 64, hidden: int = 256) -> None:
        super().__init__(n, rank, alpha, time_features, hidden)
        # With orthonormal columns and |w| <= 1, |U diag(w) V^T z| <= |z|.
        self.U = nn.Parameter(nn.init.orthogonal_(torch.empty(self.n, self.rank_bound)))
        self.V = nn.Parameter(nn.init.orthogonal_(torch.empty(self.n, self.rank_bound)))
        self.w_net = MLP(self.time_features, self.rank_bound, (self.hidden, self.hidden), "gelu", zero_last=False)

    def _generate(self, embedded: Tensor) -> tuple[Tensor, ...]:
        return (self.w_net(embedded),)

    def _made_of(self, *generated: Tensor) -> LowRank:
        scaled = self.U * generated[0][..., None, :]
        return LowRank(self.alpha, scaled, self.V.expand_as(scaled))

    def _factor_columns(self, count: int) -> int:
        return self.rank_bound

    def factors_at(self, t: Tensor) -> TimeFactors:
        """U and V [n, r], which all times share, and w [T, r] at the times t [T]."""
        return TimeFactors(self.alpha, self.U, self.V, *self._generated_at(t))


class TimeDepthwiseConv(TimeOperator):
    """A_t z = depthwise correlation of z [B, C, H, W] with kernels [C, k, k] that an MLP computes from t.

    ``A_t.at(t)`` is a DepthwiseConv for a number, a 0-d or a [B] tensor; ``A_t(z, t=t)`` applies
    it. The kernels start near a unit impulse. Source: style transfer in arXiv 2510.08570, whose t
    is the index of a style.

    Args:
        channels: C.
        kernel_size: k.
        size: (H, W) of the latents.
        time_features: size of the sinusoidal embedding of t.
        hidden: widths of the generator's hidden layers.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        size: tuple[int, int],
        time_features: int = 64,
        hidden: Sequence[int] = (256, 256),
    ) -> None:
        channels, kernel_size = check_count("channels", channels), check_count("kernel_size", kernel_size)
        size = check_pair("size", size)
        super().__init__(channels * size[0] * size[1], time_features)
        self.channels, self.kernel_size, self.size = channels, kernel_size, size
        self.hidden = check_counts("hidden", hidden)
        self.net = MLP(self.time_features, channels * kernel_size**2, self.hidden, "gelu", zero_last=False)
        with torch.no_grad():
            impulse = self.net.layers[-1].bias.view(channels, kernel_size, kernel_size)  # type: ignore[operator]
            impulse[:, (kernel_size - 1) // 2, (kernel_size - 1) // 2] += 1.0

    def _generate(self, embedded: Tensor) -> tuple[Tensor, ...]:
        return (self.net(embedded).reshape(-1, self.channels, self.kernel_size, self.kernel_size),)

    def _made_of(self, *generated: Tensor) -> DepthwiseConv:
        return DepthwiseConv(self.channels, self.kernel_size, self.size, *generated)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kernel_size={self.kernel_size}, size={self.size}"
