"""LatentOperator: the linear map A of f = g_y^{-1} A g_x, and the algebra of such maps.

Column-vector maths on batches of row vectors: A(z) = z @ A.mT for z [B, n_in].

Two kinds of operator:

    Leaf   holds numbers: Dense, Diagonal, LowRank, DepthwiseConv, BlockDiagonal.
    Lazy   holds operators: A.T, A @ B, A + B, c * A (lazy.py). A live view of its parts.

``closed()`` turns any operator into the Leaf it equals now. inverse, pinv, svd,
eig, ** and norm are asked of that Leaf and computed anew: differentiable snapshots,
in the cheapest structure that holds them. Leaves say what they are closed under by
``_plus`` and ``_times``; where neither operand knows a closed form, the result is dense.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_dense, check_like, check_number, check_time
from ..dispatch import outside_autocast
from ..freeze import derived
from ..ranges import range_
from .half import cast, dtype_of, in_fp32
from .regular import check_finite, is_unread, mark_read
from .spectral import SVD, Eig, cutoff, decomposed, largest

if TYPE_CHECKING:
    from .dense import Dense

__all__ = ["LatentOperator", "Leaf", "check_size", "hold", "inverse_of"]


class LatentOperator(nn.Module):
    """A linear map from n_in to n_out latent coordinates.

    Called as ``A(z)`` with z [B, n_in], or [B, ...] of n_in elements a sample, whose
    shape is kept where n_out = n_in. ``A(z, t=t)`` is ``A.at(t)(z)``.
    """

    n_out: int
    n_in: int
    __array_ufunc__ = None  # an array times A is A's to answer: NumPy would make an array of operators
    truncation_error: float = 0.0  # relative, of a recompression: see linfast.collapse(tol=)

    # What a kind of operator supplies.

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        """A z, or A^T z, for rows z [B, n]."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """The matrix, [n_out, n_in] or [B, n_out, n_in]."""
        raise NotImplementedError

    def closed(self) -> Leaf:
        """The structured operator this equals now, differentiable; it may share this one's tensors."""
        raise NotImplementedError

    @property
    def time_dependent(self) -> bool:
        """Whether it needs a time before it can be applied."""
        return False

    def at(self, t: float | Tensor) -> LatentOperator:
        """The operator at time t: a number, a 0-d tensor, or [B] for one a sample."""
        check_time(t)
        return self

    # What every operator has.

    def forward(self, z: Tensor, t: float | Tensor | None = None) -> Tensor:
        """A z for each row of z; at time t where A depends on one."""
        with range_("forward", self):
            if t is not None:
                check_dense("z", z)
                check_time(t, z, z.shape[0] if z.ndim else None)
                return self.at(t)(z)
            return self._apply_checked(z)

    def _apply_checked(self, z: Tensor) -> Tensor:
        kind = type(self).__name__
        if torch.compiler.is_compiling():
            check_dense("z", z)
        else:
            for tensor in tuple(_tensors(self)) or (None,):
                check_like(kind, "z", z, tensor)
        if self.time_dependent:
            raise ValueError(f"{kind} depends on time: pass t=, or use A.at(t)")
        if z.ndim < 2 or z.shape[1:].numel() != self.n_in:
            raise ValueError(f"{kind}: z must be [B, {self.n_in}]; got {tuple(z.shape)}")
        y = self._product(z.flatten(1), transpose=False)
        return y.reshape(z.shape) if self.n_out == self.n_in else y

    @property
    def T(self) -> LatentOperator:
        """The transpose, a live view."""
        return lazy.Transposed(self)

    def __matmul__(self, other: LatentOperator) -> LatentOperator:
        return lazy.Product(self, _operator(other, "@"))

    def __add__(self, other: LatentOperator) -> LatentOperator:
        return lazy.Sum(self, _operator(other, "+"))

    def __sub__(self, other: LatentOperator) -> LatentOperator:
        return lazy.Sum(self, lazy.Scaled(-1.0, _operator(other, "-")))

    def __mul__(self, factor: float | Tensor) -> LatentOperator:
        return lazy.Scaled(factor, self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LatentOperator:
        if isinstance(divisor, Tensor):  # 1 / tensor, taken now, would not be a live view
            raise TypeError("an operator is divided by a number; got a tensor; scale it: (1 / a) * A")
        if not check_number("divisor", divisor):
            raise ValueError("divisor must not be 0: an operator is divided by a number")
        return lazy.Scaled(1.0 / divisor, self)

    def __neg__(self) -> LatentOperator:
        return lazy.Scaled(-1.0, self)

    @outside_autocast
    def __pow__(self, n: int) -> LatentOperator:
        """A^n, a snapshot; n < 0 is the inverse's power."""
        n = check_count("the exponent", n, least=-(2**31))
        self._check_square("**")
        base = self.inverse() if n < 0 else self
        return base.closed()._power(abs(n))

    def inverse(self) -> LatentOperator:
        """A^{-1}, a snapshot.

        Whether A has one is read from the device at the first call for these weights (linfast.operators.regular).

        Raises:
            ValueError: A is rectangular, or singular where that is read; it is NaN where it is not.
        """
        return self._inverse_of(self, None)

    def inverse_at(self, t: float | Tensor | None) -> LatentOperator:
        """``A.at(t).inverse()``, read at the first call for these weights and a time that is a number."""
        if t is None:
            return derived(self, "inverse", self.inverse)
        return self.at(t)._inverse_of(self, Tensor if isinstance(t, Tensor) else t)

    @outside_autocast
    def _inverse_of(self, owner: LatentOperator, at: Hashable) -> LatentOperator:
        """A^{-1} of what ``owner`` is at a time, or makes of itself."""
        self._check_square("inverse()")
        read = is_unread(owner, at)
        inverse = self._inverted(read)
        if read:
            mark_read(owner, at)
        return inverse

    def _inverted(self, read: bool) -> LatentOperator:
        """A^{-1}; ``read``: raise where there is none."""
        return inverse_of(self.closed(), read)

    @outside_autocast
    def pinv(self, rtol: float | None = None) -> LatentOperator:
        """The Moore-Penrose pseudo-inverse A^+, a snapshot.

        Singular values up to rtol times the largest count as zero; by default rtol is
        max(n_out, n_in) times the dtype's epsilon.
        """
        check_rtol(rtol)
        leaf = self.closed()
        return cast(self._decomposed(leaf, "_pinv", _rtol(leaf, rtol)), dtype_of(leaf))

    @outside_autocast
    def svd(self) -> SVD:
        """U, S, Vh with A = U diag(S) Vh + rest (I - U U^T); rest is 0 but for LowRank with alpha."""
        leaf = self.closed()
        svd, dtype = self._decomposed(leaf, "_svd"), dtype_of(leaf)
        return SVD(svd.U.to(dtype), svd.S.to(dtype), svd.Vh.to(dtype), svd.rest)

    @outside_autocast
    def eig(self) -> Eig:
        """Eigenvalues and right eigenvectors, complex64 or wider; ``.rest`` is the eigenvalue of the others."""
        self._check_square("eig()")
        return self._decomposed(self.closed(), "_eig")

    def norm(self, ord: float | str = 2) -> Tensor:
        """Norm from the singular values: 2 (largest; the Lipschitz constant), "fro" or "nuc"."""
        if isinstance(ord, bool) or not isinstance(ord, (int, float, str)) or ord not in (2, "fro", "nuc"):
            raise ValueError(f"ord must be 2, 'fro' or 'nuc'; got {ord!r}")
        S, rest, others = self._singular_values()
        if ord == 2:
            return largest(S, rest)
        if ord == "fro":
            return torch.hypot(torch.linalg.vector_norm(S, dim=-1), others**0.5 * rest)
        return S.sum(-1) + others * rest

    def rank(self, rtol: float | None = None) -> Tensor:
        """Number of singular values above rtol times the largest (rtol as in ``pinv``)."""
        check_rtol(rtol)
        S, rest, others = self._singular_values()
        limit = largest(S, rest) * cutoff(S, max(self.n_out, self.n_in), _rtol(self, rtol))
        return (limit[..., None] < S).sum(-1) + others * (limit < rest)

    @outside_autocast
    def _singular_values(self) -> tuple[Tensor, Tensor, int]:
        """S [..., k], and the one value [] that the ``others`` singular values have; 0 where there are none."""
        S, rest = self._decomposed(self.closed(), "_values")
        others = min(self.n_out, self.n_in) - S.shape[-1]
        return S, torch.as_tensor(rest if others else 0.0, dtype=S.dtype, device=S.device).abs(), others

    def _decomposed(self, leaf: Leaf, method: str, *args: Any) -> Any:
        """The method of the Leaf that this is, in fp32 or wider; ValueError where it has NaN or infinite values."""
        check_finite(self)
        return decomposed(type(self).__name__, getattr(in_fp32(leaf), method), *args)

    def _check_square(self, what: str) -> None:
        if self.n_out != self.n_in:
            raise ValueError(f"{what} needs a square A; this one is {self.n_out} x {self.n_in}; use pinv()")

    def extra_repr(self) -> str:
        return f"{self.n_out} x {self.n_in}"


class Leaf(LatentOperator):
    """An operator that holds its numbers. Supplies the snapshot algebra; by default through Dense."""

    @property
    def batched(self) -> bool:
        """Whether it holds one operator a sample."""
        return False

    @property
    def absorbs(self) -> bool:
        """Whether its product with any operator keeps its structure."""
        return False

    def closed(self) -> Leaf:
        return self

    def _dense(self) -> Dense:
        from .dense import Dense

        return Dense.of(self.to_dense())

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
        return self._dense()._power(n)

    def _inverse(self, read: bool) -> LatentOperator:
        return self._dense()._inverse(read)

    def _pinv(self, rtol: float | None) -> LatentOperator:
        return self._dense()._pinv(rtol)

    def _svd(self) -> SVD:
        return self._dense()._svd()

    def _values(self) -> tuple[Tensor, float | Tensor]:
        """S and rest of ``_svd``, where they cost less without the vectors."""
        svd = self._svd()
        return svd.S, svd.rest

    def _eig(self) -> Eig:
        return self._dense()._eig()


def inverse_of(leaf: Leaf, read: bool) -> LatentOperator:
    """The leaf's inverse in its dtype; ``read``: raise where there is none."""
    return cast(in_fp32(leaf)._inverse(read), dtype_of(leaf))


def _rtol(operator: LatentOperator, rtol: float | None) -> float:
    """rtol; by default that of the operator's own dtype, whatever its decomposition is computed in."""
    if rtol is not None:
        return rtol
    return max(operator.n_out, operator.n_in) * torch.finfo(dtype_of(operator)).eps


def hold(module: nn.Module, name: str, value: Any) -> None:
    """Keep a Parameter (trained), a tensor as a buffer (saved, moved), a number as it is; checked before."""
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif isinstance(value, Tensor):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def check_size(kind: str, name: str, n: object) -> int:
    """n as an int; raises unless it is a size. A tensor given in its place belongs in ``of``."""
    if isinstance(n, Tensor):
        raise TypeError(f"{kind}: {name} is a size; {kind}.of(...) takes the tensor")
    return check_count(f"{kind}: {name}", n, least=0)


def check_rtol(rtol: float | None) -> None:
    """Raise unless rtol is None or a number of at least 0."""
    if rtol is not None:
        check_number("rtol", rtol, least=0.0)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The floating-point tensors whose dtype and device inputs must have; a 0-d factor fits any."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.ndim and tensor.is_floating_point():
            yield tensor


def _operator(value: object, symbol: str) -> LatentOperator:
    if not isinstance(value, LatentOperator):
        raise TypeError(f"A {symbol} B needs two operators; got {type(value).__name__}; to apply A call A(z)")
    return value


from . import lazy  # noqa: E402  # its classes are subclasses of those above
