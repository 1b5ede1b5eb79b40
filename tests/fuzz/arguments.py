"""Arguments that must be refused: each is replaced by one of another type, rank, size or name.

A wrong argument must raise a ValueError or TypeError that names it. Accepted calls are not counted: the other kinds
check whether they are right.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import linfast as lf
from linfast import ops
from linfast.operators import BlockDiagonal

from .drawing import drawn, recipe
from .judge import Finding, Judge

__all__ = ["CALLS", "RECIPES", "REPLACEMENTS", "arguments_of", "check"]

N, B = 4, 3


def _x(*shape: int) -> Tensor:
    return drawn(3, *(shape or (B, N))).float()


@functools.cache
def _made() -> dict[str, Any]:
    """The objects that the calls use; no call changes them."""
    torch.manual_seed(0)
    g = lf.coupling_flow(N, 2, (5,), mix="lu")
    timed = lf.Linearizer(lf.coupling_flow(N, 2, (5,)), lf.TimeLowRank(N, 2, 1.0, 4, 5))
    return {
        "g": g, "f": lf.Linearizer(g, lf.Dense(N), lf.coupling_flow(N, 1, (5,))), "timed": timed,
                "V": lf.InducedSpace(g),
        "A": lf.Dense(N), "conv": lf.DepthwiseConv(1, 3, (2, 2)), "image": lf.image_flow(2, 4, 2, 4),
        "conditioned": lf.coupling_flow(N, 2, (5,), time_features=4, context_features=2), "low": lf.LowRank(1.0,
                _x(N, 2), _x(N, 2)),
        "square": lf.Linearizer(lf.coupling_flow(N, 2, (5,)), lf.Dense(N)),
    }  # fmt: skip


def _on(name: str, method: str, **arguments: Any) -> tuple[Callable[[], Callable[..., Any]], dict[str, Any]]:
    return (lambda: getattr(_made()[name], method) if method else _made()[name]), arguments


def _of(function: Callable[..., Any], **arguments: Any) -> tuple[Callable[[], Callable[..., Any]], dict[str, Any]]:
    return (lambda: function), arguments


_STREAM = {"count": 4, "batch_size": 2, "seed": 0, "steps": 3, "method": "rk4", "stop": None, "block_size": 2}
_STACK = {
    "activation": "silu",
    "scale_map": lf.ScaleMap(),
    "order": "shift_first",
    "moves": "first",
    "inverse": False,
    "log_det": True,
}
_CONTEXT = {"t": 0.5, "context": _x(B, 2)}


def _layers() -> list[ops.CouplingLayer]:
    return [ops.CouplingLayer([_x(5, 2), _x(4, 5)], [_x(5), _x(4)])]


def _entered(context: Callable[..., Any]) -> Callable[..., None]:
    def call(**arguments: Any) -> None:
        with context(**arguments):
            pass

    return call


_BIJECTION = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det")

# fmt: off
CALLS: dict[str, tuple[Callable[[], Callable[..., Any]], dict[str, Any]]] = {
    **{f"flow.{m}": _on("g", m, **{"z" if "inverse" in m else "x": _x()}) for m in _BIJECTION},
    **{f"conditioned flow.{m}": _on("conditioned", m, **{"z" if "inverse" in m else "x": _x()},
            **_CONTEXT) for m in _BIJECTION},
    **{f"image flow.{m}": _on("image", m, **{"z" if "inverse" in m else "x": _x(B, 2, 4, 4)}) for m in _BIJECTION},
    "f.forward": _on("f", "forward", x=_x()), "f.inverse": _on("f", "inverse", y=_x()), "f.gx": _on("f", "gx",
            x=_x()),
    "f.gy": _on("f", "gy", y=_x()), "f.gx_inverse": _on("f", "gx_inverse", z=_x()), "f.gy_inverse": _on("f",
            "gy_inverse", z=_x()),
    "f.A_inverse": _on("f", "A_inverse", z=_x()), "timed f.forward": _on("timed", "forward", x=_x(), t=0.5),
    "timed f.at": _on("timed", "at", t=0.5), "timed f.inverse": _on("timed", "inverse", y=_x(), t=0.5),
    "f.pinv": _on("f", "pinv", rtol=1e-3),
    "V.add": _on("V", "add", u=_x(), v=_x()), "V.scale": _on("V", "scale", a=2.0, v=_x()), "V.neg": _on("V",
            "neg", v=_x()),
    "V.zero": _on("V", "zero", like=_x()), "V.combine": _on("V", "combine", weights=_x(2, B), vectors=_x()),
    "V.interpolate": _on("V", "interpolate", u=_x(), v=_x(), t=0.5), "V.mean": _on("V", "mean", xs=_x()),
    "V.inner": _on("V", "inner", u=_x(), v=_x()), "V.norm": _on("V", "norm", v=_x()),
    "V.distance": _on("V", "distance", u=_x(), v=_x()), "V.project": _on("V", "project", v=_x(), basis=_x(2, N)),
    "A.forward": _on("A", "forward", z=_x()), "A.pinv": _on("A", "pinv", rtol=1e-3), "A.norm": _on("A", "norm",
            ord=2),
    "A.rank": _on("A", "rank", rtol=1e-3), "conv.forward": _on("conv", "forward", z=_x()),
            "low.forward": _on("low", "forward", z=_x()),
    "Dense": _of(lf.Dense, n_out=N, n_in=N, weight=_x(N, N)), "Dense.of": _of(lf.Dense.of, weight=_x(N, N)),
    "Diagonal": _of(lf.Diagonal, n=N, diagonal=_x(N)), "Diagonal.of": _of(lf.Diagonal.of, diagonal=_x(N)),
    "LowRank": _of(lf.LowRank, alpha=1.0, U=_x(N, 2), V=_x(N, 2)), "Projection": _of(lf.Projection, n=N, rank=2),
    "DepthwiseConv": _of(lf.DepthwiseConv, channels=1, kernel_size=3, size=(2, 2), weight=_x(1, 3, 3)),
    "BlockDiagonal": _of(BlockDiagonal, blocks=_x(2, 2, 2)),
    "TimeLowRank": _of(lf.TimeLowRank, n=N, rank=2, alpha=1.0, time_features=4, hidden=5),
    "TimeDiagonal": _of(lf.TimeDiagonal, n=N, rank=2, alpha=1.0, time_features=4, hidden=5),
    "TimeDepthwiseConv": _of(lf.TimeDepthwiseConv, channels=1, kernel_size=3, size=(2, 2), time_features=4,
            hidden=(5,)),
    "Mix": _of(lf.Mix, features=N, kind="lu"), "Householder": _of(lf.Householder, features=N, count=2),
    "Permute": _of(lf.Permute, features=N, permutation="reverse"), "Squeeze": _of(lf.Squeeze, features=2),
    "ActNorm": _of(lf.ActNorm, features=N, min_std=0.01), "ScaleMap": _of(lf.ScaleMap, kind="tanh", bound=2.0,
            floor=0.0),
    "AffineCoupling": _of(lf.AffineCoupling, conditioner=lf.MLP(2, 4, (3,)), features=N, moves="first",
            scale_map="tanh", order="shift_first", layout="halves"),
    "AdditiveCoupling": _of(lf.AdditiveCoupling, conditioner=lf.MLP(2, 2, (3,)), features=N, moves="first"),
    "MLP": _of(lf.MLP, n_in=2, n_out=3, hidden=(4,), activation="silu", bias=True, time_features=4,
            context_features=1),
    "ResidualMLP": _of(lf.ResidualMLP, n_in=2, n_out=3, hidden=4, blocks=1, activation="elu", dropout=0.1,
            batch_norm=True, time_features=4, context_features=1),
    "ConvNet": _of(lf.ConvNet, channels_in=2, channels_out=3, width=4, activation="silu", time_features=4,
            context_features=1),
    "Flow": _of(lf.Flow, bijections=[lf.Mix(N)], features=N, shape=(N,), memory="auto"),
    "Inverse": _of(lf.Inverse, bijection=lf.Mix(N)), "InducedSpace": _of(lf.InducedSpace, g=lf.Mix(N)),
    "coupling_flow": _of(lf.coupling_flow, features=N, depth=1, hidden=(3,), activation="silu",
            coupling="affine", scale_map="tanh",
        order="shift_first", mix="lu", time_features=0, context_features=0, memory="auto"),
    "MaskedMLP": _of(lf.MaskedMLP, features=3, per_feature=2, hidden=(4, 4), activation="elu", residual=True,
            time_features=4, context_features=1, feature_order=(2, 0, 1)),
    "MaskedAutoregressive": _of(lf.MaskedAutoregressive, conditioner=lf.MaskedMLP(N, 2, (3,)), scale_map="tanh",
            order="shift_first"),
    "autoregressive_flow": _of(lf.autoregressive_flow, features=N, depth=2, hidden=(3, 3), activation="relu",
            residual=True, feature_order="random", scale_map="tanh", order="scale_first", actnorm=False, mix="lu",
            time_features=0, context_features=0, memory="auto"),
    "image_flow": _of(lf.image_flow, channels=2, resolution=4, depth=1, width=3, activation="silu",
            conditioner="conv", coupling="affine",
        scale_map="tanh", order="shift_first", mix="lu", time_features=0, context_features=0, memory="auto"),
    "Linearizer": _of(lf.Linearizer, g_x=lf.Mix(N), A=lf.Dense(N), g_y=lf.Mix(N)),
    "collapse": _of(lf.collapse, A_t=lf.TimeLowRank(N, 2, 1.0, 4, 5), steps=3, method="rk4", stop=0.5, tol=1e-3),
    "generator": _of(lf.generator, f="timed", steps=3, method="rk4", stop=0.5, tol=1e-3),
    "sample": _of(lf.sample, f="timed", noise=_x(), steps=3, method="rk4", stop=0.5),
    "invert": _of(lf.invert, f="timed", y=_x(), steps=3, method="rk4", stop=0.5),
    "sample_stream": _of(lambda **given: list(lf.sample_stream(**given, progress=False)), f="timed", **_STREAM),
    "freeze": _of(_entered(lf.freeze), model="g"),
    "backend": _of(_entered(lf.backend), name="reference"),
    "plan": _of(lf.plan, model="f", x=_x()),
    "accelerate": _of(lf.accelerate, model=torch.nn.Linear(2, 2), precision="exact", memory="store",
            keep_defects=()),
    "restore": _of(lf.restore, model=torch.nn.Linear(2, 2)),
    "ops.affine_coupling": _of(ops.affine_coupling, x=_x(), params=_x(B, 4), scale_map=lf.ScaleMap(),
            order="shift_first", layout="halves", moves="first"),
    "ops.channel_mix": _of(ops.channel_mix, x=_x(), weight=_x(5, N), bias=_x(5)),
    "ops.coupling_mix": _of(ops.coupling_mix, x=_x(), params=_x(B, 4), scale_map=lf.ScaleMap(), weight=_x(5, N),
            bias=_x(5), order="shift_first"),
    "ops.depthwise_conv": _of(ops.depthwise_conv, x=_x(B, 2, 3, 3), weight=_x(2, 3, 3)),
    "ops.group_norm_silu": _of(ops.group_norm_silu, x=_x(), groups=2, weight=_x(N), bias=_x(N), scale=_x(),
            shift=_x()),
    "ops.norm_activate": _of(ops.norm_activate, x=_x(), activation="elu", bias=_x(N), weight=_x(N), shift=_x(N),
            skip=_x(), gate=_x(), with_sum=True, of_batch=True, eps=1e-5),
    "ops.latent_matmul": _of(ops.latent_matmul, z=_x(), A=_x(2, N, N), index=torch.tensor([0, 1, 1]), alpha=0.5,
            bias=_x(N), precision="exact"),
    "ops.low_rank": _of(ops.low_rank, x=_x(), U=_x(N, 2), V=_x(N, 2), alpha=0.5),
    "ops.conv2d_fused": _of(ops.conv2d_fused, x=_x(B, N, 3, 3), weight=_x(2, N, 3, 3), bias=_x(2), groups=2,
            norm_weight=_x(N), norm_bias=_x(N), residual=_x(B, 2, 3, 3), alpha=1.0, precision="exact"),
    "ops.coupling_stack": _of(ops.coupling_stack, x=_x(), layers=_layers(), **_STACK, precision="exact"),
    "ops.mlp_coupling": _of(ops.mlp_coupling, x=_x(), weights=_layers()[0].weights, biases=_layers()[0].biases,
            **_STACK, precision="exact"),
    "ops.linearizer_stack": _of(ops.linearizer_stack, x=_x(), g_x=ops.CouplingStack(_layers(), "silu",
            lf.ScaleMap()), A=_x(N, N), g_y=ops.CouplingStack(_layers(), "silu", lf.ScaleMap()), precision="exact"),
}
# fmt: on


def _tensor(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """A change of a tensor; None for anything else."""
    return lambda value: change(value) if isinstance(value, Tensor) else _NOTHING


_NOTHING = object()
REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "None": lambda v: None,
    "a number": lambda v: 3,
    "minus one": lambda v: -1,
    "zero": lambda v: 0,
    "a fraction": lambda v: 2.5,
    "nan": lambda v: float("nan"),
    "a word": lambda v: "nonsense",
    "an object": lambda v: object(),
    "a dictionary": lambda v: {},
    "a numpy array": lambda v: v.numpy() if isinstance(v, Tensor) else np.ones(3),
    "a list": lambda v: v.tolist() if isinstance(v, Tensor) else [1.0],
    "an empty list": lambda v: [],
    "a tensor": lambda v: torch.ones(2, 3) if not isinstance(v, Tensor) else _NOTHING,
    "integers": _tensor(lambda v: torch.ones_like(v, dtype=torch.int64)),
    "booleans": _tensor(lambda v: torch.ones_like(v, dtype=torch.bool)),
    "complex": _tensor(lambda v: v.to(torch.complex64)),
    "float64": _tensor(lambda v: v.double()),
    "float16": _tensor(lambda v: v.half()),
    "one rank more": _tensor(lambda v: v[None]),
    "two ranks more": _tensor(lambda v: v[None, None]),
    "one rank less": _tensor(lambda v: v[0] if v.ndim else v),
    "a scalar": _tensor(lambda v: v.flatten()[0]),
    "longer": _tensor(lambda v: torch.cat((v, v), -1)),
    "shorter": _tensor(lambda v: v[..., :-1]),
    "more rows": _tensor(lambda v: torch.cat((v, v))),
    "no columns": _tensor(lambda v: v[..., :0]),
    "nothing": _tensor(lambda v: v.new_empty(0)),
    "meta": _tensor(lambda v: v.to("meta")),
}
# A flag may be anything that Python converts to a bool.
_PAIRS = [(call, k) for call, (_, given) in CALLS.items() for k, v in given.items() if not isinstance(v, bool)]
RECIPES = recipe(pair=st.sampled_from(_PAIRS), replacement=st.sampled_from(list(REPLACEMENTS)))
# The name of an argument in the function that checks it.
_ALIASES = {"scale_map": ("kind",), "name": ("backend",), "time_features": ("features",), "mix": ("kind",)}


def arguments_of(call: str) -> dict[str, Any]:
    """The call's valid arguments."""
    return {k: _made()[v] if k in ("f", "model") and isinstance(v, str) else v for k, v in CALLS[call][1].items()}


def check(judge: Judge, r: dict[str, Any]) -> None:
    call, name = r["pair"]
    arguments = arguments_of(call)
    before, value = arguments[name], REPLACEMENTS[r["replacement"]](arguments[name])
    if value is _NOTHING:
        return
    arguments[name] = value
    try:
        with torch.no_grad():
            CALLS[call][0]()(**arguments)
    except (ValueError, TypeError) as error:
        # Of two arguments that do not fit together either may be named. Inside a flow the input is called x or z.
        alike = type(value) is type(before)
        names = {name, *_ALIASES.get(name, ()), *(arguments if alike else ()), *("xz" if alike else "")}
        if not any(re.search(rf"\b{n}\b", str(error)) for n in names):
            raise _finding(r, f"{type(error).__name__} does not name it", error) from error
        judge.calls[f"{call} refused"] += 1
    except Exception as error:
        raise _finding(r, f"raises {type(error).__name__}", error) from error


def _finding(r: dict[str, Any], what: str, error: Exception) -> Finding:
    return Finding(", ".join(r["pair"]), f"{r['replacement']}: {what}: {str(error)[:150]}")
