"""The check before the clock: relative L2 error against float64, allowed by what rounding costs the reference.

For each output o of a call, with truth t in float64,

    error(o) = |o - t|_2 / |t|_2          (|o|_2 where t is zero)
    allowed  = of the eager reference's errors under the model of ``rounding``, over the inputs and its draws

Truth and reference run in plain torch whatever the backend is (``linfast.dispatch.plain_torch``): neither can be
the kernel under test. A provider is refused unless every output of every input is within its allowance, and
where that is 1 or more: zeros would pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from linfast.dispatch import plain_torch

from .rounding import DRAWS, allowed_error, drawn, relative_error

__all__ = ["Outputs", "Standard", "Verdict", "as_tuple", "judge", "own_standard", "set_standard"]

Outputs = Tensor | Sequence[Tensor]  # of a function that is compared


@dataclass(frozen=True)
class Verdict:
    """The error nearest to (or furthest past) its allowance, and why the provider is refused, if it is.

    ``first_s``: seconds of the first call, which compiles what is to be compiled.
    """

    error: float | None
    allowed: float | None
    refused: str | None
    first_s: float | None = None


@dataclass(frozen=True)
class Standard:
    """What is right: ``truth[i]``, the float64 outputs for input i, and ``allowed``, one error per output."""

    truth: Sequence[tuple[Tensor, ...]]
    allowed: Sequence[float]

    def verdict(self, index: int, outputs: tuple[Tensor, ...]) -> Verdict:
        """The verdict on a call's outputs for input ``index``."""
        truths = self.truth[index]
        if _shapes(outputs) != _shapes(truths):
            return Verdict(None, None, f"outputs of shapes {_shapes(outputs)}, where {_shapes(truths)} is right")
        verdicts = map(_verdict, map(relative_error, outputs, truths), self.allowed)
        return max(verdicts, key=_share)


def set_standard(
    truth: Callable[..., Outputs], reference: Callable[..., Outputs], inputs: Sequence[tuple[Tensor, ...]]
) -> Standard:
    """The float64 outputs for every input, and what rounding the reference allows.

    Raises:
        ValueError: the truth is not in float64, or the reference's outputs differ from it in number or shape.
    """
    truths = _truths(truth, inputs)
    errors = []
    for draw in range(max(DRAWS, len(inputs))):
        index = draw % len(inputs)
        outputs = as_tuple(drawn(partial(reference, *inputs[index]), draw))
        if _shapes(outputs) != _shapes(truths[index]):
            raise ValueError(f"reference outputs are {_shapes(outputs)}, the truth's {_shapes(truths[index])}")
        errors.append([relative_error(o, t) for o, t in zip(outputs, truths[index], strict=True)])
    allowed = [allowed_error(e, o.dtype) for e, o in zip(zip(*errors, strict=True), outputs, strict=True)]
    return Standard(truths, allowed)


def own_standard(truth: Callable[..., Outputs], inputs: Sequence[tuple[Tensor, ...]], allowed: float) -> Standard:
    """The standard of a provider with outputs of its own: its float64 outputs, one allowance for all.

    Raises:
        ValueError: the truth is not in float64.
    """
    truths = _truths(truth, inputs)
    return Standard(truths, [allowed] * len(truths[0]))


def _truths(truth: Callable[..., Outputs], inputs: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    with plain_torch():
        truths = [as_tuple(truth(*map(_double, arguments))) for arguments in inputs]
    if any(output.dtype != torch.float64 for output in truths[0]):
        raise ValueError(f"the truth must be in float64; got {[output.dtype for output in truths[0]]}")
    return truths


def judge(call: Callable[..., Outputs], inputs: Sequence[tuple[Tensor, ...]], standard: Standard) -> Verdict:
    """Run a provider on every input and judge what it returns; raising or writing to its inputs is wrong."""
    verdicts: list[Verdict] = []
    first_s = None
    for index, arguments in enumerate(inputs):
        given = [argument.clone() for argument in arguments]
        start = time.perf_counter()
        try:
            outputs = as_tuple(call(*given))
        except Exception as error:  # a provider that fails is a line in the table, not the end of the run
            return Verdict(None, None, f"it raised {type(error).__name__}: {_first_line(error)}")
        if first_s is None:
            _wait(arguments[0])
            first_s = time.perf_counter() - start
        if not all(map(torch.equal, given, arguments)):
            return Verdict(None, None, "it writes to its inputs")
        verdicts.append(standard.verdict(index, outputs))
        if verdicts[-1].refused is not None:
            break
    return replace(max(verdicts, key=_share), first_s=first_s)


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One tensor or several as a tuple, cut from the graph."""
    return tuple(o.detach() for o in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def _verdict(error: float, allowed: float) -> Verdict:
    within = error <= allowed < 1  # False where either is NaN
    reason = f"error {error:.2g}, allowed {allowed:.2g}" + (": zeros would pass" if allowed >= 1 else "")
    return Verdict(error, allowed, None if within else reason)


def _share(verdict: Verdict) -> tuple[bool, float]:
    """Refused above accepted, then by the share of the allowance that the error takes."""
    share = 0.0 if verdict.error is None or verdict.allowed is None else verdict.error / verdict.allowed
    return verdict.refused is not None, share


def _wait(tensor: Tensor) -> None:
    """Until the device has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
