"""inverse, pinv, svd, eig, norm and rank of every operator, and the functions that operators share for them.

The public methods are here, in ``Decomposable``. Each Leaf class has its computations in its own file, as the
methods ``_inverse``, ``_pinv``, ``_svd``, ``_values`` and ``_eig``.

A LowRank operator multiplies all but k dimensions by one number. Its svd and eig
hold only the k dimensions, and the number is ``rest``:

    svd:  A = U diag(S) Vh + rest (I - U U^H),   U [n, k], S [k], Vh [k, n]
    eig:  A v_i = w_i v_i for i < k, and the other n - k eigenvalues are ``rest``

For any other operator k = min(n_out, n_in), and rest is 0 (svd) or None (eig). torch has no decompositions in half
precision: they are computed in fp32 and rounded.

The checks that an operator is finite and has an inverse read values on the host. On a CPU they are made at every
call. On a GPU a check waits for the device and cannot be captured into a CUDA graph, so it is made once for each
state of the weights; the inverse of an operator that is singular is NaN where it is not checked. A time-dependent
operator is checked once for each time that is a number, and once for all times in tensors. No check is made while
a graph is captured or compiled, or where tensors have no values, as on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..dispatch import capturing, has_values, outside_autocast, read_at_once, tensors_of
from ..freeze import derived

if TYPE_CHECKING:
    from .dense import Leaf

_Operator = TypeVar("_Operator", bound=nn.Module)
_Result = TypeVar("_Result")
_HALF = (torch.float16, torch.bfloat16)


class SVD(NamedTuple("SVD", [("U", Tensor), ("S", Tensor), ("Vh", Tensor)])):
    """U [..., n_out, k], S [..., k] descending, Vh [..., k, n_in], and ``rest``.

    Unpacks as ``U, S, Vh``. A = U diag(S) Vh + rest (I - U U^H); the n - k singular
    values not in S are all |rest|.
    """

    rest: float | Tensor

    def __new__(cls, U: Tensor, S: Tensor, Vh: Tensor, rest: float | Tensor = 0.0) -> SVD:
        self = super().__new__(cls, U, S, Vh)
        self.rest = rest
        return self

    def to_dense(self) -> Tensor:
        """U diag(S) Vh + rest (I - U U^H) [..., n_out, n_in]."""
        dense = (self.U * self.S[..., None, :]) @ self.Vh
        if isinstance(self.rest, float) and self.rest == 0.0:
            return dense
        eye = torch.eye(dense.shape[-1], dtype=dense.dtype, device=dense.device)
        return dense + self.rest * (eye - self.U @ self.U.mH)


class Eig(NamedTuple("Eig", [("values", Tensor), ("vectors", Tensor)])):
    """values [..., k] and vectors [..., n, k], complex; the other n - k eigenvalues are ``rest``, None if k = n."""

    rest: float | Tensor | None

    def __new__(cls, values: Tensor, vectors: Tensor, rest: float | Tensor | None = None) -> Eig:
        self = super().__new__(cls, values, vectors)
        self.rest = rest
        return self


def decomposed(what: str, decompose: Callable[..., _Result], *args: Any) -> _Result:
    """``decompose(*args)``; ValueError where torch finds no decomposition of ``what``."""
    try:
        return decompose(*args)
    except RuntimeError as error:
        if not isinstance(error, torch.linalg.LinAlgError) and "infs or NaNs" not in str(error):  # as eig says
            raise
        raise ValueError(f"{what} has NaN or infinite values, or overflows when it is decomposed") from error


def largest(S: Tensor, rest: Tensor) -> Tensor:
    """The largest singular value [...]: the maximum of S [..., k], where k may be 0, and of ``rest`` >= 0."""
    return torch.maximum(S.amax(-1) if S.shape[-1] else S.sum(-1), rest)


def matrix_inverse(matrix: Tensor, what: str, read: bool) -> Tensor:
    """matrix^{-1} [..., n, n]; NaN or a ValueError where it is singular, as in ``unless_singular``."""
    inverse, info = torch.linalg.inv_ex(matrix)
    if matrix.numel() == 0:
        return inverse
    condition = torch.linalg.matrix_norm(matrix.detach(), 1) * torch.linalg.matrix_norm(inverse.detach(), 1)
    condition = condition.masked_fill(info != 0, torch.inf)
    return unless_singular(inverse, condition, f"{what} {tuple(matrix.shape)}", read)


def unless_singular(inverse: Tensor, condition: Tensor, what: str, read: bool) -> Tensor:
    """``inverse``, but NaN where the condition number [...] is 1 / epsilon or more.

    With ``read`` the host waits for the device, and a ValueError replaces the NaN.
    """
    regular = condition < 1.0 / torch.finfo(condition.dtype).eps
    if read and not bool(regular.all()):
        raise ValueError(
            f"{what} is singular to working precision (condition number {float(condition.max()):.1e}): "
            "it has no inverse; use pinv()"
        )
    return torch.where(regular.reshape(*regular.shape, *(1,) * (inverse.ndim - regular.ndim)), inverse, torch.nan)


class Decomposable(nn.Module):
    """Inverses, decompositions, norm and rank of an operator: differentiable, from its values at each call."""

    n_out: int
    n_in: int

    def closed(self) -> Leaf:
        """The Leaf that this operator equals now, differentiable; it may share this operator's tensors."""
        raise NotImplementedError

    def inverse(self) -> Any:
        """A^{-1} of A's values now.

        On a GPU only the first call for these weights checks that A is not singular (linfast.operators.spectral).

        Raises:
            ValueError: A is rectangular or time-dependent, or checked and singular; unchecked, the result is NaN.
        """
        return self._inverse_of(self, None)

    def inverse_at(self, t: float | Tensor | None) -> Any:
        """``A.at(t).inverse()``, or ``A.inverse()`` where t is None; on a GPU checked once for each number t."""
        if t is None:
            return derived(self, "inverse", self.inverse)
        operator: Any = self
        return operator.at(t)._inverse_of(self, Tensor if isinstance(t, Tensor) else t)

    @outside_autocast
    def _inverse_of(self, owner: nn.Module, at: Hashable) -> Any:
        """A^{-1}, checked once per (owner, at): the operator that A comes from, and the time or schedule."""
        self._check_square("inverse()")
        read = is_unread(owner, at)
        inverse = self._inverted(read)
        if read:
            mark_read(owner, at)
        return inverse

    def _inverted(self, read: bool) -> Any:
        """A^{-1} in A's dtype; with ``read``, ValueError where A is singular."""
        leaf = self.closed()
        return cast(in_fp32(leaf)._inverse(read), dtype_of(leaf))

    @outside_autocast
    def pinv(self, rtol: float | None = None) -> Any:
        """The Moore-Penrose pseudo-inverse A^+, n_in x n_out, of A's values now; ValueError if they are not finite.

        Singular values up to rtol times the largest count as zero; by default rtol is
        max(n_out, n_in) times the dtype's epsilon.
        """
        rtol = _checked_rtol(rtol, self)
        leaf = self.closed()
        return cast(self._decomposed(leaf, "_pinv", rtol), dtype_of(leaf))

    @outside_autocast
    def svd(self) -> SVD:
        """The ``SVD`` of A, A = U diag(S) Vh + rest (I - U U^T); ValueError where A has NaN or infinite values."""
        leaf = self.closed()
        svd, dtype = self._decomposed(leaf, "_svd"), dtype_of(leaf)
        return SVD(svd.U.to(dtype), svd.S.to(dtype), svd.Vh.to(dtype), svd.rest)

    @outside_autocast
    def eig(self) -> Eig:
        """The ``Eig`` of a square A, complex64 or wider; ValueError for a rectangle, NaN or infinite values."""
        self._check_square("eig()")
        return self._decomposed(self.closed(), "_eig")

    def norm(self, ord: float | str = 2) -> Tensor:
        """The norm [], or [B] of one operator per sample: 2 (spectral: the Lipschitz constant), "fro" or "nuc"."""
        if isinstance(ord, bool) or not isinstance(ord, (int, float, str)) or ord not in (2, "fro", "nuc"):
            raise ValueError(f"ord must be 2, 'fro' or 'nuc'; got {ord!r}")
        S, rest, others = self._singular_values()
        if ord == 2:
            return largest(S, rest)
        if ord == "fro":
            return torch.hypot(torch.linalg.vector_norm(S, dim=-1), others**0.5 * rest)
        return S.sum(-1) + others * rest

    def rank(self, rtol: float | None = None) -> Tensor:
        """The number of singular values, [] or [B], above rtol times the largest (rtol as in ``pinv``)."""
        rtol = _checked_rtol(rtol, self)
        S, rest, others = self._singular_values()
        limit = largest(S, rest) * rtol
        return (limit[..., None] < S).sum(-1) + others * (limit < rest)

    @outside_autocast
    def _singular_values(self) -> tuple[Tensor, Tensor, int]:
        """(S [..., k], the value [] of all singular values that are not in S, or 0, and the number of these)."""
        S, rest = self._decomposed(self.closed(), "_values")
        others = min(self.n_out, self.n_in) - S.shape[-1]
        return S, torch.as_tensor(rest if others else 0.0, dtype=S.dtype, device=S.device).abs(), others

    def _decomposed(self, leaf: Any, method: str, *args: Any) -> Any:
        """``leaf.method(*args)`` in fp32 or wider; ValueError where this operator has NaN or infinite values."""
        check_finite(self)
        return decomposed(type(self).__name__, getattr(in_fp32(leaf), method), *args)

    def _check_square(self, what: str) -> None:
        if self.n_out != self.n_in:
            raise ValueError(f"{what} needs a square A; this one is {self.n_out} x {self.n_in}; use pinv()")


def _checked_rtol(rtol: float | None, operator: Decomposable) -> float:
    """rtol, checked to be at least 0; by default for the operator's dtype, even if it is decomposed in another."""
    if rtol is not None:
        return check_number("rtol", rtol, least=0.0)
    return max(operator.n_out, operator.n_in) * torch.finfo(dtype_of(operator)).eps


def dtype_of(operator: nn.Module) -> torch.dtype:
    """The dtype of the operator's first matrix or vector; 0-d tensors are passed over."""
    found = (t.dtype for t in tensors_of(operator) if t.ndim and t.is_floating_point())
    return next(found, torch.get_default_dtype())


def in_fp32(leaf: _Operator) -> _Operator:
    """The leaf, converted to fp32 where it is in half precision; differentiable."""
    return cast(leaf, torch.float32) if dtype_of(leaf) in _HALF else leaf


def cast(leaf: _Operator, dtype: torch.dtype) -> _Operator:
    """A copy of the leaf with its tensors in this dtype; the leaf itself where they already are."""
    tensors = dict((*leaf.named_parameters(recurse=False), *leaf.named_buffers(recurse=False)))
    if all(tensor.dtype == dtype for tensor in tensors.values()):
        return leaf
    other = copy.copy(leaf)
    other._parameters, other._buffers = {}, {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return other


_MOST = 1024  # checked times that are remembered per operator

# For each operator, the state of its weights and the times for which it was checked in that state.
_read: WeakKeyDictionary[nn.Module, tuple[Hashable, set[Hashable]]] = WeakKeyDictionary()


def is_unread(operator: nn.Module, at: Hashable) -> bool:
    """Whether the operator must still be checked ``at`` this time: always on a CPU, else once for these weights."""
    if torch.compiler.is_compiling() or any(capturing(t) or not has_values(t) for t in tensors_of(operator)):
        return False
    if all(map(read_at_once, tensors_of(operator))):
        return True
    state, seen = _read.get(operator, (None, ()))
    return state is None or at not in seen or state != _state(operator)


def mark_read(operator: nn.Module, at: Hashable) -> None:
    """Remember that the operator passed the check ``at`` this time."""
    state = _state(operator)
    if state is None:
        return
    known, seen = _read.get(operator, (None, set()))
    if known != state or len(seen) >= _MOST:
        seen = set()
    _read[operator] = state, {*seen, at}


def check_finite(operator: nn.Module) -> None:
    """ValueError where the operator has NaN or infinite values: not every decomposition fails on them."""
    if not is_unread(operator, "finite") or _state(operator) is None:
        return
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(operator)):
        raise ValueError(f"{type(operator).__name__} has NaN or infinite values: they have no decomposition")
    mark_read(operator, "finite")


def _state(operator: nn.Module) -> Hashable:
    """A key of the weights, which misses writes through ``.data`` and by fused optimisers; None where unknown."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # tensors in torch.func have no address
        return None
    return tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors_of(operator))
