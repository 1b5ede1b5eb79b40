"""collapse, sample, invert and streams against the steps one by one, with dense matrices in float64."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import linfast as lf
from linfast.dispatch import plain_torch
from linfast.sampling.outputs import NpyFile

from . import flows, operators
from .drawing import DTYPES, drawn, generator, moved, moved_model, perturbed, recipe, scratch, seeds
from .judge import Judge, Truth, moves_by
from .plain import plain_flow

__all__ = ["RECIPES", "check"]

_SMALL = recipe(
    make="coupling_flow", features=2, depth=st.integers(1, 2), hidden=st.sampled_from([(), (5,)]),
            activation="silu",
    coupling="affine", scale_map=None, order="shift_first", actnorm=st.booleans(),
    mix=st.sampled_from([None, "lu", "permute"]), memory="auto", std=0.1, seed=seeds, time_features=0,
            context_features=0,
)  # fmt: skip
RECIPES = recipe(
    g=_SMALL, features=st.sampled_from([2, 3, 5, 8, 16, 33]), shared=st.booleans(),
    core=st.sampled_from(["low rank", "diagonal", "conv", "sum", "product"]), rank=st.integers(1, 3),
    alpha=st.sampled_from([0.0, 1.0]), steps=st.integers(2, 12), method=st.sampled_from(["euler", "midpoint",
            "heun", "rk4"]),
    stop=st.sampled_from([None, None, 0.5, 0.9, 1.0]), tol=st.sampled_from([None, None, 1e-3]),
    dtype=st.sampled_from(["float32", "float64"]), batch=st.sampled_from([1, 2, 3, 0]),
    count=st.integers(1, 40), batch_size=st.integers(1, 40), block=st.integers(1, 17), stopped=st.integers(0, 6),
            seed=seeds,
)  # fmt: skip

# The tableaus from textbooks.
_STAGES = {
    "euler": ([[]], [1.0], [0.0]),
    "midpoint": ([[], [0.5]], [0.0, 1.0], [0.0, 0.5]),
    "heun": ([[], [1.0]], [0.5, 0.5], [0.0, 1.0]),
    "rk4": ([[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6], [0.0, 0.5, 0.5, 1.0]),
}


def _core(r: dict[str, Any]) -> nn.Module:
    n, rank = r["features"], min(r["rank"], r["features"])
    torch.manual_seed(r["seed"])
    A: Any = {
        "low rank": lambda: lf.TimeLowRank(n, rank, r["alpha"], 4, 5),
        "diagonal": lambda: lf.TimeDiagonal(n, rank, r["alpha"], 4, 5),
        "conv": lambda: lf.TimeDepthwiseConv(1, 2, (1, n), 4, (5,)),
        "sum": lambda: lf.TimeLowRank(n, rank, r["alpha"], 4, 5) + lf.Diagonal(n),
        "product": lambda: lf.Dense(n) @ lf.TimeDiagonal(n, rank, r["alpha"], 4, 5),
    }[r["core"]]()
    return perturbed(A, r["seed"], 0.02)


def _build(r: dict[str, Any]) -> lf.Linearizer:
    g_x, g_y = (flows.build({**r["g"], "features": r["features"], "seed": r["g"]["seed"] + i})[0] for i in range(2))
    return lf.Linearizer(g_x, _core(r), None if r["shared"] else g_y)  # type: ignore[arg-type]


def _collapsed(A: Any, r: dict[str, Any]) -> Tensor:
    """B, by applying every stage to the identity."""
    (a, b, c), n = _STAGES[r["method"]], r["features"]
    count, h = (r["steps"] - 1, 1 / r["steps"]) if r["stop"] is None else (r["steps"], r["stop"] / r["steps"])
    B = torch.eye(n, dtype=torch.float64)
    for i in range(count):
        slopes: list[Tensor] = []
        for row, at in zip(a, c, strict=True):
            t = (i + at) * h
            inner = B + h * sum((w * k for w, k in zip(row, slopes, strict=True)), torch.zeros_like(B))
            slopes.append((operators.matrix(A.at(t)) @ inner - inner) / (1 - t))
        B = B + h * sum((w * k for w, k in zip(b, slopes, strict=True)), torch.zeros_like(B))
    return B


def check(judge: Judge, r: dict[str, Any]) -> None:
    dtype = DTYPES[r["dtype"]]
    f = _build(r).to(dtype)
    how = {"steps": r["steps"], "method": r["method"], "stop": r["stop"]}
    if r["stop"] == 1.0 and r["method"] in ("heun", "rk4"):
        with judge.refuses("collapse at t = 1", "stop"):
            lf.collapse(f.A, **how)
        return
    wide, eps, random = copy.deepcopy(f).double(), torch.finfo(dtype).eps, generator(2)
    noise = drawn(r["seed"], r["batch"], r["features"]).to(dtype)
    y = drawn(r["seed"] + 1, r["batch"], r["features"]).to(dtype)

    def written_out(size: float) -> tuple[list[Tensor], list[Tensor]]:
        model = moved_model(wide, size, random)
        B = _collapsed(model.A, r)
        z = plain_flow(model.g_y, moved(noise.double(), size, random), False, {})[0]
        sample = plain_flow(model.g_x, z @ B.mT, True, {})[0]
        z = plain_flow(model.g_x, moved(y.double(), size, random), False, {})[0]
        back = plain_flow(model.g_y, torch.linalg.solve(B, z.mT).mT, True, {})[0]
        return [B.detach(), sample.detach(), back.detach()]

    with plain_torch(), torch.no_grad():
        values = [written_out(0.0), *(written_out(moves_by(eps)) for _ in range(2))]
    B, sample, back = (Truth.of(v[0], v[1:]) for v in zip(*values, strict=True))
    with torch.no_grad():
        judge.near("collapse", lf.collapse(f.A, **how).to_dense(), B, lambda: lf.collapse(f.A, **how).to_dense())
        if r["tol"] is not None:
            near = lf.collapse(f.A, **how, tol=r["tol"])
            off = float((near.to_dense().double() - B.exact[0]).norm() / B.exact[0].norm())
            judge.holds("collapse, tol", off <= r["tol"] * 1.001 + 100 * eps, f"off by {off:.3g}")
    for call, ask in (
        ("sample", lambda: lf.sample(f, noise, **how)),
        ("generator", lambda: lf.generator(f, **how)(noise)),
        ("sample, step by step", lambda: lf.sample(f, noise, **how, one_step=False)),
    ):
        judge.near(call, ask(), sample, ask)
    got, path = lf.sample(f, noise, **how, one_step=False, return_path=True)
    judge.near("sample, path", [got, path[-1]], Truth(sample.exact * 2, sample.wobble * 2))
    if torch.linalg.cond(B.exact[0]) < 1e3:
        judge.near("invert", lf.invert(f, y, **how), back, lambda: lf.invert(f, y, **how))
    _stream(judge, f, r, how)


class _Stopped(Exception):
    """Ends a run between two commits."""


@contextlib.contextmanager
def _stopping_after(commits: int) -> Iterator[None]:
    """Inside the block a file accepts this many commits. The next one raises, and the block catches the error."""
    commit, left = NpyFile.commit, itertools.count(commits, -1)

    def until(self: NpyFile, done: int) -> None:
        if next(left) <= 0:
            raise _Stopped
        commit(self, done)

    with mock.patch.object(NpyFile, "commit", until), contextlib.suppress(_Stopped):
        yield


def _stream(judge: Judge, f: lf.Linearizer, r: dict[str, Any], how: dict[str, Any]) -> None:
    count, size, block = r["count"], r["batch_size"], r["block"]
    options = {**how, "seed": r["seed"], "block_size": block, "progress": False}
    batches = list(lf.sample_stream(f, count, size, **options))
    whole = torch.cat(batches)
    judge.holds("sample_stream, batches", [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1))
    judge.holds("sample_stream, count", len(whole) == count)
    judge.same("sample_stream, other batches", torch.cat(list(lf.sample_stream(f, count, 7, **options))), whole)
    judge.same(
        "sample_stream, longer", torch.cat(list(lf.sample_stream(f, count + 3, size, **options)))[:count], whole
    )
    out = torch.empty_like(whole)
    judge.same("sample_stream, tensor", lf.sample_stream(f, count, size, out=out, **options), whole)
    array = np.empty(whole.shape, whole.numpy().dtype)
    judge.same(
        "sample_stream, array", torch.from_numpy(lf.sample_stream(f, count, size, out=array, **options)), whole
    )
    with torch.no_grad():
        model = lf.generator(f, **how)
    with scratch() as folder:
        path = Path(folder) / "a.npy"
        options = {"seed": r["seed"], "block_size": block, "progress": False, "noise_shape": (r["features"],)}
        with _stopping_after(r["stopped"]):
            lf.sample_stream(model, count, size, out=path, **options)
        rows = lf.sample_stream(model, count, size, out=path, **options)
        judge.same("sample_stream, resumed", torch.from_numpy(np.array(rows)), whole)
        with torch.no_grad():
            next(model.parameters()).add_(0.5)
        with judge.refuses("sample_stream, another model's file", "another run", "weights"):
            lf.sample_stream(model, count, size, out=path, **options)
