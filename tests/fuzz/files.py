"""save and load: the same bits, the same numbers, and a clear error for damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import linfast as lf

from . import flows, linearizer, operators
from .drawing import DTYPES, drawn, recipe, scratch, seeds
from .judge import Judge

__all__ = ["RECIPES", "check"]

_WHAT = st.one_of(
    recipe(kind="flow", made=flows.FLOWS),
    recipe(kind="linearizer", made=linearizer.RECIPES),
    recipe(kind="operator", made=operators.OPERATORS),
)
RECIPES = recipe(
    what=_WHAT, dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]), frozen=st.booleans(),
            seed=seeds,
    damage=st.sampled_from(["cut", "byte", "header", "longer", "empty"]), place=st.floats(0, 1, width=16),
)  # fmt: skip
BATCH = 3


def _build(r: dict[str, Any]) -> tuple[nn.Module, tuple[int, ...], dict[str, Any]]:
    kind, made = r["what"]["kind"], r["what"]["made"]
    if kind == "flow":
        g, shape = flows.build(made)
        return g, shape, flows.context_of(made, BATCH, "rows", r["seed"])
    if kind == "linearizer":
        f = linearizer.build(made)
        context = flows.context_of(made["g_x"], BATCH, "rows", r["seed"])
        return f, (f.A.n_in,), {**context, **({"t": 0.25} if f.A.time_dependent else {})}
    A = operators.build(made, BATCH)
    return A, (A.n_in,), {}


def check(judge: Judge, r: dict[str, Any]) -> None:
    dtype = DTYPES[r["dtype"]]
    model, shape, context = _build(r)
    model = model.to(dtype)
    if r["frozen"]:
        for p in list(model.parameters())[::2]:
            p.requires_grad_(False)
    x, context = drawn(r["seed"], BATCH, *shape).to(dtype), flows.cast(context, dtype)
    with scratch() as folder:
        path = Path(folder) / "m.safetensors"
        lf.save(model, path)
        loaded = lf.load(path)
        judge.holds("load, structure", repr(loaded) == repr(model), "repr differs")
        judge.holds("load, mode", loaded.training == model.training, "training differs")
        before, after = model.state_dict(), loaded.state_dict()
        judge.holds("load, names", list(before) == list(after), "names differ")
        judge.same("load, tensors", list(after.values()), list(before.values()))
        grads = [[p.requires_grad for p in m.parameters()] for m in (model, loaded)]
        judge.holds("load, requires_grad", grads[0] == grads[1], "requires_grad differs")
        with torch.no_grad():
            judge.same("load, outputs", loaded(x, **context), model(x, **context))
            if isinstance(model, lf.Bijection):
                judge.same("load, inverse", loaded.inverse(x, **context), model.inverse(x, **context))  # type: ignore[operator]
        again = Path(folder) / "again.safetensors"
        lf.save(loaded, again)
        judge.holds("save, again", again.read_bytes() == path.read_bytes(), "another file")
        _damaged(judge, r, path, model, x, context)


def _damaged(judge: Judge, r: dict[str, Any], path: Path, model: nn.Module, x: Any, context: Any) -> None:
    """The file is refused, or it describes another model and loads as that."""
    data = bytearray(path.read_bytes())
    place = min(int(r["place"] * len(data)), len(data) - 1)
    header = 8 + int.from_bytes(data[:8], "little")
    if r["damage"] == "cut":
        data = data[:place]
    elif r["damage"] == "empty":
        data = bytearray()
    elif r["damage"] == "longer":
        data += b"x" * 9
    else:
        place = place if r["damage"] == "byte" else min(int(r["place"] * header), len(data) - 1)
        data[place] ^= 1 << r["seed"] % 8
    path.write_bytes(data)
    try:
        lf.load(path)
    except ValueError as error:
        judge.holds("load, damaged", str(path) in str(error) or len(str(error)) > 10, f"says only {error}")
    else:
        if r["damage"] in ("cut", "empty", "longer"):
            judge.holds("load, damaged", False, f"a file that is {r['damage']} was loaded")
        judge.calls["load, damaged"] += 1
