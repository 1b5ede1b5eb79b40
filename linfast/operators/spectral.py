"""Inverses, pseudo-inverses, svd and eig: what every operator answers, and the arithmetic that operators share.

The public methods are here, in ``Decomposable``. The arithmetic of a kind of operator is in the kind's own file, as
``_inverse``, ``_pinv``, ``_svd``, ``_values`` and ``_eig`` of the Leaf (LowRank's in low_rank.py).

A structured operator acts on all but a few dimensions as one number. Its svd and
eig then hold only the few, and the number is ``rest``:

    svd:  A = U diag(S) Vh + rest (I - U U^H),   U [n, k], S [k], Vh [k, n]
    eig:  A v_i = w_i v_i for i < k, and the other n - k eigenvalues are ``rest``

For a matrix without such structure rest is 0 and the formulas are the usual ones. torch has no decompositions in
half precision: they are computed in fp32 and rounded.

Whether an operator is finite, or has an inverse, is read by the host once for each state of its weights. Reading
it waits for a GPU and cannot be captured into a CUDA graph, so later inverses go unread; a singular operator is
seen in any case, because its inverse is NaN. The inverse of a time-dependent operator is read for each time
that is a number, and once for all times in tensors. Nothing is read while a graph is captured or compiled, or where
tensors have no values, as on the meta device.
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
    """values [..., k] and vectors [..., n, k], both complex; ``rest`` is the eigenvalue of the other n - k."""

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
        if not isinstance(error, torch.linalg.LinAlgError) and "infs or NaNs" not in str(error):  # eig's error
            raise
        raise ValueError(f"{what} has NaN or infinite values, or overflows when it is decomposed") from error


def largest(S: Tensor, rest: Tensor) -> Tensor:
    """The largest singular value [...] of S [..., k], k possibly 0, and the size of the rest."""
    return torch.maximum(S.amax(-1) if S.shape[-1] else S.sum(-1), rest)


def matrix_inverse(matrix: Tensor, what: str, read: bool) -> Tensor:
    """matrix^{-1} [..., n, n] ``unless_singular``."""
    inverse, info = torch.linalg.inv_ex(matrix)
    if matrix.numel() == 0:
        return inverse
    condition = torch.linalg.matrix_norm(matrix.detach(), 1) * torch.linalg.matrix_norm(inverse.detach(), 1)
    condition = condition.masked_fill(info != 0, torch.inf)
    return unless_singular(inverse, condition, f"{what} {tuple(matrix.shape)}", read)


def unless_singular(inverse: Tensor, condition: Tensor, what: str, read: bool) -> Tensor:
    """``inverse``, NaN unless the condition number [...] is below 1 / epsilon; where ``read``, ValueError instead.

    Reading it, the host waits for the device.
    """
    regular = condition < 1.0 / torch.finfo(condition.dtype).eps
    if read and not bool(regular.all()):
        raise ValueError(
            f"{what} is singular to working precision (condition number {float(condition.max()):.1e}): "
            "it has no inverse; use pinv()"
        )
    return torch.where(regular.reshape(*regular.shape, *(1,) * (inverse.ndim - regular.ndim)), inverse, torch.nan)


class Decomposable(nn.Module):
    """What an operator answers about itself: every answer is a differentiable snapshot, computed anew."""

    n_out: int
    n_in: int

    def closed(self) -> Leaf:
        """The structured operator this equals now, differentiable; it may share this one's tensors."""
        raise NotImplementedError

    def inverse(self) -> Any:
        """A^{-1}, a snapshot.

        Whether A has one is read from the device at the first call for these weights (linfast.operators.spectral).

        Raises:
            ValueError: A is rectangular, or singular where that is read; it is NaN where it is not.
        """
        return self._inverse_of(self, None)

    def inverse_at(self, t: float | Tensor | None) -> Any:
        """``A.at(t).inverse()``, read at the first call for these weights and a time that is a number."""
        if t is None:
            return derived(self, "inverse", self.inverse)
        operator: Any = self
        return operator.at(t)._inverse_of(self, Tensor if isinstance(t, Tensor) else t)

    @outside_autocast
    def _inverse_of(self, owner: nn.Module, at: Hashable) -> Any:
        """A^{-1} of what ``owner`` is at a time, or makes of itself."""
        self._check_square("inverse()")
        read = is_unread(owner, at)
        inverse = self._inverted(read)
        if read:
            mark_read(owner, at)
        return inverse

    def _inverted(self, read: bool) -> Any:
        """A^{-1} in A's dtype; ``read``: raise where there is none."""
        leaf = self.closed()
        return cast(in_fp32(leaf)._inverse(read), dtype_of(leaf))

    @outside_autocast
    def pinv(self, rtol: float | None = None) -> Any:
        """The Moore-Penrose pseudo-inverse A^+, a snapshot.

        Singular values up to rtol times the largest count as zero; by default rtol is
        max(n_out, n_in) times the dtype's epsilon.
        """
        rtol = _checked_rtol(rtol, self)
        leaf = self.closed()
        return cast(self._decomposed(leaf, "_pinv", rtol), dtype_of(leaf))

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
        rtol = _checked_rtol(rtol, self)
        S, rest, others = self._singular_values()
        limit = largest(S, rest) * rtol
        return (limit[..., None] < S).sum(-1) + others * (limit < rest)

    @outside_autocast
    def _singular_values(self) -> tuple[Tensor, Tensor, int]:
        """S [..., k], and the one value [] that the ``others`` singular values have; 0 where there are none."""
        S, rest = self._decomposed(self.closed(), "_values")
        others = min(self.n_out, self.n_in) - S.shape[-1]
        return S, torch.as_tensor(rest if others else 0.0, dtype=S.dtype, device=S.device).abs(), others

    def _decomposed(self, leaf: Any, method: str, *args: Any) -> Any:
        """The method of the Leaf that this is, in fp32 or wider; ValueError where it has NaN or infinite values."""
        check_finite(self)
        return decomposed(type(self).__name__, getattr(in_fp32(leaf), method), *args)

    def _check_square(self, what: str) -> None:
        if self.n_out != self.n_in:
            raise ValueError(f"{what} needs a square A; this one is {self.n_out} x {self.n_in}; use pinv()")


def _checked_rtol(rtol: float | None, operator: Decomposable) -> float:
    """rtol, a number of at least 0; by default that of the operator's own dtype, whatever it is decomposed in."""
    if rtol is not None:
        return check_number("rtol", rtol, least=0.0)
    return max(operator.n_out, operator.n_in) * torch.finfo(dtype_of(operator)).eps


def dtype_of(operator: nn.Module) -> torch.dtype:
    """The dtype of the operator's first matrix or vector; a 0-d factor fits any."""
    found = (t.dtype for t in tensors_of(operator) if t.ndim and t.is_floating_point())
    return next(found, torch.get_default_dtype())


def in_fp32(leaf: _Operator) -> _Operator:
    """The leaf, its numbers in fp32 where they are in half precision; differentiable."""
    return cast(leaf, torch.float32) if dtype_of(leaf) in _HALF else leaf


def cast(leaf: _Operator, dtype: torch.dtype) -> _Operator:
    """The leaf with its numbers in this dtype; itself where they are."""
    tensors = dict((*leaf.named_parameters(recurse=False), *leaf.named_buffers(recurse=False)))
    if all(tensor.dtype == dtype for tensor in tensors.values()):
        return leaf
    other = copy.copy(leaf)
    other._parameters, other._buffers = {}, {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return other


_MOST = 1024  # times that are remembered of one operator

# Of each operator the state of its weights, and for which times it was read.
_read: WeakKeyDictionary[nn.Module, tuple[Hashable, set[Hashable]]] = WeakKeyDictionary()


def is_unread(operator: nn.Module, at: Hashable) -> bool:
    """Whether the host still has to read, for these weights, if this operator has an inverse ``at`` this time."""
    if torch.compiler.is_compiling() or any(capturing(t) or not has_values(t) for t in tensors_of(operator)):
        return False
    if all(map(read_at_once, tensors_of(operator))):
        return True
    state, seen = _read.get(operator, (None, ()))
    return state is None or at not in seen or state != _state(operator)


def mark_read(operator: nn.Module, at: Hashable) -> None:
    """Remember that it has one."""
    state = _state(operator)
    if state is None:
        return
    known, seen = _read.get(operator, (None, set()))
    if known != state or len(seen) >= _MOST:
        seen = set()
    _read[operator] = state, {*seen, at}


def check_finite(operator: nn.Module) -> None:
    """ValueError where it has NaN or infinite values, which not every decomposition would show."""
    if not is_unread(operator, "finite") or _state(operator) is None:
        return
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(operator)):
        raise ValueError(f"{type(operator).__name__} has NaN or infinite values: they have no decomposition")
    mark_read(operator, "finite")


def _state(operator: nn.Module) -> Hashable:
    """What changes with the weights, but for writes through ``.data`` and by fused optimisers; None: unknown."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # a transform's tensors have no memory
        return None
    return tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors_of(operator))
