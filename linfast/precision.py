"""The precision of products inside fused kernels: how operands are rounded. Sums are always fp32.

    mode    operands                                  relative error of a product
    exact   fp32, as three bf16 parts, six products   2^-24: fp32 accuracy
    high    fp32, as two bf16 parts, three products   2^-17
    tf32    tf32                                      2^-11
    fast    bf16 (fp16 where the input or autocast is) 2^-9

By default torch's own settings choose, read at every call:

    bf16 or fp16 input, or autocast to one   fast
    float32_matmul_precision "highest"       exact
    "high"                                   tf32 where torch.backends.cuda.matmul allows it, else high
    "medium"                                 fast

so that tf32 is on only where it was asked for: torch's default is "highest". Dynamo guards on whether tf32 is
allowed and not on "high" against "medium": a graph compiled under one of those two keeps its mode under the
other. float64 is computed in float64 whatever the mode.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice
from .dispatch import autocast_dtype, interpreting, matmul_mode

PRECISIONS = ("exact", "high", "tf32", "fast")
_HALF_DTYPES = (torch.float16, torch.bfloat16)


def resolve_precision(x: Tensor, requested: str | None = None) -> str:
    """The mode for an op on x: the one requested, otherwise the table's above."""
    if requested is not None:
        check_choice("precision", requested, PRECISIONS)
        return requested
    if x.dtype == torch.float64:
        return "exact"
    if x.dtype in _HALF_DTYPES or autocast_dtype(x.device.type) in _HALF_DTYPES:
        return "fast"
    return matmul_mode()


_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside the block torch's float32 products and ours are not rounded to less: for comparing two computations.

    torch's settings belong to the process: other threads compute in full precision meanwhile, and a second thread's
    block waits for the first one's end. The settings are restored at the end, also after an exception.
    """
    backends: Any = torch.backends  # whose stubs do not know of these settings
    matmuls = (backends.cuda.matmul, backends.mkldnn.matmul)
    others = (backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv, backends.mkldnn.rnn)
    with _one_at_a_time, contextlib.ExitStack() as stack:
        # The wide ones first: a narrow one that is "none" follows them, and goes on doing so.
        before = {setting: setting.fp32_precision for setting in (backends, backends.cudnn, *matmuls, *others)}
        for setting, value in before.items():
            if setting.fp32_precision != "ieee":
                stack.callback(setattr, setting, "fp32_precision", value)
                setting.fp32_precision = "ieee"
        older = torch.get_float32_matmul_precision()  # can be read: nothing contradicts it any more
        if older != "highest":
            for setting in matmuls:  # which the older interface writes to
                stack.callback(setattr, setting, "fp32_precision", before[setting])
            stack.callback(torch.set_float32_matmul_precision, older)
            torch.set_float32_matmul_precision("highest")
        yield


def half_dtype(x: Tensor) -> torch.dtype:
    """The half type that "fast" rounds operands to: bf16, or fp16 where x or autocast is.

    Triton's interpreter computes on bf16's raw bits; there fp16 is used instead.
    """
    fp16 = torch.float16 in (x.dtype, autocast_dtype(x.device.type)) or interpreting()
    return torch.float16 if fp16 else torch.bfloat16
