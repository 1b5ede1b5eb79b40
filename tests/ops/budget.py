"""Error budgets of kernels: float64 is the truth, the plain reference in the same dtype sets what is allowed.

    allowed = 2 * error(reference) + eps

The reference's error is the larger of two: autograd's through the plain function, and that
of the op's own plain forward and backward, which keeps the rounded output and not the input.
The second may cost some roundings more than the first; a wrong formula costs everything,
so it is held to within a factor of the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

import linfast as lf
from linfast.ops.register import RAW_OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does bfloat16 arithmetic on raw bits: that dtype is for real GPUs.
HALF_DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)

_OWN_FACTOR = 16

Call = Callable[..., Sequence[Tensor | None]]


def error(value: Tensor, truth: Tensor) -> float:
    """Relative L2 error; absolute where the truth is zero."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / (truth.norm() if truth.norm() > 0 else 1.0))


def assert_within_budget(call: Call, inputs: Sequence[Tensor]) -> None:
    """The kernel's error is within the budget above, output by output.

    ``call(*inputs)`` runs under backend "triton", then "reference", then "reference" in float64.
    """
    with lf.backend("triton"):
        got = call(*inputs)
        with _plain_raw_ops():
            raw = call(*inputs)
    with lf.backend("reference"):
        reference = call(*inputs)
        truth = call(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))
    for i, (value, own, plain, exact) in enumerate(zip(got, raw, reference, truth, strict=True)):
        assert (value is None) == (plain is None) == (exact is None)
        if value is None or own is None or plain is None or exact is None:
            continue
        assert value.shape == plain.shape
        assert value.dtype == plain.dtype
        eps = torch.finfo(value.dtype).eps
        assert error(own, exact) <= _OWN_FACTOR * (error(plain, exact) + eps), f"output {i}: own formula is wrong"
        allowed = 2 * max(error(plain, exact), error(own, exact)) + eps
        assert error(value, exact) <= allowed, f"output {i}: {error(value, exact):.2e} > {allowed:.2e}"


@contextlib.contextmanager
def _plain_raw_ops() -> Iterator[None]:
    """Every raw op runs its plain reference in place of its kernel."""
    by_launch = {op.launch: op.reference for op in RAW_OPS.values()}
    with mock.patch("linfast.ops.register._launcher", by_launch.__getitem__):
        yield


def hostile(x: Tensor) -> dict[str, Tensor]:
    """The same shape in other strides: values are x's, except that "expanded" repeats x's first row."""
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
