"""LatentOperator: the linear map A of f = g_y^{-1} A g_x, and the algebra of such maps.

Column-vector maths on batches of row vectors: A(z) = z @ A.mT for z [B, n_in].

Two kinds of operator:

    Leaf   holds numbers: Dense, Diagonal, LowRank, DepthwiseConv, BlockDiagonal (dense.py and the files after it)
    Lazy   holds operators: A.T, A @ B, A + B, c * A (below), live views of their parts

``closed()`` turns any operator into the Leaf that it equals now. inverse, pinv, svd, eig, ** and norm (spectral.py)
are asked of that Leaf and computed anew: differentiable snapshots, in the cheapest structure that holds them.
Leaves say what they are closed under by ``_plus`` and ``_times``; where neither operand knows a closed form,
the result is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_dense, check_factor, check_like, check_number, check_time
from ..dispatch import outside_autocast
from ..ranges import range_
from .spectral import Decomposable

if TYPE_CHECKING:
    from .dense import Leaf


class LatentOperator(Decomposable):
    """A linear map from n_in to n_out latent coordinates.

    Called as ``A(z)`` with z [B, n_in], or [B, ...] of n_in elements per sample, whose
    shape is kept where n_out = n_in. ``A(z, t=t)`` is ``A.at(t)(z)``.
    """

    __array_ufunc__ = None  # an array times A is A's to answer: NumPy would make an array of operators
    truncation_error: float = 0.0  # relative, of a recompression: see linfast.collapse(tol=)

    # What a kind of operator supplies.

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        """A z, or A^T z, for rows z [B, n]."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """The matrix, [n_out, n_in] or [B, n_out, n_in]."""
        raise NotImplementedError

    @property
    def time_dependent(self) -> bool:
        """Whether it needs a time before it can be applied."""
        return False

    def at(self, t: float | Tensor) -> LatentOperator:
        """The operator at time t: a number, a 0-d tensor, or [B] for one time per sample."""
        check_time(t)
        return self

    def _at_each(self, times: Sequence[float]) -> Callable[[int], LatentOperator]:
        """k -> A at times[k]; what generates A from time is called once for all times."""
        return lambda k: self.at(times[k])

    def _factor_columns(self, count: int) -> int | None:
        """Columns of all the factors that ``factors_at`` gives for ``count`` times; None where it gives none."""
        return None

    # What every operator has.

    def forward(self, z: Tensor, t: float | Tensor | None = None) -> Tensor:
        """A z for each row of z; at time t where A depends on one."""
        with range_("forward", self):
            if t is not None:
                check_dense("z", z)
                check_time(t, z, z.shape[0] if z.ndim else None)
                return self.at(t)(z)
            self._check(z)
            y = self._product(z.flatten(1), transpose=False)
            return y.reshape(z.shape) if self.n_out == self.n_in else y

    def _check(self, z: Tensor) -> None:
        """Raise unless A can be applied to z; a 0-d factor goes with any dtype."""
        kind = type(self).__name__
        if torch.compiler.is_compiling():
            check_dense("z", z)
        else:
            own = tuple(x for x in chain(self.parameters(), self.buffers()) if x.ndim and x.is_floating_point())
            for tensor in own or (None,):
                check_like(kind, "z", z, tensor)
        if self.time_dependent:
            raise ValueError(f"{kind} depends on time: pass t=, or use A.at(t)")
        if z.ndim < 2 or z.shape[1:].numel() != self.n_in:
            raise ValueError(f"{kind}: z must be [B, {self.n_in}]; got {tuple(z.shape)}")

    @property
    def T(self) -> LatentOperator:
        """The transpose, a live view."""
        return Transposed(self)

    def __matmul__(self, other: LatentOperator) -> LatentOperator:
        return Product(self, _operator(other, "@"))

    def __add__(self, other: LatentOperator) -> LatentOperator:
        return Sum(self, _operator(other, "+"))

    def __sub__(self, other: LatentOperator) -> LatentOperator:
        return Sum(self, Scaled(-1.0, _operator(other, "-")))

    def __mul__(self, factor: float | Tensor) -> LatentOperator:
        return Scaled(factor, self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LatentOperator:
        if isinstance(divisor, Tensor):  # 1 / tensor, taken now, would not be a live view
            raise TypeError("an operator is divided by a number; got a tensor; scale it: (1 / a) * A")
        if not check_number("divisor", divisor):
            raise ValueError("divisor must not be 0: an operator is divided by a number")
        return Scaled(1.0 / divisor, self)

    def __neg__(self) -> LatentOperator:
        return Scaled(-1.0, self)

    @outside_autocast
    def __pow__(self, n: int) -> LatentOperator:
        """A^n, a snapshot; n < 0 is the inverse's power."""
        n = check_count("the exponent", n, least=-(2**31))
        self._check_square("**")
        base = self.inverse() if n < 0 else self
        return base.closed()._power(abs(n))

    def extra_repr(self) -> str:
        return f"{self.n_out} x {self.n_in}"


class Lazy(LatentOperator):
    """An operator made of others. Its parts stay live; ``closed`` takes the snapshot."""

    left: LatentOperator
    right: LatentOperator

    def parts(self) -> tuple[LatentOperator, ...]:
        """The operators it is made of, in the order of its constructor."""
        return self.left, self.right

    def _rebuild(self, *parts: LatentOperator) -> LatentOperator:
        """The same of other parts."""
        return type(self)(*parts)

    @property
    def time_dependent(self) -> bool:
        return any(part.time_dependent for part in self.parts())

    def at(self, t: float | Tensor) -> LatentOperator:
        check_time(t)
        return self._rebuild(*(part.at(t) for part in self.parts())) if self.time_dependent else self

    def _at_each(self, times: Sequence[float]) -> Callable[[int], LatentOperator]:
        if not self.time_dependent:
            return lambda k: self
        parts = [part._at_each(times) for part in self.parts()]
        return lambda k: self._rebuild(*(part(k) for part in parts))


class Transposed(Lazy):
    """A^T."""

    operator: LatentOperator

    def __init__(self, operator: LatentOperator) -> None:
        super().__init__()
        self.operator = operator
        self.n_out, self.n_in = operator.n_in, operator.n_out

    def parts(self) -> tuple[LatentOperator, ...]:
        return (self.operator,)

    @property
    def T(self) -> LatentOperator:
        return self.operator

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        return self.operator._product(z, not transpose)

    def to_dense(self) -> Tensor:
        return self.operator.to_dense().mT

    def closed(self) -> Leaf:
        return self.operator.closed()._transposed()


class Scaled(Lazy):
    """factor * A, the factor a number or a 0-d tensor."""

    operator: LatentOperator
    factor: float | Tensor

    def __init__(self, factor: float | Tensor, operator: LatentOperator) -> None:
        super().__init__()
        if isinstance(factor, Tensor) and check_dense("factor", factor).ndim:
            raise TypeError(f"an operator is scaled by a number or a 0-d tensor; got factor {tuple(factor.shape)}")
        check_factor("factor", factor)
        hold(self, "factor", factor)
        self.operator = operator
        self.n_out, self.n_in = operator.n_out, operator.n_in

    def parts(self) -> tuple[LatentOperator, ...]:
        return (self.operator,)

    def _rebuild(self, *parts: LatentOperator) -> LatentOperator:
        return Scaled(self.factor, *parts)

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        return self.factor * self.operator._product(z, transpose)

    def to_dense(self) -> Tensor:
        return self.factor * self.operator.to_dense()

    def closed(self) -> Leaf:
        return self.operator.closed()._scaled(self.factor)


class Sum(Lazy):
    """A + B."""

    def __init__(self, left: LatentOperator, right: LatentOperator) -> None:
        super().__init__()
        if (left.n_out, left.n_in) != (right.n_out, right.n_in):
            raise ValueError(f"cannot add {_size(left)} and {_size(right)} operators")
        self.left, self.right = left, right
        self.n_out, self.n_in = left.n_out, left.n_in

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        return self.left._product(z, transpose) + self.right._product(z, transpose)

    def to_dense(self) -> Tensor:
        return self.left.to_dense() + self.right.to_dense()

    def closed(self) -> Leaf:
        left, right = self.left.closed(), self.right.closed()
        return left._plus(right) or right._plus(left) or left._dense()._plus(right)


class Product(Lazy):
    """A @ B: B first, then A."""

    def __init__(self, left: LatentOperator, right: LatentOperator) -> None:
        super().__init__()
        if left.n_in != right.n_out:
            raise ValueError(f"cannot multiply {_size(left)} by {_size(right)} operators")
        self.left, self.right = left, right
        self.n_out, self.n_in = left.n_out, right.n_in

    @property
    def T(self) -> LatentOperator:
        return Product(self.right.T, self.left.T)

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        first, second = (self.left, self.right) if transpose else (self.right, self.left)
        return second._product(first._product(z, transpose), transpose)

    @outside_autocast
    def to_dense(self) -> Tensor:
        return self.left.to_dense() @ self.right.to_dense()

    def _closed_form(self) -> Leaf | None:
        left, right = self.left.closed(), self.right.closed()
        if right.absorbs or (result := left._times(right)) is None:
            transposed = right._transposed()._times(left._transposed())
            result = None if transposed is None else transposed._transposed()
        return result

    def closed(self) -> Leaf:
        return self._closed_form() or self.left.closed()._dense()._times(self.right.closed())

    def _inverted(self, read: bool) -> LatentOperator:
        """(A B)^{-1}: of the closed form where there is one, else B^{-1} A^{-1}, kept apart."""
        leaf = self._closed_form()
        if leaf is None and self.left.n_in == self.left.n_out:
            return Product(self.right._inverted(read), self.left._inverted(read))
        return (leaf or self.closed())._inverted(read)


def _size(operator: LatentOperator) -> str:
    return f"{operator.n_out} x {operator.n_in}"


def hold(module: nn.Module, name: str, value: Any) -> None:
    """Keep a Parameter (trained), a tensor as a buffer (saved, moved), a number as it is; checked before."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def _operator(value: object, symbol: str) -> LatentOperator:
    if not isinstance(value, LatentOperator):
        raise TypeError(f"A {symbol} B needs two operators; got {type(value).__name__}; to apply A call A(z)")
    return value
