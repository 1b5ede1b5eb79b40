"""Linearizer: f(x) = g_y^{-1}(A g_x(x)), a network that is a linear map between two vector spaces."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .checks import check_count, check_dense, check_kind, check_time, said_of
from .flows.bijection import same_space
from .hub import HubMethods
from .match import match_linearizer
from .operators.base import LatentOperator
from .operators.low_rank import LowRank
from .operators.spectral import SVD
from .ranges import range_
from .space import InducedSpace, check_invertible, decode_latents

__all__ = ["Linearizer", "LinearizerSVD"]


class Linearizer(nn.Module, HubMethods):
    """f(x) = g_y^{-1}(A g_x(x)), batches x [B, *shape_x] to [B, *shape_y].

    g_x induces a vector space on the x side and g_y one on the y side (see ``InducedSpace``). Between them f is
    exactly linear, so its algebra is A's, and the results are Linearizers:

        h @ f          h(f(x))                      where f.g_y is h.g_x
        f + h, 2 * f   A_f + A_h, 2 A_f             where both share g_x and g_y
        f ** n         A^n                          where g_x is g_y
        f.T, f.pinv()  A^T, A^+                     from the y side to the x side

    A maps flat latents [B, n]: image latents are flattened before A, and A's outputs are
    reshaped to g_y's sample shape. Source: Berman, Hallak, Shocher, "Who Said Neural Networks Aren't Linear?"
    (arXiv 2510.08570).

    Args:
        g_x: a Bijection (or any module with forward and inverse) on the x side.
        A: a LatentOperator that maps g_x's latents to g_y's.
        g_y: a Bijection on the y side; None means g_x itself.

    ``f(x, t=t)`` evaluates a time-dependent A at time t, a number, a 0-d or a [B] tensor;
    ``f.at(t)`` fixes t. Other keywords, such as ``context=``, go to both g_x and g_y. To
    give them different values, fix these: ``Linearizer(g.at(t=1.0), A, g.at(t=0.0))``.

    Raises:
        TypeError: A is not a LatentOperator; a g is not a module with an inverse.
        ValueError: A does not fit the sample shape of a g; x has a wrong feature count, dtype or device.

    Examples:
        >>> g = lf.coupling_flow(features=8)
        >>> f = lf.Linearizer(g, lf.Dense(8))
        >>> x = torch.randn(5, 8)
        >>> torch.allclose((f @ f)(x), f(f(x)), atol=1e-4)
        True
        >>> left, S, right = f.svd()
    """

    __array_ufunc__ = None  # so that NumPy leaves array * f to f

    def __init__(self, g_x: nn.Module, A: LatentOperator, g_y: nn.Module | None = None) -> None:
        super().__init__()
        g_y = g_x if g_y is None else g_y
        if not isinstance(A, LatentOperator):
            raise TypeError(f"A must be a LatentOperator, such as linfast.Dense(n); got {type(A).__name__}")
        for name, g, n in (("g_x", g_x, A.n_in), ("g_y", g_y, A.n_out)):
            check_invertible(name, g)
            shape = getattr(g, "shape", None)
            if shape is not None and torch.Size(shape).numel() != n:
                raise ValueError(
                    f"{name} has latents of shape {tuple(shape)} and A is {A.n_out} x {A.n_in} (n_out x n_in)"
                )
        self.g_x = g_x
        self.A = A
        # Registered only where it is another module: under two names, one module's state would be in
        # state_dict twice, and torch.func.functional_call would not restore the module's parameters.
        self._modules["g_y"] = None if g_y is g_x else g_y

    @property
    def g_y(self) -> nn.Module:
        """The network on the y side; g_x itself where it is shared."""
        separate = self._modules["g_y"]
        return self.g_x if separate is None else separate

    def forward(self, x: Tensor, t: float | Tensor | None = None, **context: Any) -> Tensor:
        """f(x) = g_y^{-1}(A g_x(x))."""
        with range_("forward", self):
            check_dense("x", x)
            if type(self) is not Linearizer:
                self._check_time(t, x)
            elif not isinstance(launch := match_linearizer(self, x, t, context), str):
                return launch(x)
            return self.gy_inverse(self.A(self.gx(x, **context), t=t), **context)

    def inverse(self, y: Tensor, t: float | Tensor | None = None, **context: Any) -> Tensor:
        """f^{-1}(y) = g_x^{-1}(A^{-1} g_y(y)). ValueError where A has no inverse: see ``pinv``."""
        with range_("inverse", self):
            check_dense("y", y)
            A_inverse = self._inverse_operator(t, y)
            return self.gx_inverse(A_inverse(self.gy(y, **context)), **context)

    def gx(self, x: Tensor, **context: Any) -> Tensor:
        """z = g_x(x)."""
        with range_("gx", self):
            return self.g_x(x, **context)

    def gy(self, y: Tensor, **context: Any) -> Tensor:
        """z = g_y(y)."""
        with range_("gy", self):
            return said_of("y", self.g_y, y, **context)

    def gx_inverse(self, z: Tensor, **context: Any) -> Tensor:
        """x = g_x^{-1}(z); flat latents z [B, n] are first reshaped to g_x's sample shape."""
        with range_("gx_inverse", self):
            return decode_latents(self.g_x, z, context)

    def gy_inverse(self, z: Tensor, **context: Any) -> Tensor:
        """y = g_y^{-1}(z); flat latents z [B, n] are first reshaped to g_y's sample shape."""
        with range_("gy_inverse", self):
            return decode_latents(self.g_y, z, context)

    def A_inverse(self, z: Tensor, t: float | Tensor | None = None) -> Tensor:
        """A^{-1} z for latents z [B, n_out]; ValueError where A has no inverse."""
        check_dense("z", z)
        return self._inverse_operator(t, z)(z)

    def _inverse_operator(self, t: float | Tensor | None, x: Tensor) -> LatentOperator:
        self._check_time(t, x)
        return self.A.inverse_at(t)

    def at(self, t: float | Tensor) -> Linearizer:
        """The Linearizer with A fixed at time t."""
        return Linearizer(self.g_x, self.A.at(t), self.g_y)

    @property
    def space_x(self) -> InducedSpace:
        """The vector space that g_x induces on inputs."""
        return InducedSpace(self.g_x)

    @property
    def space_y(self) -> InducedSpace:
        """The vector space that g_y induces on outputs."""
        return InducedSpace(self.g_y)

    # The algebra.

    def __matmul__(self, other: Linearizer) -> Linearizer:
        """(h @ f)(x) = h(f(x)); ValueError unless h.g_x and f.g_y are the same."""
        other = _linearizer(other, "@")
        if not same_space(self.g_x, other.g_y):
            raise ValueError(
                "h @ f needs h.g_x and f.g_y to be the same object in the same context: "
                "f's outputs and h's inputs lie in different vector spaces"
            )
        return Linearizer(other.g_x, self.A @ other.A, self.g_y)

    def __add__(self, other: Linearizer) -> Linearizer:
        """(f + h)(x) = f(x) (+) h(x), the addition of ``space_y``; ValueError unless both share g_x and g_y."""
        other = _linearizer(other, "+")
        for name in ("g_x", "g_y"):
            if not same_space(getattr(self, name), getattr(other, name)):
                raise ValueError(f"f + h needs both to have the same {name} (one object, in one context)")
        return Linearizer(self.g_x, self.A + other.A, self.g_y)

    def __sub__(self, other: Linearizer) -> Linearizer:
        return self + (-_linearizer(other, "-"))

    def __mul__(self, factor: float | Tensor) -> Linearizer:
        return Linearizer(self.g_x, self.A * factor, self.g_y)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Linearizer:
        return Linearizer(self.g_x, self.A / divisor, self.g_y)

    def __neg__(self) -> Linearizer:
        return Linearizer(self.g_x, -self.A, self.g_y)

    def __pow__(self, n: int) -> Linearizer:
        """f applied n times; n < 0 applies the inverse. ValueError unless g_x and g_y are the same."""
        if not same_space(self.g_x, self.g_y):
            raise ValueError("f ** n needs g_x and g_y to be the same object in the same context")
        return Linearizer(self.g_x, self.A**n, self.g_y)

    @property
    def T(self) -> Linearizer:
        """The adjoint: ``<f(x), y>_y = <x, f.T(y)>_x``. It shares the modules of f."""
        return Linearizer(self.g_y, self.A.T, self.g_x)

    def pinv(self, rtol: float | None = None) -> Linearizer:
        """The Moore-Penrose pseudo-inverse between the induced spaces; rtol as in ``A.pinv``."""
        return Linearizer(self.g_y, self.A.pinv(rtol), self.g_x)

    def svd(self) -> LinearizerSVD:
        """Singular values S [k], and orthonormal singular vectors ``left`` and ``right`` [k, ...] in data space.

        With ``left, S, right = f.svd()``, f(x) is the sum over i of ``S_i <x, right_i> left_i``, in the y side's
        space.

        Raises:
            ValueError: A depends on time, or holds one operator per sample.
        """
        self._check_time(None)
        svd = self.A.svd()
        if svd.S.ndim != 1:
            raise ValueError("f.svd() needs one operator and A holds one per sample: fix a single time, f.at(0.5)")
        return LinearizerSVD(self.g_x, svd, self.g_y)

    def _check_time(self, t: float | Tensor | None, x: Tensor | None = None) -> None:
        if t is not None:
            check_time(t, x, None if x is None or x.ndim == 0 else x.shape[0])
        elif self.A.time_dependent:
            raise ValueError("A depends on time: pass t=, or use f.at(t)")


class LinearizerSVD:
    """The SVD of f in data space: S [k], and singular vectors ``left`` [k, *shape_y] and ``right`` [k, *shape_x].

    It unpacks as ``left, S, right``, which are also svd[0], svd[1] and svd[2]. ``operator`` is the SVD of A, with
    ``U``, ``S`` and ``Vh``; its ``rest`` is the value of all singular values that are not in S.
    """

    def __init__(self, g_x: nn.Module, operator: SVD, g_y: nn.Module) -> None:
        self.g_x, self.operator, self.g_y = g_x, operator, g_y

    @property
    def S(self) -> Tensor:
        return self.operator.S

    @property
    def left(self) -> Tensor:
        """u_i = g_y^{-1}(U[:, i])."""
        return decode_latents(self.g_y, self.operator.U.mT.contiguous(), {})

    @property
    def right(self) -> Tensor:
        """v_i = g_x^{-1}(Vh[i])."""
        return decode_latents(self.g_x, self.operator.Vh.contiguous(), {})

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        check_kind("index", index, numbers.Integral, "0 (left), 1 (S) or 2 (right)")
        return getattr(self, ("left", "S", "right")[index])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    def _absent(self) -> NoReturn:
        raise AttributeError("a LinearizerSVD has no U, V or Vh; see left and right, or operator for the SVD of A")

    U = V = Vh = property(_absent)

    def __repr__(self) -> str:
        U, S, Vh = self.operator
        k, y, x = S.shape[0], *(
            getattr(g, "shape", None) or (n,) for g, n in ((self.g_y, U.shape[0]), (self.g_x, Vh.shape[1]))
        )  # fmt: skip
        return f"LinearizerSVD(left={[k, *y]}, S={[k]}, right={[k, *x]})"

    def linearizer(self, rank: int | None = None) -> Linearizer:
        """The Linearizer with this SVD; with ``rank``, the nearest Linearizer of that rank in the induced spaces.

        Raises:
            ValueError: a negative rank, or one that would keep some but not all singular values equal to ``rest``.
        """
        return Linearizer(self.g_x, self._operator(rank), self.g_y)

    def _operator(self, rank: int | None) -> LowRank:
        U, S, Vh = self.operator
        rest = self.operator.rest
        if rank is None:  # U diag(S) Vh + rest (I - U U^T)
            only = isinstance(rest, float) and rest == 0.0
            return LowRank(rest, U, Vh.mT * S if only else Vh.mT * S - rest * U)
        rank = check_count("rank", rank, least=0)
        size = float(torch.as_tensor(rest, dtype=S.dtype).detach().abs())
        if size and (rank > S.shape[-1] or bool((S[:rank] < size).any())):
            raise ValueError(
                f"rank {rank} would keep some of the singular values that all equal {size:.3g} and have "
                "no preferred vectors"
            )
        return LowRank(0.0, U[:, :rank] * S[:rank], Vh[:rank].mT)


def _linearizer(value: object, symbol: str) -> Linearizer:
    if not isinstance(value, Linearizer):
        raise TypeError(
            f"h {symbol} f needs two Linearizers; got {type(value).__name__}; to apply f to data call f(x)"
        )
    return value
