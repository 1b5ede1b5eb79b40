"""Operators made of operators: A.T, A @ B, A + B, c * A. Live views of their parts.

closed()   the Leaf such an operator equals now, by the parts' ``_plus`` and ``_times``
at(t)      the same of the parts at time t
"""

from __future__ import annotations

from torch import Tensor

from ..checks import check_dense, check_factor, check_time
from ..dispatch import outside_autocast
from .base import LatentOperator, Leaf, hold, inverse_of

__all__ = ["Lazy", "Product", "Scaled", "Sum", "Transposed"]


class Lazy(LatentOperator):
    """An operator made of others. Its parts stay live; ``closed`` takes the snapshot."""

    def parts(self) -> tuple[LatentOperator, ...]:
        raise NotImplementedError

    def _rebuild(self, *parts: LatentOperator) -> LatentOperator:
        raise NotImplementedError

    @property
    def time_dependent(self) -> bool:
        return any(part.time_dependent for part in self.parts())

    def at(self, t: float | Tensor) -> LatentOperator:
        check_time(t)
        return self._rebuild(*(part.at(t) for part in self.parts())) if self.time_dependent else self


class Transposed(Lazy):
    """A^T."""

    operator: LatentOperator

    def __init__(self, operator: LatentOperator) -> None:
        super().__init__()
        self.operator = operator
        self.n_out, self.n_in = operator.n_in, operator.n_out

    def parts(self) -> tuple[LatentOperator, ...]:
        return (self.operator,)

    def _rebuild(self, *parts: LatentOperator) -> LatentOperator:
        return Transposed(*parts)

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

    factor: float | Tensor
    operator: LatentOperator

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

    def parts(self) -> tuple[LatentOperator, ...]:
        return (self.left, self.right)

    def _rebuild(self, *parts: LatentOperator) -> LatentOperator:
        return Sum(*parts)

    def _product(self, z: Tensor, transpose: bool) -> Tensor:
        return self.left._product(z, transpose) + self.right._product(z, transpose)

    def to_dense(self) -> Tensor:
        return self.left.to_dense() + self.right.to_dense()

    def closed(self) -> Leaf:
        left, right = self.left.closed(), self.right.closed()
        result = left._plus(right)
        result = right._plus(left) if result is None else result
        return left._dense()._plus(right) if result is None else result


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

    def parts(self) -> tuple[LatentOperator, ...]:
        return (self.left, self.right)

    def _rebuild(self, *parts: LatentOperator) -> LatentOperator:
        return Product(*parts)

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
        result = self._closed_form()
        return self.left.closed()._dense()._times(self.right.closed()) if result is None else result

    def _inverted(self, read: bool) -> LatentOperator:
        """(A B)^{-1}: of the closed form where there is one, else B^{-1} A^{-1}, kept apart."""
        result = self._closed_form()
        if result is None and self.left.n_in == self.left.n_out:
            return Product(self.right._inverted(read), self.left._inverted(read))
        return inverse_of(self.closed() if result is None else result, read)


def _size(operator: LatentOperator) -> str:
    return f"{operator.n_out} x {operator.n_in}"
