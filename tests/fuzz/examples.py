"""Findings of the fuzzer: (kind, recipe) as printed, each corrected since."""

from __future__ import annotations

from typing import Any

__all__ = ["EXAMPLES", "FLOW", "STACK"]

STACK = {
    "op": "coupling_stack", "batch": 1, "channels": 2, "out": 1, "positions": (), "rank": 0, "scale_map": "exp",
    "order": "shift_first", "params": "halves", "moves": "first", "inverse": False, "flag": False, "other": False,
    "maps": "dense", "hidden": (), "depth": 1, "activation": "silu", "kernel": 1, "layout": "contiguous", "seed": 0,
    "dtype": "float16", "autocast": False,
}  # fmt: skip
FLOW = {
    "std": 0.05, "time_features": 0, "mix": "free", "context_features": 0, "hidden": (1, 9), "features": 4,
    "order": "shift_first", "actnorm": False, "coupling": "affine", "depth": 4, "activation": "silu", "seed": 0,
    "memory": "store", "make": "coupling_flow", "scale_map": None,
}  # fmt: skip
_GELU = {
    "flow": {
        "make": "coupling_flow", "depth": 4, "activation": "gelu", "features": 33, "std": 0.5,
        "hidden": (2, 1, 23), "order": "scale_first", "memory": "auto", "scale_map": "tanh",
        "actnorm": False, "context_features": 0, "seed": 10817, "coupling": "affine", "mix": "free",
        "time_features": 6,
    },
    "layout": "channels_last", "time": "rows", "requires_grad": False, "batch": 3, "scale": 1.0,
    "autocast": False, "dtype": "float32", "seed": 1281,
}  # fmt: skip

EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    # torch.linalg has no half precision, which slogdet and the inverse of a stack's dense map need.
    ("ops", STACK),
    ("ops", {**STACK, "inverse": True, "dtype": "bfloat16"}),
    ("ops", {**STACK, "op": "linearizer_stack", "channels": 6}),
    ("kernels", {**STACK, "inverse": True}),
    # The inverse map's bias was rounded to bf16 by autocast, and did not fit its weight.
    ("ops", {**STACK, "inverse": True, "dtype": "float32", "autocast": True}),
    # Weights were stacked for packing under autocast.
    (
        "kernels",
        {
            "flow": FLOW, "dtype": "float32", "batch": 1, "layout": "contiguous", "time": "number",
            "requires_grad": False, "autocast": True, "seed": 0, "scale": 1.0,
        },
    ),
    # A false alarm: torch's gelu and its gradient have no accurate digits in the tail.
    ("flows", _GELU),
]  # fmt: skip
