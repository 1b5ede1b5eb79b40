"""Bijections and flows against formulas written out in float64, and against themselves run in other ways."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import linfast as lf
from linfast.dispatch import interpreting, plain_torch
from linfast.scale_maps import SCALE_MAP_KINDS

from .drawing import (
    DTYPES,
    LAYOUTS,
    cotangent,
    drawn,
    generator,
    laid_out,
    moved,
    moved_model,
    perturbed,
    recipe,
    seeds,
    sizes,
    times,
)
from .judge import Judge, truth_of
from .plain import plain_flow

__all__ = ["FLOWS", "RECIPES", "build", "check", "context_of"]

_SCALE_MAPS = st.none() | st.sampled_from(SCALE_MAP_KINDS)
_MIXES = st.sampled_from([None, "lu", "free", "householder", "permute"])
_LAYERS = ("affine", "additive", "actnorm", "lu", "free", "householder", "permute", "inverse affine", "flow")
_SHARED = {
    "coupling": st.sampled_from(["affine", "affine", "additive", "spline"]),
    "scale_map": _SCALE_MAPS,
    "order": st.sampled_from(["shift_first", "scale_first"]),
    "actnorm": st.booleans(),
    "mix": _MIXES,
    "memory": st.sampled_from(["store", "invert", "auto"]),
    "std": st.sampled_from([0.05, 0.2, 0.5]),
    "seed": seeds,
}
_VECTOR = recipe(
    make="coupling_flow",
    features=sizes(2),
    depth=st.integers(1, 6),
    hidden=st.lists(sizes(1, 24), max_size=3).map(tuple),
    activation=st.sampled_from(["silu", "relu", "tanh", "gelu"]),
    time_features=st.sampled_from([0, 0, 4, 6]),
    context_features=st.sampled_from([0, 0, 1, 3]),
    **_SHARED,
)
_IMAGE = recipe(
    make="image_flow",
    channels=st.integers(1, 5),
    side=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    depth=st.integers(1, 3),
    width=st.integers(1, 6),
    time_features=st.sampled_from([0, 0, 4]),
    context_features=st.sampled_from([0, 0, 2]),
    **_SHARED,
)
_LISTED = recipe(
    make="layers",
    features=sizes(2, 20),
    layers=st.lists(st.sampled_from(_LAYERS), max_size=5).map(tuple),
    **{k: v for k, v in _SHARED.items() if k not in ("coupling", "actnorm", "mix")},
)
FLOWS = st.one_of(_VECTOR, _VECTOR, _LISTED, _IMAGE)
RECIPES = recipe(
    flow=FLOWS,
    dtype=st.sampled_from(["float32", "float64", "float32", "float16", "bfloat16"]),
    batch=st.sampled_from([1, 2, 3, 4, 7, 0]),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([1.0, 1.0, 1.0, 1e-5, 1e-20, 1e3, 1e20]),
    requires_grad=st.booleans(),
    autocast=st.booleans(),
    time=times,
    seed=seeds,
)


def build(made: dict[str, Any]) -> tuple[nn.Module, tuple[int, ...]]:
    """The flow of a recipe in float64, its ActNorms initialised, and the shape of a sample."""
    torch.manual_seed(made["seed"])
    options = {k: made[k] for k in _SHARED if k in made and k not in ("std", "seed")}
    if options.get("coupling") == "spline":
        del options["order"]
        options |= {
            "scale_map": None,
            "bins": 2 + made["seed"] % 7,
            "tail_bound": (0.5, 1.0, 3.0)[made["seed"] % 3],
        }
    if made["make"] == "coupling_flow":
        own = ("features", "depth", "hidden", "activation", "time_features", "context_features")
        g: nn.Module = lf.coupling_flow(**{k: made[k] for k in own}, **options)
        shape: tuple[int, ...] = (made["features"],)
    elif made["make"] == "image_flow":
        even = 2 if made["channels"] % 2 else 1
        side = tuple(even * s for s in made["side"])
        own = ("channels", "depth", "width", "time_features", "context_features")
        g = lf.image_flow(**{k: made[k] for k in own}, resolution=side, **options)  # type: ignore[arg-type]
        shape = (made["channels"], *side)
    else:
        n, shape = made["features"], (made["features"],)
        layers = [_layer(kind, n, made, i) for i, kind in enumerate(made["layers"])]
        g = lf.Flow(layers, features=n, memory=made["memory"])
    for part in g.modules():
        if isinstance(part, lf.ActNorm):
            part.initialize(torch.randn(9, part.features, *[3] * (len(shape) - 1)))
    return perturbed(g, made["seed"], made["std"]), shape


def _layer(kind: str, n: int, made: dict[str, Any], i: int) -> lf.Bijection:
    moves = ("first", "second")[i % 2]
    first, second = (n + 1) // 2, n // 2
    m, kept = (first, second) if moves == "first" else (second, first)
    if kind.endswith("affine"):
        layout = ("halves", "interleaved")[made["seed"] % 2]
        map_ = made["scale_map"] or "smooth"
        layer = lf.AffineCoupling(lf.MLP(kept, 2 * m, (5,)), n, moves, map_, made["order"], layout)
        return lf.Inverse(layer) if kind.startswith("inverse") else layer
    if kind == "additive":
        return lf.AdditiveCoupling(lf.MLP(kept, m, ()), n, moves)
    if kind in ("lu", "free"):
        return lf.Mix(n, kind)
    if kind == "flow":
        return lf.coupling_flow(n, 2, (4,), memory=made["memory"])
    return {"actnorm": lf.ActNorm, "householder": lf.Householder, "permute": lf.Permute}[kind](n)


def context_of(made: dict[str, Any], batch: int, time: str, seed: int) -> dict[str, Any]:
    """The context for the flow's conditioners, in float64."""
    context: dict[str, Any] = {}
    if made.get("time_features"):
        t = torch.randint(0, 64, (batch,), generator=generator(seed)).double() / 64
        context["t"] = {"number": 0.25, "0-d": torch.tensor(0.625, dtype=torch.float64), "rows": t}[time]
    if made.get("context_features"):
        context["context"] = drawn(seed + 1, batch, made["context_features"])
    return context


def cast(context: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in context.items()}


def row_of(context: dict[str, Any], i: int) -> dict[str, Any]:
    return {k: v[i : i + 1] if isinstance(v, Tensor) and v.ndim else v for k, v in context.items()}


def ours(g: Any, x: Tensor, inverse: bool, context: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return (g.inverse_and_log_det if inverse else g.forward_and_log_det)(x, **context)


def with_gradients(
    run: Any, g: nn.Module, x: Tensor, inverse: bool, context: dict[str, Any]
) -> list[Tensor | None]:
    """Gradients of a weighted sum of y and log_det for x, the context and the weights; zero for None."""
    x = x.detach().clone().requires_grad_()
    given = {k: v.detach().clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in context.items()}
    y, log_det = run(g, x, inverse, given)
    wanted = [x, *(v for v in given.values() if isinstance(v, Tensor)), *g.parameters()]
    outputs = [v for v in (y, log_det) if v.requires_grad]
    found = torch.autograd.grad(outputs, wanted, [cotangent(v) for v in outputs], allow_unused=True)
    return [torch.zeros_like(w) if f is None else f for f, w in zip(found, wanted, strict=True)]


def check(judge: Judge, drawn_: dict[str, Any]) -> None:
    made, dtype, batch = drawn_["flow"], DTYPES[drawn_["dtype"]], drawn_["batch"]
    wide, shape = build(made)
    g = copy.deepcopy(wide).to(dtype)
    wide = copy.deepcopy(g).double()
    scale = min(drawn_["scale"], 1.0) if dtype == torch.float16 else drawn_["scale"]  # which ends at 65504
    x = drawn(drawn_["seed"], batch, *shape, scale=scale).to(dtype)
    x = laid_out(x, drawn_["layout"]).requires_grad_(drawn_["requires_grad"])
    context = cast(context_of(made, batch, drawn_["time"], drawn_["seed"]), dtype)
    eps = torch.finfo(dtype).eps

    def truths(run: Any, inverse: bool, x: Tensor, eps: float = eps) -> Any:
        random = generator(5)

        def at(size: float) -> Any:
            moved_context = {
                k: moved(v.double(), size, random) if isinstance(v, Tensor) else v for k, v in context.items()
            }
            return run(
                moved_model(wide, size, random), moved(x.detach().double(), size, random), inverse, moved_context
            )

        return truth_of(at, eps)

    before = x.detach().clone()
    z = None
    for inverse in (False, True):
        side = "inverse" if inverse else "forward"
        value = x if z is None else z
        truth = truths(plain_flow, inverse, value)
        _outputs(judge, g, value, inverse, context, truth, side)
        _rows(judge, g, value, inverse, context, truth, side)
        if drawn_["scale"] == 1.0 and batch:
            _gradients(judge, g, value, inverse, context, truths, side, dtype)
        if drawn_["autocast"] and dtype == torch.float32 and drawn_["scale"] == 1.0:
            half = torch.float16 if interpreting() else torch.bfloat16  # Triton's interpreter has no bf16
            rough = truths(plain_flow, inverse, value, torch.finfo(half).eps)
            with torch.autocast("cpu", half):
                got = ours(g, value, inverse, context)
            judge.holds(f"autocast {side}, log_det", got[1].dtype == torch.float32, f"log_det is {got[1].dtype}")
            judge.near(f"autocast {side}", got, rough)
        if z is None:
            z = truth.exact[0].to(dtype)  # type: ignore[union-attr]
    judge.same("flow leaves its input", x.detach(), before)
    if dtype == torch.float64 and batch and drawn_["scale"] == 1.0 and x[0].numel() <= 16:
        _jacobian(judge, wide, x.detach()[:1], row_of(context, 0))


def _outputs(
    judge: Judge, g: Any, x: Tensor, inverse: bool, context: dict[str, Any], truth: Any, side: str
) -> None:
    def both() -> Any:
        return ours(g, x, inverse, context)

    def alone() -> Any:
        return g.inverse(x, **context) if inverse else g(x, **context)

    only = truth._replace(exact=truth.exact[:1], wobble=truth.wobble[:1])
    judge.near(f"flow.{side}_and_log_det", both(), truth, both)
    judge.near(f"flow.{side}", alone(), only, alone)
    judge.near(f"Inverse.{side}", ours(lf.Inverse(g), x, not inverse, context), truth, both)
    fixed = g.at(**context)
    judge.near(f"flow.at.{side}", ours(fixed, x, inverse, {}), truth, both)
    with torch.no_grad(), lf.freeze(g):
        for _ in range(2):
            judge.near(f"frozen {side}_and_log_det", both(), truth, both)
            judge.near(f"frozen {side}", alone(), only, alone)


def _rows(judge: Judge, g: Any, x: Tensor, inverse: bool, context: dict[str, Any], truth: Any, side: str) -> None:
    batch = len(x)
    for i in sorted({0, batch - 1} if batch > 1 else set()):
        row = slice(i, i + 1)

        def one(row: slice = row, i: int = i) -> Any:
            return ours(g, x[row], inverse, row_of(context, i))

        judge.near(f"one row, {side}", one(), truth.rows(row), one)
    if batch > 2:
        spoilt = x.detach().clone()
        spoilt[1] = float("nan") if batch % 2 else float("inf")
        with torch.no_grad():
            got, clean = (ours(g, v.contiguous(), inverse, context) for v in (spoilt, x.detach()))
        keep = [i for i in range(batch) if i != 1]
        judge.same(f"a row that is not finite, {side}", [v[keep] for v in got], [v[keep] for v in clean])


def _gradients(
    judge: Judge, g: Any, x: Tensor, inverse: bool, context: dict[str, Any], truths: Any, side: str, dtype: Any
) -> None:
    def plain(model: nn.Module, x: Tensor, inverse: bool, context: dict[str, Any]) -> Any:
        return with_gradients(plain_flow, model, x, inverse, context)

    if dtype in (torch.float16, torch.bfloat16):
        return
    truth = truths(plain, inverse, x)

    def reference() -> Any:
        return plain(g, x, inverse, context)

    memory = getattr(g, "memory", "store")
    try:
        for mode in ("store", "invert", "auto"):
            g.memory = mode
            with mock.patch("linfast.flows.reversible.AUTO_BYTES", -1):
                got = with_gradients(ours, g, x, inverse, context)
            g.memory = "store"  # a forward with random rounding does not repeat exactly
            room = 1.0 if mode == "store" else 4.0  # of the way back as well
            judge.near(f"gradients, memory={mode}, {side}", got, truth, reference, room, independent=True)
    finally:
        g.memory = memory


def _jacobian(judge: Judge, g: Any, x: Tensor, context: dict[str, Any]) -> None:
    with plain_torch():
        J = torch.func.jacrev(lambda v: g(v[None], **context)[0])(x[0]).reshape(x[0].numel(), x[0].numel())
    _, got = g.forward_and_log_det(x, **context)
    singular = torch.linalg.svdvals(J)
    limit = 1e-11 * float(singular[0] / singular[-1].clamp(min=1e-300)) if len(singular) else 0.0
    expected = torch.linalg.slogdet(J).logabsdet
    off = float((got[0] - expected).abs())
    judge.holds("log_det and jacrev", off <= 1e-10 + limit, f"log_det is off by {off:.3g}")
