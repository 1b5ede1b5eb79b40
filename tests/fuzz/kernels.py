"""The ops' kernels, and flows and Linearizers on them, in Triton's interpreter, forward and backward.

TRITON_INTERPRET=1 must be set before anything is imported, so these kinds run in a separate process.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

import linfast as lf

from . import flows, linearizer, ops
from .drawing import DTYPES, laid_out, recipe
from .formulas import make
from .judge import Judge

__all__ = ["RECIPES", "check"]

_FEWER = {
    **ops.FIELDS,
    "channels": st.integers(2, 9), "dtype": st.sampled_from(["float32", "float32", "float16"]),
    "positions": st.sampled_from([(), (3,), (2, 3)]), "depth": st.integers(1, 2),
    "hidden": st.lists(st.integers(1, 9), max_size=2).map(tuple),
}  # fmt: skip
_FLOW = flows.RECIPES.filter(lambda r: r["flow"]["make"] != "image_flow").map(
    lambda r: {**r, "dtype": "float32", "batch": min(r["batch"], 3), "scale": 1.0}
)
_LINEARIZER = linearizer.RECIPES.map(lambda r: {**r, "dtype": "float32", "batch": min(r["batch"], 3)})
RECIPES = st.one_of(recipe(**_FEWER), _FLOW, _LINEARIZER)


def check(judge: Judge, r: dict[str, Any]) -> None:
    with lf.backend("triton"):
        if "flow" in r:
            return flows.check(judge, r)
        if "g_x" in r:
            return linearizer.check(judge, r)
        dtype = DTYPES[r["dtype"]]
        case = make(r)
        narrow = [t.to(dtype) for t in case.tensors]
        narrow[0] = laid_out(narrow[0], r["layout"])
        ops.held(judge, r, case, [t.detach().requires_grad_() for t in narrow], " kernel")
