"""Linearizers and induced spaces against flows written out and dense matrices, in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import linfast as lf
from linfast.dispatch import plain_torch

from . import flows, operators
from .drawing import DTYPES, LAYOUTS, drawn, generator, laid_out, moved, moved_model, perturbed, recipe, seeds
from .judge import Judge, Truth, moves_by
from .plain import plain_flow

__all__ = ["RECIPES", "check"]

_FLOW = {
    "depth": st.integers(1, 3), "hidden": st.lists(st.integers(1, 9), max_size=2).map(tuple),
    "activation": st.sampled_from(["silu", "relu", "tanh", "gelu"]), "coupling": st.sampled_from(["affine",
            "additive"]),
    "scale_map": st.sampled_from([None, "tanh", "sigmoid"]), "order": st.sampled_from(["shift_first",
            "scale_first"]),
    "actnorm": st.booleans(), "mix": st.sampled_from([None, "lu", "free", "householder", "permute"]),
    "memory": st.sampled_from(["store", "invert"]), "std": st.sampled_from([0.05, 0.2]), "seed": seeds,
    "time_features": 0, "context_features": st.sampled_from([0, 0, 2]),
}  # fmt: skip


@st.composite
def _recipes(draw: Any) -> dict[str, Any]:
    n = draw(st.sampled_from([2, 3, 4, 5, 6, 8, 9, 12, 17, 33, 64, 70]))
    m = draw(st.sampled_from([n, n, n, 4]))
    shared = m == n and draw(st.booleans())
    of = {"make": "coupling_flow", **_FLOW}
    g_x = draw(recipe(features=n, **of))
    g_y = None if shared else {**draw(recipe(features=m, **of)), "context_features": g_x["context_features"]}
    kinds = ["dense", "low_rank_zero"]
    if m == n:
        kinds += ["diagonal", "low_rank", "conv", "projection", "timed low rank", "timed diagonal", "tree"]
    A = draw(st.sampled_from(kinds))
    if A == "tree" and n > 33:
        A = "dense"
    tree = (
        draw(operators._tree(m, n, 2, False))
        if A == "tree"
        else (A, m, n, draw(st.integers(1, 3)), False, draw(seeds))
    )
    rest = recipe(
        dtype=st.sampled_from(["float32", "float64"]), batch=st.sampled_from([1, 2, 3, 5, 0]),
        layout=st.sampled_from(LAYOUTS[:5]), seed=seeds, t=st.sampled_from(["number", "0-d", "rows"]),
    )  # fmt: skip
    return {"g_x": g_x, "A": tree, "g_y": g_y, **draw(rest)}


RECIPES = _recipes()


def _operator(tree: tuple[Any, ...]) -> lf.LatentOperator:
    kind, n, _, rank, *_, seed = tree if tree[0].startswith("timed") else ("", 0, 0, 0, 0)
    if not kind:
        return operators.build(tree, 0)
    torch.manual_seed(seed)
    if kind == "timed diagonal":
        return perturbed(lf.TimeDiagonal(n, min(rank, n), 1.0, 4, 5), seed, 0.02)  # type: ignore[return-value]
    return perturbed(lf.TimeLowRank(n, rank, float(seed % 2), 4, 5), seed, 0.02)  # type: ignore[return-value]


def build(recipe_: dict[str, Any]) -> lf.Linearizer:
    """f in float64."""
    g_x, _ = flows.build(recipe_["g_x"])
    g_y = flows.build(recipe_["g_y"])[0] if recipe_["g_y"] else None
    return lf.Linearizer(g_x, _operator(recipe_["A"]), g_y)


class _Plain:
    """f and its spaces written out, with everything changed by ``size``, relative."""

    def __init__(self, f: lf.Linearizer, context: dict[str, Any], t: Any, size: float, random: Any) -> None:
        moved_f = moved_model(f, size, random)
        self.g_x, self.g_y = moved_f.g_x, moved_f.g_y
        self.context = {k: moved(v.double(), size, random) for k, v in context.items()}
        A = moved_f.A if t is None else moved_f.A.at(t)
        self.M = operators.matrix(A).detach()
        self.size, self.random = size, random
        self.latents: dict[tuple[int, str], Tensor] = {}

    def put(self, x: Tensor, side: str = "x") -> Tensor:
        if (id(x), side) not in self.latents:
            g, x_moved = (self.g_x if side == "x" else self.g_y), moved(x.detach().double(), self.size, self.random)
            self.latents[id(x), side] = plain_flow(g, x_moved, False, self.context)[0].detach()
        return self.latents[id(x), side]

    def take(self, z: Tensor, side: str = "x") -> Tensor:
        return plain_flow(self.g_x if side == "x" else self.g_y, z, True, self.context)[0].detach()

    def apply(self, M: Tensor, z: Tensor) -> Tensor:
        return (M @ z[..., None])[..., 0]


def check(judge: Judge, drawn_: dict[str, Any]) -> None:
    batch, dtype = drawn_["batch"], DTYPES[drawn_["dtype"]]
    f = build(drawn_).to(dtype)
    wide = copy.deepcopy(f).double()
    eps = torch.finfo(dtype).eps
    context = flows.cast(flows.context_of(drawn_["g_x"], batch, "rows", drawn_["seed"]), dtype)
    t = _time(f, drawn_, batch, dtype)
    timed = {} if t is None else {"t": t}

    wide_t, random = t.double() if isinstance(t, Tensor) else t, generator(6)
    plains = [_Plain(wide, context, wide_t, size, random) for size in (0.0, moves_by(eps), moves_by(eps))]

    def truth(of: Any) -> Truth:
        with plain_torch(), torch.no_grad():
            return Truth.of(of(plains[0]), [of(p) for p in plains[1:]], eps)

    x = laid_out(drawn(drawn_["seed"], batch, f.A.n_in).to(dtype), drawn_["layout"])
    u = drawn(drawn_["seed"] + 1, batch, f.A.n_in).to(dtype)
    y = drawn(drawn_["seed"] + 2, batch, f.A.n_out).to(dtype)

    def near(call: str, ask: Any, of: Any) -> None:
        judge.near(call, ask(), truth(of), ask)

    def image(p: _Plain) -> Tensor:
        return p.take(p.apply(p.M, p.put(x)), "y")

    expected = truth(image)
    for call, ask in (
        ("f(x)", lambda: f(x, **timed, **context)),
        ("f.gy_inverse(f.A(f.gx(x)))", lambda: f.gy_inverse(f.A(f.gx(x, **context), **timed), **context)),
    ):
        judge.near(call, ask(), expected, ask)
    with torch.no_grad(), lf.freeze(f):
        for _ in range(2):
            judge.near("frozen f(x)", f(x, **timed, **context), expected, lambda: f(x, **timed, **context))
    if batch > 1 and not (isinstance(t, Tensor) and t.ndim):
        one = {k: v[:1] for k, v in context.items()}
        judge.near(
            "f, one row", f(x[:1], **timed, **one), expected.rows(slice(0, 1)), lambda: f(x[:1], **timed, **one)
        )
    fixed = f if t is None else f.at(t)
    near("f.T(y)", lambda: fixed.T(y, **context), lambda p: p.take(p.apply(p.M.mT, p.put(y, "y"))))
    near("(2 f)(x)", lambda: (2 * fixed)(x, **context), lambda p: p.take(p.apply(2 * p.M, p.put(x)), "y"))
    near("(f + f)(x)", lambda: (fixed + fixed)(x, **context), lambda p: p.take(p.apply(2 * p.M, p.put(x)), "y"))
    near("(f.T @ f)(x)", lambda: (fixed.T @ fixed)(x, **context), lambda p: p.take(p.apply(p.M.mT @ p.M, p.put(x))))
    _space(judge, f, x, u, context, near)
    _inverses(judge, fixed, y, context, truth)
    if drawn_["g_y"] is None:
        near("(f ** 2)(x)", lambda: (fixed**2)(x, **context), lambda p: p.take(p.apply(p.M @ p.M, p.put(x))))


def _time(f: lf.Linearizer, drawn_: dict[str, Any], batch: int, dtype: torch.dtype) -> Any:
    if not f.A.time_dependent:
        return None
    rows = torch.randint(0, 64, (batch,), generator=generator(drawn_["seed"])) / 64
    return {"number": 0.25, "0-d": torch.tensor(0.5, dtype=dtype), "rows": rows.to(dtype)}[drawn_["t"]]


def _space(judge: Judge, f: lf.Linearizer, x: Tensor, u: Tensor, context: dict[str, Any], near: Any) -> None:
    V = lf.InducedSpace(f.g_x, **context)
    batch = len(x)
    a = drawn(4, batch).to(x.dtype)
    near("V.add", lambda: V.add(x, u), lambda p: p.take(p.put(x) + p.put(u)))
    near("V.scale", lambda: V.scale(-1.5, x), lambda p: p.take(-1.5 * p.put(x)))
    near("V.scale, rows", lambda: V.scale(a, x), lambda p: p.take(a.double()[:, None] * p.put(x)))
    near("V.neg", lambda: V.neg(x), lambda p: p.take(-p.put(x)))
    near("V.zero", lambda: V.zero(x), lambda p: p.take(torch.zeros_like(p.put(x))))
    near("V.interpolate", lambda: V.interpolate(x, u, 0.25), lambda p: p.take(0.75 * p.put(x) + 0.25 * p.put(u)))
    near("V.inner", lambda: V.inner(x, u), lambda p: (p.put(x) * p.put(u)).sum(1))
    near("V.norm", lambda: V.norm(x), lambda p: p.put(x).norm(dim=1))
    near("V.distance", lambda: V.distance(x, u), lambda p: (p.put(x) - p.put(u)).norm(dim=1))
    if context:
        return
    if batch:
        near("V.mean", lambda: V.mean(x), lambda p: p.take(p.put(x).mean(0, keepdim=True)))
        weights = drawn(5, 2, batch).to(x.dtype)
        near("V.combine", lambda: V.combine(weights, x), lambda p: p.take(weights.double() @ p.put(x)))
        basis = u[:2].clone()
        near("V.project", lambda: V.project(x, basis), lambda p: p.take(_projected(p.put(x), p.put(basis))))


def _projected(z: Tensor, basis: Tensor) -> Tensor:
    return z @ torch.linalg.pinv(basis) @ basis


def _inverses(judge: Judge, f: lf.Linearizer, y: Tensor, context: dict[str, Any], truth: Any) -> None:
    """Inverses, where the wobble shows that A is well conditioned."""
    M = operators.matrix(f.A).detach()
    S = torch.linalg.svdvals(M)
    if not S.numel() or float((S / S[..., :1].clamp(min=1e-300)).min()) < 1e-2:
        return
    solved = truth(lambda p: p.take(p.apply(torch.linalg.pinv(p.M), p.put(y, "y"))))
    roomy = Truth(solved.exact, [w * 8 + 1e-300 for w in solved.wobble])
    judge.near("f.pinv()(y)", f.pinv()(y, **context), roomy, lambda: f.pinv()(y, **context))
    if M.shape[-1] == M.shape[-2]:
        judge.near("f.inverse(y)", f.inverse(y, **context), roomy, lambda: f.inverse(y, **context))
    if M.ndim == 2:
        svd = f.svd()
        found = svd.S.double()
        expected = S[: len(found)]
        slack = 20 * max(M.shape) * torch.finfo(y.dtype).eps * float(S.max())
        if svd.S.shape == S.shape:
            judge.near("f.svd().S", svd.S, Truth([expected], [slack]))
