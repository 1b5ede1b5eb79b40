"""The ops in plain torch, forward and backward, against formulas in float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from linfast.scale_maps import SCALE_MAP_KINDS

from .drawing import DTYPES, LAYOUTS, cotangent, generator, laid_out, moved, recipe, seeds
from .formulas import OPS, Case, make
from .judge import Judge, listed, truth_of

__all__ = ["FIELDS", "RECIPES", "check", "held"]

FIELDS = {
    "op": st.sampled_from(OPS), "batch": st.sampled_from([1, 2, 3, 5, 0]), "channels": st.integers(2, 12),
    "out": st.integers(1, 9), "positions": st.sampled_from([(), (1,), (3,), (2, 3), (5, 4)]),
    "rank": st.integers(0, 4), "scale_map": st.sampled_from(SCALE_MAP_KINDS),
    "order": st.sampled_from(["shift_first", "scale_first"]), "params": st.sampled_from(["halves", "interleaved"]),
    "moves": st.sampled_from(["first", "second"]), "maps": st.sampled_from(["none", "dense", "diagonal"]),
    "inverse": st.booleans(), "flag": st.booleans(), "other": st.booleans(), "autocast": st.booleans(),
    "hidden": st.lists(st.integers(1, 20), max_size=2).map(tuple), "depth": st.integers(1, 3),
    "activation": st.sampled_from(["silu", "relu", "tanh", "gelu"]), "kernel": st.sampled_from([1, 3]),
    "layout": st.sampled_from(LAYOUTS), "seed": seeds,
    "dtype": st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
}  # fmt: skip
RECIPES = recipe(**FIELDS)


def check(judge: Judge, r: dict[str, Any]) -> None:
    dtype = DTYPES[r["dtype"]]
    case = make(r)
    narrow = [t.to(dtype) for t in case.tensors]
    narrow[0] = laid_out(narrow[0], r["layout"])
    narrow = [t.detach().requires_grad_() for t in narrow]
    held(judge, r, case, narrow, "")
    if r["autocast"] and dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            held(judge, r, case, narrow, " in autocast", torch.bfloat16)
    if r["batch"] > 2 and r["op"] not in ("latent_matmul",):
        _spoilt(judge, r, case, narrow)


def held(
    judge: Judge,
    r: dict[str, Any],
    case: Case,
    narrow: list[Tensor],
    where: str,
    precision: torch.dtype | None = None,
) -> None:
    """Compare the call on these tensors and its gradients, in ``precision``, with the formula in float64."""
    eps = torch.finfo(precision or narrow[0].dtype).eps

    def exact(size: float, gradients: bool) -> Any:
        random = generator(8)
        wide = [moved(t.detach().double(), size, random).requires_grad_() for t in narrow]
        with torch.autocast("cpu", enabled=False):
            outputs = listed(case.formula(*wide))
        return _gradients(outputs, wide) if gradients else outputs

    def call() -> Any:
        return listed(case.call(*narrow))

    def gradients() -> Any:
        return _gradients(call(), narrow)

    judge.near(f"{r['op']}{where}", call(), truth_of(lambda size: exact(size, False), eps), call)
    if r["batch"] and not (eps > 1e-6 and _kinked(r)):
        truth = truth_of(lambda size: exact(size, True), eps)
        judge.near(f"{r['op']}{where} backward", gradients(), truth, gradients)


def _kinked(r: dict[str, Any]) -> bool:
    """Whether its gradient has jumps, which one rounding of half precision may cross."""
    stack = r["op"] in ("coupling_stack", "mlp_coupling", "linearizer_stack")
    return r["scale_map"] in ("clamp", "softplus") or (stack and r["activation"] == "relu")


def _gradients(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    given = [o for o in outputs if o.requires_grad]
    found = torch.autograd.grad(given, wanted, [cotangent(o) for o in given], allow_unused=True)
    return [torch.zeros_like(w) if f is None else f for f, w in zip(found, wanted, strict=True)]


def _spoilt(judge: Judge, r: dict[str, Any], case: Case, narrow: list[Tensor]) -> None:
    clean = narrow[0].detach().clone(memory_format=torch.contiguous_format)
    spoilt = clean.clone()
    spoilt[1] = float("nan")
    keep = [i for i in range(r["batch"]) if i != 1]
    with torch.no_grad():
        got, expected = (listed(case.call(x, *narrow[1:])) for x in (spoilt, clean))
    judge.same(f"{r['op']}, a row that is not finite", [v[keep] for v in got], [v[keep] for v in expected])
