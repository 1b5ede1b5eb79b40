"""Compares one variant on machine code with float64: outputs and gradients, within the allowance for rounding."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from linfast.bench.rounding import allowed_errors, operand_rounding, relative_error
from torch import Tensor

import linfast as lf
from linfast.dispatch import plain_torch
from tests.machine_code.variants import DTYPES, Variant

__all__ = ["Result", "checked", "exact", "outputs_and_gradients", "values_of"]

_NOTHING = 2.0**-40  # a gradient this much smaller than the largest is zero up to the rounding of float64


@dataclass(frozen=True)
class Result:
    """The result of a variant: error and allowance of each output and then each gradient, and the reports."""

    op: str
    name: str
    dtype: str
    mode: str
    direction: str
    seconds: float
    errors: Sequence[float] = ()
    allowed: Sequence[float] = ()
    reports: Sequence[str] = field(default=())

    @property
    def margin(self) -> float:
        """The largest error over its allowance."""
        pairs = zip(self.errors, self.allowed, strict=True)
        return max((e / a if e == e else float("inf") for e, a in pairs), default=0.0)

    @property
    def passed(self) -> bool:
        return self.margin <= 1 and not self.reports

    def __str__(self) -> str:
        worst = max(range(len(self.errors)), key=lambda i: self.errors[i] / self.allowed[i], default=None)
        found = "" if worst is None else f"  output {worst}: {self.errors[worst]:.2e} of {self.allowed[worst]:.2e}"
        line = f"{'ok  ' if self.passed else 'FAIL'} {self.name}  {self.margin:.2f}{found}  {self.seconds:.1f} s"
        return "\n      ".join([line, *self.reports])


def checked(variant: Variant, launch: Any) -> Result:
    """The variant, run where ``ptx.launch`` is installed."""
    start = time.perf_counter()
    faults, notes = len(launch.STATISTICS.faults), launch.STATISTICS.notes.copy()
    errors: list[float] = []
    allowed: list[float] = []
    reports: list[str] = []
    try:
        with lf.backend("triton"), launch.poisoned():
            got = outputs_and_gradients(variant)
        errors, allowed = _compared(variant, values_of(variant), got)
    except Exception as error:  # a crash is a finding as well, and the other variants still run
        reports.append(f"{type(error).__name__}: {str(error)[:1000]}")
    reports += launch.STATISTICS.faults[faults:]
    reports += [f"note: {text}" for text in launch.STATISTICS.notes - notes]
    case, seconds = variant.case, time.perf_counter() - start
    return Result(
        case.op, variant.name, variant.dtype, variant.mode, variant.direction, seconds, errors, allowed, reports
    )


def outputs_and_gradients(variant: Variant, values: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The op's outputs on the current backend, and the gradients of its inputs for random cotangents."""
    return _outputs(variant, variant.case.call, _cast(variant, values_of(variant) if values is None else values))


def values_of(variant: Variant) -> list[Tensor]:
    """The inputs in fp32, the same at every call."""
    torch.manual_seed(zlib.crc32(variant.case.label.encode()))
    return variant.case.inputs()


def exact(variant: Variant, values: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """The same in float64, in plain torch, with zeros where there is only rounding; the norm of the largest."""
    call = _in_fp32(variant.case.call) if variant.case.x_alone else variant.case.call
    with plain_torch():
        truth = _outputs(variant, call, [_leaf(v.detach().double()) for v in _cast(variant, values)], "exact")
    size = max(float(t.norm()) for t in truth)
    return [t if float(t.norm()) > _NOTHING * size else torch.zeros_like(t) for t in truth], size


def _compared(variant: Variant, values: list[Tensor], got: list[Tensor]) -> tuple[list[float], list[float]]:
    """Each output's error and its allowance."""
    call = _in_fp32(variant.case.call) if variant.case.x_alone else variant.case.call
    truth, size = exact(variant, values)
    n_outputs = len(truth) - len(values) * variant.case.differentiated

    def allowances(half: torch.dtype) -> list[float]:
        return allowed_errors(
            lambda: _outputs(variant, call, _cast(variant, values), "exact"),
            truth,
            operands=operand_rounding(variant.mode, half) if variant.mode else None,
        )

    allowed = allowances(torch.bfloat16)
    if variant.dtype == "fp16" and variant.mode:  # products of gradients use bf16 even there
        allowed = [*allowances(torch.float16)[:n_outputs], *allowed[n_outputs:]]
    assert [t.shape for t in got] == [t.shape for t in truth]
    left = size * variant.case.cancels
    allowed = [
        a if t.any() else torch.finfo(g.dtype).eps * left for a, t, g in zip(allowed, truth, got, strict=True)
    ]
    return [relative_error(a, b) for a, b in zip(got, truth, strict=True)], allowed


def _in_fp32(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same with everything between x and y in at least fp32, as in the kernel."""

    def run(x: Tensor, *rest: Tensor, **options: Any) -> list[Tensor]:
        y, *others = call(x.to(torch.promote_types(x.dtype, torch.float32)), *rest, **options)
        return [y.to(x.dtype), *others]

    return run


def _cast(variant: Variant, values: Sequence[Tensor]) -> list[Tensor]:
    dtype = DTYPES[variant.dtype]
    return [_leaf(v.to(torch.float32 if variant.case.x_alone and i else dtype)) for i, v in enumerate(values)]


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _outputs(variant: Variant, call: Callable[..., Any], inputs: list[Tensor], mode: str = "") -> list[Tensor]:
    """The outputs of ``call``, and the gradient of every input for fixed random cotangents, where there are any."""
    options = variant.options | ({"precision": mode} if mode and variant.mode else {})
    outputs = [o for o in call(*inputs, **options) if o is not None]
    generator = torch.Generator().manual_seed(1)
    if not variant.case.differentiated:
        return outputs
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)
    return [*(o.detach() for o in outputs), *gradients]
