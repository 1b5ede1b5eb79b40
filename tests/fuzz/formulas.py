"""The call of each op and its formula written out, for the tensors of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import linfast as lf
from linfast import ops
from tests.ops.stacks import leaves, plain_stack, random_layers, random_map, rebuilt

from .drawing import drawn
from .plain import log_scale, plain_spline

__all__ = ["OPS", "Case", "make"]


class Case(NamedTuple):
    """An op's call, the formula, and the tensors of both in float64."""

    call: Callable[..., Any]
    formula: Callable[..., Any]
    tensors: list[Tensor]


OPS = (
    "affine_coupling", "channel_mix", "conv2d_fused", "coupling_mix", "coupling_stack", "depthwise_conv",
    "group_norm_silu", "latent_matmul", "linearizer_stack", "low_rank", "mlp_coupling", "rq_spline",
)  # fmt: skip


def make(r: dict[str, Any]) -> Case:
    torch.manual_seed(r["seed"])
    return globals()[f"_{r['op']}"](r)


def _image(r: dict[str, Any], *lead: int) -> Tensor:
    return drawn(r["seed"], *lead, *r["positions"])


def _options(r: dict[str, Any]) -> dict[str, Any]:
    return {"order": r["order"], "layout": r["params"], "moves": r["moves"], "inverse": r["inverse"]}


def _coupled(x: Tensor, params: Tensor, r: dict[str, Any]) -> tuple[Tensor, Tensor]:
    first = (x.shape[1] + 1) // 2
    halves, m = [x[:, :first], x[:, first:]], int(r["moves"] == "second")
    n = halves[m].shape[1]
    shift, raw = (params[:, :n], params[:, n:]) if r["params"] == "halves" else (params[:, ::2], params[:, 1::2])
    s = log_scale(lf.ScaleMap(r["scale_map"]), raw)
    if r["order"] == "shift_first":
        y = halves[m] * (-s).exp() - shift if r["inverse"] else (halves[m] + shift) * s.exp()
    else:
        y = (halves[m] - shift) * (-s).exp() if r["inverse"] else halves[m] * s.exp() + shift
    halves[m] = y
    return torch.cat(halves, 1), (-1 if r["inverse"] else 1) * s.flatten(1).sum(1)


def _affine_coupling(r: dict[str, Any]) -> Case:
    C, B = r["channels"], r["batch"]
    n = (C + 1) // 2 if r["moves"] == "first" else C // 2
    x, params = _image(r, B, C), drawn(r["seed"] + 1, B, 2 * n, *r["positions"])
    return Case(
        lambda x, p: ops.affine_coupling(x, p, lf.ScaleMap(r["scale_map"]), **_options(r), log_det=True),
        lambda x, p: _coupled(x, p, r), [x, params],
    )  # fmt: skip


def _mixed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.einsum("oc,bc...->bo...", weight, x)
    return y if bias is None else y + bias.view(-1, *[1] * (x.ndim - 2))


def _channel_mix(r: dict[str, Any]) -> Case:
    tensors = [_image(r, r["batch"], r["channels"]), drawn(r["seed"] + 1, r["out"], r["channels"])]
    return Case(ops.channel_mix, _mixed, tensors + [drawn(r["seed"] + 2, r["out"])] * r["flag"])


def _coupling_mix(r: dict[str, Any]) -> Case:
    base = _affine_coupling(r)
    weights = [drawn(r["seed"] + 3, r["out"], r["channels"])] + [drawn(r["seed"] + 2, r["out"])] * r["flag"]

    def formula(x: Tensor, params: Tensor, *weights: Tensor) -> Any:
        u, log_det = _coupled(x, params, r)
        return _mixed(u, *weights), log_det

    return Case(
        lambda x, p, *w: ops.coupling_mix(x, p, lf.ScaleMap(r["scale_map"]), *w, **_options(r), log_det=True),
        formula, [*base.tensors, *weights],
    )  # fmt: skip


def _group_norm_silu(r: dict[str, Any]) -> Case:
    C, B = r["channels"], r["batch"]
    groups = next(g for g in (3, 2, 1) if C % g == 0) if r["flag"] else 1
    positions = (*r["positions"], 4)
    shapes = [(C,), (C,), (B, C), (B, C)][: 4 if r["other"] else 2]
    tensors = [drawn(r["seed"], B, C, *positions), *(drawn(r["seed"] + i, *s) for i, s in enumerate(shapes, 1))]

    def formula(x: Tensor, weight: Tensor, bias: Tensor, scale: Any = None, shift: Any = None) -> Tensor:
        grouped = x.flatten(1).unflatten(1, (groups, -1)) if B else x.flatten(1)[:, None]
        apart = grouped - grouped.mean(2, keepdim=True)
        y = (apart / (apart.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape).flatten(2)
        y = y * weight[:, None] + bias[:, None]
        y = y if scale is None else y * (1 + scale[..., None]) + shift[..., None]
        return (y * y.sigmoid() if r["inverse"] else y).reshape(x.shape)

    return Case(lambda *t: ops.group_norm_silu(t[0], groups, *t[1:], activation=r["inverse"]), formula, tensors)


def _conv2d_fused(r: dict[str, Any]) -> Case:
    C, B, k = r["channels"], r["batch"], r["kernel"]
    groups = 0 if r["flag"] else 1 + (C % 2 == 0)
    size = r["positions"] if len(r["positions"]) == 2 else (3, 2)
    tensors = [
        drawn(r["seed"], B, C, *size), drawn(r["seed"] + 1, r["out"], C, k, k) / (k * C**0.5),
        drawn(r["seed"] + 2, *((B,) if r["other"] else ()), r["out"]), drawn(r["seed"] + 3, B, r["out"], *size),
    ]  # fmt: skip
    tensors += [drawn(r["seed"] + 4, C), drawn(r["seed"] + 5, C)] if groups else []

    def call(x: Tensor, w: Tensor, b: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
        given = dict(zip(("norm_weight", "norm_bias"), norm, strict=False))
        return ops.conv2d_fused(
            x,
            w,
            b,
            groups=groups,
            residual=residual,
            alpha=0.5,
            activation=bool(groups),
            precision="exact",
            **given,
        )[0]

    def formula(x: Tensor, w: Tensor, b: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
        if norm:
            x = F.silu(F.group_norm(x, groups, *norm)) if B else x
        y = F.unfold(x, k, padding=k // 2)
        y = torch.einsum("oc,bcp->bop", w.flatten(1), y).reshape(residual.shape)
        return y + (b if r["other"] else b[None])[..., None, None] + 0.5 * residual

    return Case(call, formula, tensors)


def _depthwise_conv(r: dict[str, Any]) -> Case:
    C, B = r["channels"], r["batch"]
    size = r["positions"] if len(r["positions"]) == 2 else (3, 2)
    k = (r["kernel"], 1 + r["rank"])
    tensors = [drawn(r["seed"], B, C, *size), drawn(r["seed"] + 1, *((B,) if r["flag"] else ()), C, *k)]

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        M = _correlations(weight, size)
        M = M.mT if r["inverse"] else M
        return (M @ x.flatten(2)[..., None])[..., 0].reshape(x.shape)

    return Case(lambda x, w: ops.depthwise_conv(x, w, transpose=r["inverse"]), formula, tensors)


def _correlations(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """The matrix of each channel, [..., C, HW, HW]."""
    (H, W), (kh, kw) = size, weight.shape[-2:]
    place = torch.zeros(kh * kw, H * W, H * W, dtype=weight.dtype)
    for y in range(H):
        for x in range(W):
            for i in range(kh):
                for j in range(kw):
                    v, u = y + i - (kh - 1) // 2, x + j - (kw - 1) // 2
                    if 0 <= v < H and 0 <= u < W:
                        place[i * kw + j, y * W + x, v * W + u] = 1
    return torch.einsum("...k,kpq->...pq", weight.flatten(-2), place)


def _latent_matmul(r: dict[str, Any]) -> Case:
    B, n = r["batch"], r["channels"]
    n_out = n if r["flag"] else r["out"]
    kind = ("shared", "rows", "picked")[r["rank"] % 3]
    lead = {"shared": (), "rows": (B,), "picked": (3,)}[kind]
    index = torch.randint(0, 3, (B,)) if kind == "picked" else None
    tensors = [drawn(r["seed"], B, n), drawn(r["seed"] + 1, *lead, n_out, n)] + [drawn(r["seed"] + 2, n_out)] * r[
        "other"
    ]
    alpha = 0.5 if n_out == n and r["inverse"] else 0.0

    def formula(z: Tensor, A: Tensor, bias: Any = 0.0) -> Tensor:
        A = A if index is None else A[index]
        y = (A @ z[..., None])[..., 0] + bias
        return y + alpha * z if alpha else y

    return Case(
        lambda z, A, *b: ops.latent_matmul(z, A, index, alpha=alpha, bias=b[0] if b else None), formula, tensors
    )


def _low_rank(r: dict[str, Any]) -> Case:
    B, n = r["batch"], r["channels"]
    m = n if r["flag"] else r["out"]
    lead = [(B,) if flag else () for flag in (r["inverse"], r["other"])]
    alpha = 0.75 if m == n else 0.0
    tensors = [
        drawn(r["seed"], B, n),
        drawn(r["seed"] + 1, *lead[0], m, r["rank"]),
        drawn(r["seed"] + 2, *lead[1], n, r["rank"]),
    ]

    def formula(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        y = (U @ (V.mT @ x[..., None]))[..., 0]
        return y + alpha * x if alpha else y

    return Case(lambda x, U, V: ops.low_rank(x, U, V, alpha), formula, tensors)


def _network(r: dict[str, Any], depth: int) -> tuple[Any, Any, list[Tensor], dict[str, Any]]:
    layers = random_layers(
        r["channels"], r["hidden"], depth, moves=r["moves"], maps=r["maps"], layout=r["params"], bias=r["flag"]
    )
    head = random_map(r["channels"], r["maps"]) if r["other"] else None
    options = {
        "activation": r["activation"],
        "scale_map": lf.ScaleMap(r["scale_map"]),
        "order": r["order"],
        "moves": r["moves"],
    }
    return layers, head, [t.double() for t in leaves(layers, head)], options


def _coupling_stack(r: dict[str, Any]) -> Case:
    layers, head, tensors, options = _network(r, r["depth"])

    def call(x: Tensor, *tensors: Tensor) -> Any:
        new, new_head = rebuilt(layers, tensors, head)
        return ops.coupling_stack(
            x, new, head=new_head, inverse=r["inverse"], log_det=True, precision="exact", **options
        )

    def formula(x: Tensor, *tensors: Tensor) -> Any:
        new, new_head = rebuilt(layers, tensors, head)
        activation, scale_map = options["activation"], options["scale_map"]
        return plain_stack(
            x, new, activation, scale_map, order=r["order"], moves=r["moves"], inverse=r["inverse"], head=new_head
        )

    return Case(call, formula, [drawn(r["seed"], r["batch"], r["channels"]), *tensors])


def _mlp_coupling(r: dict[str, Any]) -> Case:
    r = {**r, "maps": "none", "other": False}
    layers, _, tensors, options = _network(r, 1)

    def call(x: Tensor, *tensors: Tensor) -> Any:
        layer = rebuilt(layers, tensors)[0][0]
        return ops.mlp_coupling(
            x,
            layer.weights,
            layer.biases,
            layout=r["params"],
            inverse=r["inverse"],
            log_det=True,
            precision="exact",
            **options,
        )

    return Case(
        call, _coupling_stack({**r, "depth": 1}).formula, [drawn(r["seed"], r["batch"], r["channels"]), *tensors]
    )


def _linearizer_stack(r: dict[str, Any]) -> Case:
    layers, head, tensors, options = _network(r, min(r["depth"], 2))
    D, n = r["channels"], len(tensors)
    A = 1 + drawn(r["seed"], D).abs() if r["inverse"] else drawn(r["seed"], D, D) / D**0.5
    activation, scale_map, plain = (
        options["activation"],
        options["scale_map"],
        {"order": r["order"], "moves": r["moves"]},
    )

    def call(x: Tensor, A: Tensor, *tensors: Tensor) -> Any:
        sides = [rebuilt(layers, part, head) for part in (tensors[:n], tensors[n:])]
        g_x, g_y = (ops.CouplingStack(new, head=new_head, **options) for new, new_head in sides)
        return ops.linearizer_stack(x, g_x, A, g_y, precision="exact")

    def formula(x: Tensor, A: Tensor, *tensors: Tensor) -> Any:
        sides = [rebuilt(layers, part, head) for part in (tensors[:n], tensors[n:])]
        z = plain_stack(x, sides[0][0], activation, scale_map, head=sides[0][1], **plain)[0]
        z = z * A if A.ndim == 1 else z @ A.mT
        return plain_stack(z, sides[1][0], activation, scale_map, head=sides[1][1], inverse=True, **plain)[0]

    return Case(call, formula, [drawn(r["seed"] + 1, r["batch"], D), A, *tensors, *(1.01 * t for t in tensors)])


def _rq_spline(r: dict[str, Any]) -> Case:
    K, extra, tails = 2 + r["rank"], r["depth"] - 2, ("linear", "circular", "bounded")[r["depth"] - 1]
    shape = (r["channels"], *r["positions"])
    lead = (1 if r["other"] else r["batch"], *shape)
    tensors = [2 * _image(r, r["batch"], r["channels"])]
    tensors += [drawn(r["seed"] + i, *lead, n) for i, n in enumerate((K, K, K + extra), 1)]
    options = {"tails": tails, "interval": (-2.0, 2.5), "min_derivative": 0.01, "inverse": r["inverse"]}
    options |= {"temperature": 1.0, "parameters": "soft_clip"} if r["flag"] else {"temperature": 1.5}
    options.setdefault("parameters", "softmax")
    return Case(
        lambda *t: ops.rq_spline(*t, **options, log_det=True), lambda *t: plain_spline(*t, **options), tensors
    )
