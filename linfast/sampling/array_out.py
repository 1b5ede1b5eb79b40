"""An array or a tensor in memory that samples are written into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .workers import Workers

__all__ = ["ArrayOut"]


@dataclass(frozen=True)
class ArrayOut:
    out: np.ndarray | Tensor
    done: int = 0

    @classmethod
    def of(cls, out: np.ndarray | Tensor, count: int, sample: Tensor, workers: Workers) -> ArrayOut:
        """A dense ``out`` of ``count`` rows like this sample.

        Raises:
            ValueError: it does not fit, or cannot be written to.
        """
        if workers.count > 1:
            raise ValueError("out must be a path or None under torch.distributed: processes share no array")
        want = sample.numpy().dtype if isinstance(out, np.ndarray) else sample.dtype
        if tuple(out.shape) != (count, *sample.shape) or out.dtype != want:
            raise ValueError(
                f"out must be {(count, *sample.shape)} of {want}; got {tuple(out.shape)} of {out.dtype}"
            )
        if reason := _unusable(out):
            raise ValueError(f"out cannot be written to: it {reason}")
        return cls(out)

    def write(self, start: int, rows: Tensor) -> None:
        if isinstance(self.out, np.ndarray):
            self.out[start : start + len(rows)] = rows.numpy()
        else:
            self.out[start : start + len(rows)] = rows

    def commit(self, done: int) -> None:
        """Nothing outlives the process."""


def _unusable(out: np.ndarray | Tensor) -> str:
    """Why rows cannot be put in; nothing where they can."""
    if isinstance(out, np.ndarray):
        strides, apart = out.strides, out.itemsize
        if not out.flags.writeable:
            return "is read-only"
    else:
        if out.is_inference() and not torch.is_inference_mode_enabled():
            return "was made in torch.inference_mode()"
        strides, apart = out.stride(), 1
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(strides, out.shape, strict=True) if size > 1
    ):
        if stride < apart:
            return "overlaps itself in memory; make a copy"
        apart += stride * (size - 1)
    return ""
