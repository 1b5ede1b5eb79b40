"""How far rebuilt tensors have strayed from the original ones, which are not kept.

Of a tensor X, as a matrix, K random projections p = R (X c) and the norm |X| are kept. The entries of R and c have
mean 0 and variance 1, so that an error E moves each projection by about |E|, and

    drift = |p' - p| / (sqrt(K) |X|)

estimates the relative L2 error, down to a few roundings, for one read of X.
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
    torch.float32: 1e-5,  # then within 20 times the stored gradients' own error, 4e-7 to 2e-6
    torch.float64: 2e-14,  # the same number of roundings
    torch.bfloat16: 2e-2,  # then about the stored gradients' own error, 5e-3 to 2e-2
    torch.float16: 2e-3,  # the same, 8e-4 to 2e-3
}

_PROJECTIONS = 4  # the chance that all four of a true drift d lie below d / 8 is 1 in 10000


def drift_budget(x: Tensor) -> float:
    """For a network on x: the budget of the dtype that it computes in, which is autocast's where that is on."""
    rounded = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
    return DRIFT_BUDGETS[x.dtype if rounded is None else rounded]


class Checksum:
    """K random projections of tensors that have as many elements as x, in fp32 or wider."""

    def __init__(self, x: Tensor) -> None:
        self._dtype = torch.promote_types(x.dtype, torch.float32)
        columns = x.shape[1] if x.ndim == 2 else x.shape[2:].numel()
        rows = x.numel() // columns
        self._c = _noise(columns, x.device).to(self._dtype)
        self._R = _noise(_PROJECTIONS * rows, x.device).to(self._dtype).reshape(_PROJECTIONS, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[K]"""
        return self._R @ (x.detach().to(self._dtype).reshape(-1, len(self._c)) @ self._c)

    def with_norm(self, x: Tensor) -> Tensor:
        """[K + 1]: what ``drift`` compares the projections of a rebuilt x with."""
        return torch.cat((self(x), torch.linalg.vector_norm(x, dtype=self._dtype)[None]))


def _noise(n: int, device: torch.device) -> Tensor:
    """[n] fixed numbers of mean 0, variance 1 and flat spectrum, a chirp's cosine: no generator is moved."""
    index = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    return math.sqrt(2) * torch.cos(math.sqrt(3) * index * index)


def drift(rebuilt: Tensor, kept: Tensor) -> Tensor:
    """[n] relative L2 errors by n tensors' projections, [n, K] and [n, K + 1]; 0 where kept is not finite."""
    moved = (rebuilt - kept[:, :-1]).norm(dim=1) / math.sqrt(_PROJECTIONS)
    relative = moved / kept[:, -1].clamp(min=torch.finfo(kept.dtype).tiny)
    return torch.where(kept.isfinite().all(dim=1), relative, 0.0)


class DriftWarning(RuntimeWarning):
    """Rebuilt activations strayed."""


class DriftGuard:
    """Holds rebuilt tensors to a budget. It warns once of drift, and once of a step that is stored.

    Nothing can be read while a CUDA graph is captured: a flag on the device keeps the worst of all its replays, and
    ``report`` reads it at the next call outside the graph. Copies of a guard are new ones.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.kept: dict[str, str | None] = {}  # step -> what it keeps from one run to the next, in words
        self._flag: Tensor | None = None  # 1 + the step that strayed, or 0; made ahead of any capture
        self._captured = False

    def __reduce__(self) -> tuple[type[DriftGuard], tuple[()]]:
        return DriftGuard, ()

    def strayed(self, rebuilt: Tensor, kept: Tensor, budget: float, names: Sequence[str]) -> bool:
        """Whether a rebuilt input is over budget; row i is step i's, and the last was rebuilt first.

        Reads the device once. Under capture it reads nothing and says no.
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
        """Warn of what the replays of captured graphs have flagged since the last call."""
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
        """Warn once that a step is stored for what it reads; RuntimeError where ``memory`` is "invert"."""
        reads = (
            f"{name} reads {what} from outside its arguments, parameters and context, and the gradient that this "
            "needs would be lost where activations are rebuilt"
        )
        if memory == "invert":
            raise RuntimeError(f"{reads}: pass it as context, make it a parameter, or use memory='store'")
        self.say("reads from outside", f"{reads}: it is stored, and so are the steps after it")

    def say(self, about: str, message: str, kind: type[Warning] = RuntimeWarning) -> None:
        """Warn once about each thing."""
        if about not in self._said:
            self._said.add(about)
            warnings.warn(message, kind, stacklevel=2)

    def _flag_on(self, device: torch.device) -> Tensor:
        if self._flag is None or self._flag.device != device:
            self._flag = torch.zeros((), dtype=torch.long, device=device)
        return self._flag
