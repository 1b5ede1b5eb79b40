"""The ops' kernels in Triton's interpreter (TRITON_INTERPRET=1 from the start), forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import linfast as lf

from . import ops
from .drawing import laid_out, recipe
from .judge import Judge

__all__ = ["RECIPES", "check"]

_FEWER = {
    **ops._FIELDS,
    "channels": st.integers(2, 9), "dtype": st.sampled_from(["float32", "float32", "float16"]),
    "positions": st.sampled_from([(), (3,), (2, 3)]), "depth": st.integers(1, 2),
    "hidden": st.lists(st.integers(1, 9), max_size=2).map(tuple),
}  # fmt: skip
RECIPES = recipe(**_FEWER)


def check(judge: Judge, r: dict[str, Any]) -> None:
    dtype = {"float32": torch.float32, "float16": torch.float16}[r["dtype"]]
    case = ops.make(r)
    narrow = [t.to(dtype) for t in case.tensors]
    narrow[0] = laid_out(narrow[0], r["layout"])
    narrow = [t.detach().requires_grad_() for t in narrow]
    with lf.backend("triton"):
        ops.held(judge, r, case, narrow, " kernel")
