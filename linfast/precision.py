"""The precision of products inside fused kernels: how operands are rounded. Sums are always fp32.

    mode    operands                                  relative error of a product
    exact   fp32, as three bf16 parts, six products   2^-24: fp32 accuracy
            in a stack's launch as two scaled fp16
            parts, three products                     2^-22, and a sum as accurate as in fp32
    high    fp32, as two bf16 parts, three products   2^-17
    tf32    tf32                                      2^-11
    fast    bf16 (fp16 where the input or autocast is) 2^-9

The scale of two fp16 parts is a power of two for each row of an operand, so that values of any size are
represented. A row's values that are 2^-28 of its largest, or smaller, lose digits; that shows only where the
weights of the large values are 2^-26 of the others or less (linfast/kernels/mlp.py). A stack's gradients have three
bf16 parts. Two parts of fp16 are scaled in every mode: in "high" for fp16 input, and in Triton's interpreter, which
has no bf16.

By default torch's own settings choose, read at every call:

    bf16 or fp16 input, or autocast to one   fast
    float32_matmul_precision "highest"       exact
    "high"                                   tf32 where torch.backends.cuda.matmul allows it, else high
    "medium"                                 fast

So tf32 is used only where it was requested: torch's default is "highest". Dynamo guards on whether tf32 is
allowed, but does not tell "high" from "medium": a graph compiled under one of the two keeps its mode under the
other. float64 is computed in float64 in every mode.
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
    """The mode for an op on x: ``requested``, by default that of the table above. ValueError if unknown."""
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
    """Inside the block, float32 products of torch and linfast keep full float32 precision, for comparing results.

    torch's settings belong to the process: meanwhile other threads compute in full precision too, and a second
    thread waits until the first has left its block. The settings are restored at the end, also after an exception.
    """
    backends: Any = torch.backends  # its type stubs lack these settings
    matmuls = (backends.cuda.matmul, backends.mkldnn.matmul)
    others = (backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv, backends.mkldnn.rnn)
    with _one_at_a_time, contextlib.ExitStack() as stack:
        # General settings first: a specific setting of "none" follows the general one, and is left as it is.
        before = {setting: setting.fp32_precision for setting in (backends, backends.cudnn, *matmuls, *others)}
        for setting, value in before.items():
            if setting.fp32_precision != "ieee":
                stack.callback(setattr, setting, "fp32_precision", value)
                setting.fp32_precision = "ieee"
        older = torch.get_float32_matmul_precision()  # readable now: torch's two interfaces agree
        if older != "highest":
            for setting in matmuls:  # set_float32_matmul_precision writes to them
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


def part_dtype(x: Tensor, precision: str) -> torch.dtype:
    """The type of an operand's parts: ``half_dtype`` in "fast", else bf16 for its range.

    In Triton's interpreter fp32, which means tf32, stands for bf16 outside "fast".
    """
    if precision == "fast":
        return half_dtype(x)
    return torch.float32 if interpreting() else torch.bfloat16
