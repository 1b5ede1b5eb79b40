"""Error budgets of kernels: float64 is the truth, and a model of rounding sets the allowance.

The plain reference is run in the test's dtypes under ``linfast.bench.rounding``, several
times: errors of that size are allowed, whatever this machine's BLAS does. The op's
plain forward and backward, which keep other tensors than autograd does, get the same allowance
with every operation rounded to nearest, so that only a wrong formula exceeds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
import triton
from linfast.bench.rounding import Rounding, allowed_errors
from linfast.bench.rounding import relative_error as error
from torch import Tensor

import linfast as lf
from linfast.ops.register import RAW_OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Whether kernels run as machine code, on a GPU or in tests.machine_code, and not in Triton's interpreter.
COMPILED = not triton.knobs.runtime.interpret
# The interpreter does bfloat16 arithmetic on raw bits.
HALF_DTYPES = (torch.float16, torch.bfloat16) if COMPILED else (torch.float16,)

Outputs = Sequence[Tensor | None]
Call = Callable[..., Outputs]


def assert_within_budget(
    call: Call, inputs: Sequence[Tensor], operands: Callable[[Tensor], Tensor] | None = None
) -> None:
    """The errors of the kernel and of the op's plain form are within the budget, for each output.

    ``call(*inputs)`` runs under backend "triton", then "reference", then "reference" in float64. ``operands``
    rounds the operands of products as the mode does, in the reference of the budget.
    """
    with lf.backend("triton"):
        got = call(*inputs)
        with _plain_raw_ops():
            own = call(*inputs)
    with lf.backend("reference"):
        truth = call(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))
        plain = call(*inputs)
        assert [_kind(o) for o in got] == [_kind(o) for o in plain]
        allowed = allowed_errors(lambda: call(*inputs), truth, operands=operands)
    assert_within(own, truth, allowed, "the op's own plain form")
    assert_within(got, truth, allowed, "the kernel")


def assert_accurate(got: Outputs, reference: Callable[[], Outputs], truth: Outputs) -> None:
    """Every output's error is within the rounding of ``reference``, plain torch in the dtypes of ``got``."""
    assert_within(got, truth, allowed_errors(reference, truth))


def assert_within(got: Outputs, truth: Outputs, allowed: Sequence[float], what: str = "the call") -> None:
    """Every output has the truth's shape, and its error is at most its allowance."""
    for i, (value, exact, limit) in enumerate(zip(got, truth, allowed, strict=True)):
        assert (value is None) == (exact is None)
        if value is not None and exact is not None:
            assert value.shape == exact.shape
            found = error(value, exact)
            assert found <= limit, f"output {i} of {what}: {found:.2e} > {limit:.2e}"


def _kind(output: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if output is None else (output.shape, output.dtype)


@contextlib.contextmanager
def _plain_raw_ops() -> Iterator[None]:
    """Every raw op runs its plain reference in place of its kernel, with each operation rounded to nearest."""
    by_launch = {op.launch: _rounded(op.reference) for op in RAW_OPS.values()}
    with mock.patch("linfast.ops.register._launcher", by_launch.__getitem__):
        yield


def _rounded(reference: Callable[..., object]) -> Callable[..., object]:
    def run(*arguments: object) -> object:
        with Rounding():
            return reference(*arguments)

    return run


def hostile(x: Tensor) -> dict[str, Tensor]:
    """x with other strides and the same values, except that "expanded" repeats its first row."""
    padded = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    padded[..., ::2] = x
    wide = torch.cat((x.new_full(x.shape, float("nan")), x, x), dim=1)
    layouts = {
        "contiguous": x.contiguous(),
        "every other": padded[..., ::2],
        "batch innermost": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "half of a chunk": wide[:, x.shape[1] : 2 * x.shape[1]],
        "expanded": x[:1].expand(x.shape),
    }
    if x.ndim == 4:
        layouts["transposed"] = x.transpose(2, 3).contiguous().transpose(2, 3)
        layouts["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    return layouts
