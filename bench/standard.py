"""Whether a provider's outputs are right: the standard that it is judged by, and the verdict.

For each output o of a call, with truth t in float64,

    error(o) = |o - t|_2 / |t|_2          (|o|_2 where t is zero)
    allowed  = the error of the eager reference under the model in ``rounding``, over inputs and draws

Truth and reference run in plain torch whatever the backend is: neither can be the kernel under test. A provider is
refused unless each output for each input is within its allowance and that is below 1; otherwise zeros would pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .rounding import DRAWS, allowed_error, drawn, plain_torch, relative_error
from .timing import Outputs, as_tuple


@dataclass(frozen=True)
class Verdict:
    """The error nearest to (or furthest past) its allowance, and why the provider is refused, if it is.

    ``first_s``: seconds of the first call, compilation included.
    """

    error: float | None
    allowed: float | None
    refused: str | None
    first_s: float | None = None

    @property
    def rank(self) -> tuple[bool, float]:
        """Refused above accepted, then by the share of the allowance that the error takes."""
        share = 0.0 if self.error is None or self.allowed is None else self.error / self.allowed
        return self.refused is not None, share


@dataclass(frozen=True)
class Standard:
    """The right outputs ``truth[i]`` for input i, in float64, and ``allowed``, one relative error per output."""

    truth: Sequence[tuple[Tensor, ...]]
    allowed: Sequence[float]

    def verdict(self, index: int, outputs: tuple[Tensor, ...]) -> Verdict:
        """The verdict on a call's outputs for input ``index``."""
        if (got := _shapes(outputs)) != (right := _shapes(self.truth[index])):
            return Verdict(None, None, f"outputs of shapes {got}, where {right} is right")
        verdicts = []
        for error, allowed in zip(map(relative_error, outputs, self.truth[index]), self.allowed, strict=True):
            within = error <= allowed < 1  # False where either is NaN
            reason = f"error {error:.2g}, allowed {allowed:.2g}" + (": zeros would pass" if allowed >= 1 else "")
            verdicts.append(Verdict(error, allowed, None if within else reason))
        return max(verdicts, key=lambda verdict: verdict.rank)


def own_standard(truth: Callable[..., Outputs], inputs: Sequence[tuple[Tensor, ...]], allowed: float) -> Standard:
    """The standard with the outputs of ``truth`` in float64, and the same allowance for every output.

    Raises:
        ValueError: the truth is not in float64.
    """
    with plain_torch():
        truths = [as_tuple(truth(*(t.double() if t.is_floating_point() else t for t in given))) for given in inputs]
    if any(output.dtype != torch.float64 for output in truths[0]):
        raise ValueError(f"the truth must be in float64; got {[output.dtype for output in truths[0]]}")
    return Standard(truths, [allowed] * len(truths[0]))


def judge(call: Callable[..., Outputs], inputs: Sequence[tuple[Tensor, ...]], standard: Standard) -> Verdict:
    """The verdict on a provider, run on every input; it is refused if it raises or writes to its inputs."""
    verdicts: list[Verdict] = []
    first_s = None
    for index, arguments in enumerate(inputs):
        given = [argument.clone() for argument in arguments]
        start = time.perf_counter()
        try:
            outputs = as_tuple(call(*given))
        except Exception as error:  # a provider that fails is a line in the table, not the end of the run
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            return Verdict(None, None, f"it raised {type(error).__name__}: {first_line}")
        if first_s is None:
            if arguments[0].is_cuda:
                torch.cuda.synchronize(arguments[0].device)
            first_s = time.perf_counter() - start
        if not all(map(torch.equal, given, arguments)):
            return Verdict(None, None, "it writes to its inputs")
        verdicts.append(standard.verdict(index, outputs))
        if verdicts[-1].refused is not None:
            break
    return replace(max(verdicts, key=lambda verdict: verdict.rank), first_s=first_s)


def reference_errors(
    reference: Callable[..., Outputs], inputs: Sequence[tuple[Tensor, ...]], truth: Sequence[tuple[Tensor, ...]]
) -> list[float]:
    """The allowance of each output, from draws of the reference's rounding error over all inputs."""
    errors = []
    for draw in range(max(DRAWS, len(inputs))):
        exact = truth[draw % len(inputs)]
        outputs = as_tuple(drawn(partial(reference, *inputs[draw % len(inputs)]), draw))
        if _shapes(outputs) != _shapes(exact):
            raise ValueError(f"reference outputs are {_shapes(outputs)}, the truth's {_shapes(exact)}")
        errors.append(list(map(relative_error, outputs, exact)))
    return [allowed_error(e, o.dtype) for e, o in zip(zip(*errors, strict=True), outputs, strict=True)]


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]
