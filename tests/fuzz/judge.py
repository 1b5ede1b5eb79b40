"""Decides which results are right, and counts the calls.

The truth of a result is computed in float64. Its wobble is the change of the truth where every input and weight is
changed by up to half a unit in the last place of the result's dtype. A result within a few wobbles and roundings is
accepted at once. For any other result in float32 ``linfast.bench.rounding`` estimates the effect of rounding from
the scatter of random runs, and only a result that exceeds that too is a finding. In float64 and in half precision,
whose rounding is the same in every run, there is a fixed bound that only a wrong formula exceeds.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from linfast.bench import rounding
from torch import Tensor

from linfast.dispatch import plain_torch

__all__ = ["NO_BUDGET", "VISIBLE", "Finding", "Judge", "Truth", "listed", "moves_by", "truth_of"]

Outputs = Sequence[Tensor | None]
_QUICK = 24.0  # wobbles and roundings that need no budget
_WRONG = 500.0  # the same in float64, where there is no budget
_WRONG_HALF = 64.0  # and in float16 and bfloat16
NO_BUDGET = 1e-12
VISIBLE = 1e-15  # the change for float64: half a unit would be lost by rounding
_DRAWS = 16


class Finding(AssertionError):
    """A wrong result. ``about`` names the call and the oracle; findings with the same ``about`` count as one."""

    def __init__(self, about: str, what: str) -> None:
        super().__init__(f"{about}: {what}")
        self.about = about


class Truth(NamedTuple):
    """Outputs in float64, the change of each (L2), and the epsilon of the arithmetic if it is not the result's."""

    exact: list[Tensor | None]
    wobble: list[float]
    eps: float = 0.0

    @classmethod
    def of(cls, exact: Any, moved: Sequence[Any], eps: float = 0.0) -> Truth:
        exact, others = listed(exact), [listed(m) for m in moved]
        wobble = [
            0.0 if t is None else max(float((other[i].double() - t).norm()) for other in others)
            for i, t in enumerate(exact)
        ]
        return cls([None if t is None else t.detach() for t in exact], wobble, eps)

    def rows(self, index: slice) -> Truth:
        return Truth([None if t is None else t[index] for t in self.exact], self.wobble, self.eps)


def truth_of(run: Callable[[float], Any], eps: float) -> Truth:
    """``run(size)`` computes outputs in float64 with everything changed by ``size``, relative; 0: unchanged."""
    with plain_torch():
        return Truth.of(run(0.0), [run(moves_by(eps)) for _ in range(2)], eps)


def moves_by(eps: float) -> float:
    """The change of the inputs for a result in a dtype with this epsilon."""
    return eps / 2 if eps > NO_BUDGET else VISIBLE


def listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


class Judge:
    """Compares results with their oracles and counts them."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()

    def near(
        self,
        call: str,
        got: Any,
        truth: Truth,
        reference: Callable[[], Any] | None = None,
        room: float = 1.0,
        independent: bool = False,
    ) -> None:
        """``reference`` is the plain computation in the result's dtype, from which the budget is estimated,
        ``independent`` where it shares no code with the result, and ``room`` a factor of the allowance."""
        got = listed(got)
        if len(got) != len(truth.exact):
            raise Finding(call, f"{len(got)} outputs where there should be {len(truth.exact)}")
        if any(_is_beyond(value, exact) for value, exact in zip(got, truth.exact, strict=True)):
            return  # float16 ends at 65,504; the other outputs were computed from the same numbers
        draws: list[list[Any]] = []
        for i, (value, exact, wobble) in enumerate(zip(got, truth.exact, truth.wobble, strict=True)):
            if (value is None) != (exact is None):
                raise Finding(call, f"output {i} is {value if value is None else 'there'}")
            if value is None or exact is None:
                continue
            if value.shape != exact.shape:
                raise Finding(call, f"output {i} has shape {tuple(value.shape)}, not {tuple(exact.shape)}")
            error, size = _error(value, exact)
            eps = max(torch.finfo(value.dtype).eps, truth.eps)
            factor = _WRONG if eps < NO_BUDGET else _QUICK if eps < 1e-6 else _WRONG_HALF
            limit = room * factor * (wobble + eps * size)
            if error <= limit or not limit < float("inf") or limit > size / 8 > 0:
                continue  # the last: no result in this dtype has an accurate digit
            allowed = None
            if reference is not None and factor == _QUICK:
                draws = draws or _draws(reference, independent)
                error, allowed = _by_budget(value, exact, [draw[i].detach() for draw in draws], independent)
                allowed *= room
            if allowed is None or not error <= allowed:
                limit = limit if allowed is None else allowed
                raise Finding(call, f"output {i} is off by {error:.3g}, allowed are {limit:.3g} (truth {size:.3g})")
        self.calls[call] += 1

    def same(self, call: str, got: Any, expected: Any) -> None:
        """The same bits; NaN is NaN."""
        for i, (a, b) in enumerate(zip(listed(got), listed(expected), strict=True)):
            if not isinstance(b, Tensor):
                if a != b:
                    raise Finding(call, f"{a!r} is not {b!r}")
            elif a.dtype != b.dtype or a.shape != b.shape:
                raise Finding(call, f"output {i} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
            elif not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.nan_to_num(), b.nan_to_num()):
                raise Finding(call, f"output {i} has other bits, by up to {float((a - b).abs().max()):.3g}")
        self.calls[call] += 1

    def holds(self, call: str, condition: bool, what: str = "does not hold") -> None:
        if not condition:
            raise Finding(call, what)
        self.calls[call] += 1

    @contextlib.contextmanager
    def refuses(self, call: str, *names: str) -> Iterator[None]:
        """The call raises a ValueError or TypeError of linfast whose message contains one of these names."""
        try:
            yield
        except (ValueError, TypeError) as error:
            if names and not any(name in str(error) for name in names):
                raise Finding(call, f"{type(error).__name__} names none of {names}: {_short(error)}") from error
        except Exception as error:
            raise Finding(call, f"raises {type(error).__name__}: {_short(error)}") from error
        else:
            raise Finding(call, "was not refused")
        self.calls[call] += 1


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]


def _is_beyond(value: Any, exact: Any) -> bool:
    """Whether the truth is finite and larger than any number of the answer's dtype."""
    if not isinstance(value, Tensor) or not isinstance(exact, Tensor) or not exact.numel():
        return False
    return torch.finfo(value.dtype).max < float(exact.abs().max()) < float("inf")


def _error(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """(L2 of the difference, L2 of the truth), where the dtype can represent the truth and its square."""
    most = torch.finfo(value.dtype).max / 4
    exact = exact.detach().double()
    held = exact.isfinite() & (exact.abs() < most)
    wide = value.detach().double()
    error = torch.where(held, wide - exact, 0.0).norm()
    size = torch.where(held, exact, 0.0).norm()
    return float("inf") if bool(error.isnan()) else float(error), float(size)


def _draws(reference: Callable[[], Any], independent: bool) -> list[list[Any]]:
    """The plain computation with random rounding, and an independent one also unchanged: torch's gelu has no
    accurate digits in its tail, which rounding of its result does not reveal."""
    draws = [listed(rounding.drawn(reference, seed)) for seed in range(_DRAWS)]
    if independent:
        with plain_torch():
            draws.append(listed(reference()))
    return draws


def _by_budget(value: Tensor, exact: Tensor, draws: Sequence[Tensor], independent: bool) -> tuple[float, float]:
    """(error, allowance) in L2, over the elements that the plain reference can represent.

    Errors of the runs are measured from their mean where the reference runs the formula under test: a wrong formula
    would otherwise allow its own error.
    """
    values = torch.stack([draw.double() for draw in draws])
    held = values.isfinite().all(0) & exact.isfinite()
    kept, values = exact.double()[held], values[:, held]
    size = float(kept.norm()) or 1.0
    middle = kept if independent else values.mean(0)
    errors = [float((draw - middle).norm()) / size for draw in values]
    error = float((value.detach().double()[held] - kept).norm())
    return error, size * rounding.allowed_error(errors, value.dtype)
