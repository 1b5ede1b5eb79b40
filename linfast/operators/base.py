"""LatentOperator: the linear map A of f = g_y^{-1} A g_x, and the algebra of such maps.

Column-vector maths on batches of row vectors: A(z) = z @ A.mT for z [B, n_in].

Two base classes; Projection and the operators of time.py have neither:

    Leaf   holds tensors: Dense, Diagonal, LowRank, DepthwiseConv, BlockDiagonal
    Lazy   holds operators: A.T, A @ B, A + B, c * A (below); it follows every change of these operators

``closed()`` returns the Leaf that an operator equals now. inverse, pinv, svd, eig, ** and norm (spectral.py) are
computed from that Leaf at each call. They are differentiable, and keep the Leaf's structure where they can.
``_plus`` and ``_times`` of a Leaf return a sum or product in closed form, or None; where neither operand has a
closed form, the result is Dense.
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

    ``A(z)`` takes z [B, n_in], or [B, ...] with n_in elements per sample. It returns [B, n_out], or
    the shape of z where n_out = n_in. ``A(z, t=t)`` is ``A.at(t)(z)``.
    """

    __array_ufunc__ = None  # so that array * A calls A.__rmul__; NumPy would make an array of operators
    truncation_error: float = 0.0  # relative Frobenius error of a truncation: see linfast.collapse(tol=)

    # Defined by subclasses.

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        """A z for rows z [B, n_in], or with ``transpose`` A^T z for rows z [B, n_out]."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """The matrix [n_out, n_in], or [B, n_out, n_in] where A holds one operator per sample."""
        raise NotImplementedError

    @property
    def time_dependent(self) -> bool:
        """Whether A needs a time before it can be applied."""
        return False

    def at(self, t: float | Tensor) -> LatentOperator:
        """The operator at time t. t is a number, a 0-d tensor, or a tensor [B] with one time per sample."""
        check_time(t)
        return self

    def _at_each(self, times: Sequence[float]) -> Callable[[int], LatentOperator]:
        """The function k -> A.at(times[k]). Networks that compute A from t are called once, for all times."""
        return lambda k: self.at(times[k])

    def _factor_columns(self, count: int) -> int | None:
        """Columns of U (or V) over all ``count`` times in ``factors_at``; None where A has no such method."""
        return None

    # Common to all operators.

    def forward(self, z: Tensor, t: float | Tensor | None = None) -> Tensor:
        """A z per sample, at time t where A is time-dependent; TypeError or ValueError if z or t does not fit."""
        with range_("forward", self):
            if t is not None:
                check_dense("z", z)
                check_time(t, z, z.shape[0] if z.ndim else None)
                return self.at(t)(z)
            self._check(z)
            y = self._product(z.flatten(1), transpose=False)
            return y.reshape(z.shape) if self.n_out == self.n_in else y

    def _check(self, z: Tensor) -> None:
        """Raise unless A can be applied to z; 0-d tensors of A may have another dtype than z."""
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
        """A^T as a view, which follows changes of A."""
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
        if isinstance(divisor, Tensor):  # 1 / tensor, computed now, would not follow the tensor
            raise TypeError("an operator is divided by a number; got a tensor; scale it: (1 / a) * A")
        if not check_number("divisor", divisor):
            raise ValueError("divisor must not be 0: an operator is divided by a number")
        return Scaled(1.0 / divisor, self)

    def __neg__(self) -> LatentOperator:
        return Scaled(-1.0, self)

    @outside_autocast
    def __pow__(self, n: int) -> LatentOperator:
        """A^n of A's values now; for n < 0 a power of the inverse. ValueError where A is not square."""
        n = check_count("the exponent", n, least=-(2**31))
        self._check_square("**")
        base = self.inverse() if n < 0 else self
        return base.closed()._power(abs(n))

    def extra_repr(self) -> str:
        return f"{self.n_out} x {self.n_in}"


class Lazy(LatentOperator):
    """An operator made of other operators. It follows their changes; ``closed`` is its value now."""

    left: LatentOperator
    right: LatentOperator

    def parts(self) -> tuple[LatentOperator, ...]:
        """The operators that this one is made of, in the order of its constructor."""
        return self.left, self.right

    def _rebuild(self, *parts: LatentOperator) -> LatentOperator:
        """The same operation on other parts."""
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
    """factor * A, where the factor is a number or a 0-d tensor."""

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
    """A @ B, which applies B first."""

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
        """(A B)^{-1}, from the closed form of A B where there is one, else as the Product of B^{-1} and A^{-1}."""
        leaf = self._closed_form()
        if leaf is None and self.left.n_in == self.left.n_out:
            return Product(self.right._inverted(read), self.left._inverted(read))
        return (leaf or self.closed())._inverted(read)


def _size(operator: LatentOperator) -> str:
    return f"{operator.n_out} x {operator.n_in}"


def hold(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of the module, without checks. A tensor that is not a Parameter becomes a buffer."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def _operator(value: object, symbol: str) -> LatentOperator:
    if not isinstance(value, LatentOperator):
        raise TypeError(f"A {symbol} B needs two operators; got {type(value).__name__}; to apply A call A(z)")
    return value
