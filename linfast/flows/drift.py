"""Measures how far rebuilt tensors deviate from the original tensors, which are not stored.

Of a tensor X, as a matrix, K random projections p = R (X c) and the norm |X| are stored. R and c have entries of
mean 0 and variance 1, so an error E changes each projection by about |E|. With p' the projections of the rebuilt X,

    drift = |p' - p| / (sqrt(K) |X|)

estimates its relative L2 error, down to a few roundings, and costs one read of X.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import autocast_dtype, capturing

# Measured on stacks of 8 to 64 couplings: a drift of d adds about d / 2 to the gradients' relative error.
DRIFT_BUDGETS: dict[torch.dtype, float] = {
    torch.float32: 1e-5,  # gradients within 20 times their error by "store", 4e-7 to 2e-6
    torch.float64: 2e-14,  # as many roundings as in float32
    torch.bfloat16: 2e-2,  # gradients within about their error by "store", 5e-3 to 2e-2
    torch.float16: 2e-3,  # likewise, 8e-4 to 2e-3
}

_PROJECTIONS = 4  # of a true drift d, all four are below d / 8 with probability 1e-4


def drift_budget(x: Tensor) -> float:
    """The largest drift allowed to a network on x: that of autocast's dtype if autocast is on, else of x's."""
    rounded = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
    return DRIFT_BUDGETS[x.dtype if rounded is None else rounded]


class Checksum:
    """K random projections of tensors with the number of elements of x, in fp32 or wider."""

    def __init__(self, x: Tensor) -> None:
        self._dtype = torch.promote_types(x.dtype, torch.float32)
        columns = x.shape[1] if x.ndim == 2 else x.shape[2:].numel()
        rows = x.numel() // columns
        self._c = _noise(columns, x.device).to(self._dtype)
        self._R = _noise(_PROJECTIONS * rows, x.device).to(self._dtype).reshape(_PROJECTIONS, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """The projections [K] of x."""
        return self._R @ (x.detach().to(self._dtype).reshape(-1, len(self._c)) @ self._c)

    def with_norm(self, x: Tensor) -> Tensor:
        """The projections of the original x and its norm, [K + 1], for ``drift``."""
        return torch.cat((self(x), torch.linalg.vector_norm(x, dtype=self._dtype)[None]))


def _noise(n: int, device: torch.device) -> Tensor:
    """[n] fixed numbers of mean 0, variance 1 and flat spectrum, from a chirp: no generator advances."""
    index = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    return math.sqrt(2) * torch.cos(math.sqrt(3) * index * index)


def drift(rebuilt: Tensor, kept: Tensor) -> Tensor:
    """The drifts [n] of n tensors, from ``rebuilt`` [n, K] and ``kept`` [n, K + 1]; 0 where kept is not finite."""
    moved = (rebuilt - kept[:, :-1]).norm(dim=1) / math.sqrt(_PROJECTIONS)
    relative = moved / kept[:, -1].clamp(min=torch.finfo(kept.dtype).tiny)
    return torch.where(kept.isfinite().all(dim=1), relative, 0.0)


class DriftWarning(RuntimeWarning):
    """The drift of rebuilt activations is over budget."""


class DriftGuard:
    """Compares the drift of rebuilt tensors with a budget. Warns once of drift, and once of a step that is stored.

    The host can read nothing while a CUDA graph is captured: a flag on the device records drift in any replay, and
    ``report`` reads the flag at the next call outside the graph. A copy of a guard has its initial state.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.kept: dict[str, str | None] = {}  # step -> the tensor that it caches between runs, in words
        self._flag: Tensor | None = None  # 1 + index of the step over budget, or 0; made before a capture
        self._captured = False

    def __reduce__(self) -> tuple[type[DriftGuard], tuple[()]]:
        return DriftGuard, ()

    def strayed(self, rebuilt: Tensor, kept: Tensor, budget: float, names: Sequence[str]) -> bool:
        """Whether the drift of a step's input is over budget; row i is step i's, and the last was rebuilt first.

        It waits for the device once. During a capture it reads nothing and returns False.
        """
        errors = drift(rebuilt, kept)
        over = ~(errors <= budget)
        first = (over * torch.arange(1, len(names) + 1, device=over.device)).amax()
        if capturing(rebuilt):
            flag = self._flag_on(rebuilt.device)
            flag.copy_(torch.maximum(flag, first))
            self._captured = True
            return False
        index = int(first) - 1
        if index < 0:
            return False
        self.say(
            "drift",
            f"rebuilding activations strayed at {names[index]}: its input is {float(errors[index]):.1e} off, "
            f"over the budget of {budget:.0e}. This backward, and any later one like it, is redone from the "
            "chain's input with checkpoints: right but slower. Bound the log-scales, or use memory='store'.",
            DriftWarning,
        )
        return True

    def report(self, x: Tensor, names: Sequence[str]) -> None:
        """Warn of drift that replays of captured graphs have flagged since the last call."""
        if capturing(x):
            return
        flag = self._flag_on(x.device)
        if self._captured and (index := int(flag) - 1) >= 0:
            flag.zero_()
            self.say(
                "drift",
                f"in a captured CUDA graph, rebuilding activations strayed at {names[index]}; the gradients of "
                "those replays are wrong. Capture with memory='store'.",
                DriftWarning,
            )

    def stores(self, name: str, what: str, memory: str) -> None:
        """Warn once that a step is stored because it reads ``what``; RuntimeError if ``memory`` is "invert"."""
        reads = (
            f"{name} reads {what} from outside its arguments, parameters and context, and its gradient would be "
            "lost where activations are rebuilt"
        )
        if memory == "invert":
            raise RuntimeError(f"{reads}: pass it as context, make it a parameter, or use memory='store'")
        self.say("reads from outside", f"{reads}: it is stored, and so are the steps after it")

    def say(self, about: str, message: str, kind: type[Warning] = RuntimeWarning) -> None:
        """Warn, unless there was a warning about ``about`` before."""
        if about not in self._said:
            self._said.add(about)
            warnings.warn(message, kind, stacklevel=2)

    def _flag_on(self, device: torch.device) -> Tensor:
        if self._flag is None or self._flag.device != device:
            self._flag = torch.zeros((), dtype=torch.long, device=device)
        return self._flag
