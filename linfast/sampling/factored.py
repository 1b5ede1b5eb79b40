"""The product of all steps for A_t = alpha I + U_t V_t^T, in factored form.

Every stage, step and product of steps is a I + U C V^T. U and V are the factors at the times that it
uses, which are consecutive: its window. C needs only the r x r products V_i^T U_j. Three parts:

    steps   all steps at once; with W the diagonal matrix that selects the factors of stage k,
            A_k (a I + U H V^T) = alpha a I + U (alpha H + W (a I + S H)) V^T,   S = V^T U
    tree    neighbours are multiplied in pairs, all pairs at once, up to log2(count) times:
            (b I + U' D V'^T)(a I + U C V^T) = ab I + b U C V^T + a U' D V'^T + U' D (V'^T U) C V^T
    fold    the remaining pieces are multiplied in order into B = beta I + U Q^T, or into a dense B

C is in float64 whatever the parameters' dtype is: its products are small. The multiples of I depend on alpha and
the schedule alone and are computed on the host, without waiting for the device. A time that two steps share is in
U and V once: rk4's U has (2 count + 1) r columns. Where U and V do not depend on time, A_t = alpha I +
U diag(w_t) V^T, the formulas hold with W = diag(w_t) and one window for all steps, and C stays r x r.

Before the fold, only the products of two windows, V^T U and V'^T U, have a cost that grows with N.

``range_within`` truncates: A = U^T Q (rows U, Q [R, N]) becomes L (A^T L)^T with L [N, k] orthonormal. The
Frobenius norm of the error A - L L^T A is computed, not estimated: with the thin QR Q^T = O R, A = Y O^T for
Y = U^T R^T, and norms of A are those of Y. L is found in blocks. Each block spans the range of what the blocks
before it left of Y, by a random sketch, and its part is subtracted from Y. An SVD of L^T Y then drops the
columns that the tolerance allows to drop. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import uploaded
from .integrate import Schedule, advance

# The largest C [width, width] that the tree makes. On a CPU products along N run at full speed from
# 128 columns on, and cost more than the tree's own O(width^3). On a GPU launches cost more than
# arithmetic, and a tree takes log2(count) launches where the fold takes count.
_TREE_WIDTH = {"cpu": 256, "cuda": 1024}

_BLOCK = 32  # columns of L found at a time: enough for products at full speed, with few in excess


@dataclass(frozen=True)
class Factors:
    """A_t = alpha I + U_t diag(w_t) V_t^T at the distinct times of a schedule.

    The rows of U and V [R, N] are the factors' columns. Each step uses ``width`` consecutive rows, which
    start ``shift`` rows after those of the step before; shift is 0 where U and V do not depend on time.
    ``weights`` [count, stages, width] are the diagonals W.
    """

    alpha: float
    U: Tensor
    V: Tensor
    weights: Tensor
    shift: int
    width: int


@dataclass(frozen=True)
class Piece:
    """scale I + U C V^T over rows start ... start + width of the factors; C [width, width] in float64."""

    start: int
    scale: float
    C: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.C.shape[-1])


def step_pieces(factors: Factors, plan: Schedule) -> tuple[np.ndarray, Tensor]:
    """(scale [count], C [count, width, width]) of every step, float64."""
    windows = _windows(factors.V, factors, 0, 1, plan.count, factors.width)
    S = (windows @ _windows(factors.U, factors, 0, 1, plan.count, factors.width).mT).double()
    one = np.ones((plan.count, 1, 1))
    eye, zero = torch.eye(factors.width, dtype=S.dtype, device=S.device), torch.zeros_like(S)
    slopes_a: list[np.ndarray] = []
    slopes_H: list[Tensor] = []
    for stage, row in enumerate(plan.scheme.a):
        a, H = advance(one, slopes_a, row, plan.h), advance(zero, slopes_H, row, plan.h)
        W = factors.weights[:, stage, :, None].to(S)
        rates = np.array([1.0 / (1.0 - plan.times[plan.index(i, stage)]) for i in range(plan.count)])[:, None, None]
        rate, identity = uploaded(rates, S.device), uploaded(a, S.device) * eye
        slopes_a.append(rates * (factors.alpha - 1) * a)
        slopes_H.append(rate * ((factors.alpha - 1) * H + W * (identity + S @ H)))
    scale = advance(one, slopes_a, plan.scheme.b, plan.h)
    return scale[:, 0, 0], advance(zero, slopes_H, plan.scheme.b, plan.h)


def multiply_pairs(factors: Factors, scale: np.ndarray, C: Tensor, limit: int | None = None) -> list[Piece]:
    """The steps' product as a few pieces in order of time: neighbours are multiplied up to a width of ``limit``."""
    limit = _TREE_WIDTH.get(C.device.type, 1024) if limit is None else limit
    done: list[tuple[int, Any, Tensor]] = []  # (start, scale, C) of pieces without a neighbour
    span = 1  # steps in one piece
    while (count := C.shape[0]) > 1 and C.shape[-1] + span * factors.shift <= limit:
        width, shift, pairs = C.shape[-1], span * factors.shift, count // 2
        if count % 2:
            done.insert(0, ((count - 1) * shift, scale[-1], C[-1]))
        later = _windows(factors.V, factors, span, 2 * span, pairs, width)
        earlier = _windows(factors.U, factors, 0, 2 * span, pairs, width)
        a, b = scale[0 : 2 * pairs : 2], scale[1 : 2 * pairs : 2]
        first, second = C[0 : 2 * pairs : 2], C[1 : 2 * pairs : 2]
        both = second @ (later @ earlier.mT).double() @ first
        C = (
            F.pad(uploaded(b, C.device)[:, None, None] * first, (0, shift, 0, shift))
            + F.pad(uploaded(a, C.device)[:, None, None] * second, (shift, 0, shift, 0))
            + F.pad(both, (0, shift, shift, 0))
        )
        scale, span = a * b, 2 * span
    done = [(i * span * factors.shift, scale[i], C[i]) for i in range(C.shape[0])] + done
    return [Piece(start, float(a), C) for start, a, C in done]


def _windows(rows: Tensor, factors: Factors, first: int, every: int, count: int, width: int) -> Tensor:
    """[count, width, N]: ``width`` rows from the first row of each of the steps first, first + every, ..."""
    if factors.shift == 0:
        return rows.expand(count, -1, -1)
    return rows[first * factors.shift :].unfold(0, width, every * factors.shift)[:count].mT


def fold_factored(factors: Factors, pieces: list[Piece]) -> tuple[float, Tensor]:
    """(beta, Q [R, N]) with the product of the pieces = beta I + U^T Q for rows U, Q."""
    U, V = factors.U, factors.V
    beta = pieces[0].scale
    Q = pieces[0].C.to(V.dtype) @ V[pieces[0].rows]
    for piece in pieces[1:]:
        known, new = Q.shape[0], V[piece.rows]
        inner = (new @ U[:known].mT) @ Q + beta * new
        added = piece.C.to(V.dtype) @ inner
        overlap = known - piece.start
        Q = piece.scale * Q
        Q = torch.cat((Q[: piece.start], Q[piece.start :] + added[:overlap], added[overlap:]))
        beta *= piece.scale
    return beta, Q


def fold_dense(factors: Factors, pieces: list[Piece]) -> Tensor:
    """The product of the pieces, [N, N]."""
    U, V = factors.U, factors.V
    B = torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
    for piece in pieces:
        B = piece.scale * B + U[piece.rows].mT @ (piece.C.to(V.dtype) @ (V[piece.rows] @ B))
    return B


def weighted_columns(U: Tensor, Q: Tensor) -> Tensor:
    """Y [N, R] with Y Y^T = A A^T for A = U^T Q, where U and Q are [R, N]; in float64."""
    _, R = torch.linalg.qr(Q.double().mT, mode="r")
    return U.double().mT @ R.mT


def range_within(Y: Tensor, allowed: float, widest: int) -> tuple[Tensor, float] | None:
    """(L, error) with L [N, k] orthonormal and error = |Y - L L^T Y|_F <= ``allowed``.

    k is the least in the range found; None where it would exceed ``widest``.
    """
    random = torch.Generator(device=Y.device).manual_seed(0)
    L, rest = Y.new_zeros(Y.shape[0], 0), Y
    while (left := float(rest.norm())) > 0.5 * allowed:
        block = min(_BLOCK, Y.shape[0] - L.shape[1])
        if L.shape[1] >= widest + _BLOCK or block == 0:
            return None
        sketch = rest @ torch.randn(Y.shape[1], block, generator=random, dtype=Y.dtype, device=Y.device)
        found = torch.linalg.qr(rest @ (rest.mT @ torch.linalg.qr(sketch).Q)).Q
        found = torch.linalg.qr(found - L @ (L.mT @ found)).Q
        rest = rest - found @ (found.mT @ rest)
        L = torch.cat((L, found), 1)
    X, S, _ = torch.linalg.svd(L.mT @ Y, full_matrices=False)
    lost = torch.cat((S.square().flip(0).cumsum(0).flip(0), S.new_zeros(1))).add(left**2).sqrt()
    k = int((lost > allowed).sum())
    return None if k > widest else (L @ X[:, :k], float(lost[k]))
