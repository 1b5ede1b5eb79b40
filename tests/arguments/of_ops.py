"""Valid calls of linfast.ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import linfast as lf
from linfast import ops
from linfast.ops import AffineMap, CouplingLayer, CouplingStack
from tests.arguments.calls import Good, x


def layers(mapped: bool = False) -> list[CouplingLayer]:
    given = AffineMap(torch.eye(4) + 0.1 * x(4, 4), x(4)) if mapped else None
    return [CouplingLayer([x(3, 2), x(4, 3)], [x(3), x(4)], "halves", given)]


def stack() -> CouplingStack:
    return CouplingStack(layers(), "silu", lf.ScaleMap())


def stacks(name: str, **options: Any) -> Good:
    def make() -> tuple[Callable[..., Any], dict[str, Any]]:
        mlp = {"weights": layers()[0].weights, "biases": layers()[0].biases, "layout": "halves"}
        stacked = {"layers": layers(True), "head": AffineMap(x(4) + 2, x(4)), "packed": None}
        given = {
            "x": x(3, 4), "activation": "silu", "scale_map": lf.ScaleMap(), "order": "shift_first",
            "moves": "first", "inverse": False, "log_det": True, "precision": None,
            **(mlp if name == "mlp_coupling" else stacked),
        }  # fmt: skip
        return getattr(ops, name), given

    return Good(make, {"x": "b D"}, "x", **options)


def coupling(name: str) -> Good:
    def make() -> tuple[Callable[..., Any], dict[str, Any]]:
        given = {"x": x(2, 4, 3), "params": x(2, 4, 3), "scale_map": lf.ScaleMap(), "order": "shift_first",
                 "layout": "halves", "moves": "first", "inverse": False, "log_det": True}  # fmt: skip
        if name == "coupling_mix":
            given |= {"weight": x(5, 4), "bias": x(5)}
        return getattr(ops, name), given

    return Good(make, {"x": "B C P", "params": "B C P", "weight": "O C", "bias": "O"}, "x")


MASKS = ([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0, 0.0]] * 2 + [[1.0, 1.0, 1.0]] * 2)


def masks() -> list[torch.Tensor]:
    """Those of 2 features with 3 hidden units."""
    return [torch.tensor(mask) for mask in MASKS]


OPS: dict[str, Good] = {
    "AutoregressiveMasks": Good(
        lambda: (
            ops.AutoregressiveMasks,
            {"masks": masks(), "per_feature": 2, "activated": None, "adds": [0], "raw_first": False},
        )
    ),
    "masked_autoregressive": Good(
        lambda: (
            ops.masked_autoregressive,
            {
                "x": x(4, 2),
                "masks": ops.AutoregressiveMasks(masks()),
                "weights": [x(3, 2), x(4, 3)],
                "biases": [x(3), None],
                "activation": "elu",
                "scale_map": lf.ScaleMap(),
                "order": "scale_first",
                "extras": [(x(4, 3), None)],
                "inverse": True,
                "log_det": True,
                "precision": None,
                "packed": None,
                "masked": False,
                "spline": None,
            },
        ),
        {"x": "B D"},
        "x",
    ),
    "affine_coupling": coupling("affine_coupling"),
    "coupling_mix": coupling("coupling_mix"),
    "channel_mix": Good(
        lambda: (ops.channel_mix, {"x": x(2, 4, 3), "weight": x(5, 4), "bias": x(5)}),
        {"x": "b C p *", "weight": "O C", "bias": "O"},
        "x",
    ),
    "conv2d_fused": Good(
        lambda: (
            ops.conv2d_fused,
            {
                "x": x(2, 4, 3, 3),
                "weight": x(6, 4, 1, 1),
                "bias": x(6),
                "groups": 2,
                "norm_weight": x(4),
                "norm_bias": x(4),
                "eps": 1e-5,
                "activation": True,
                "statistics": None,
                "residual": x(2, 6, 3, 3),
                "alpha": 0.5,
                "next_groups": 3,
                "precision": None,
            },
        ),
        {
            "x": "B C H W",
            "weight": "O C K K",
            "bias": "O",
            "norm_weight": "C",
            "norm_bias": "C",
            "residual": "B O H W",
        },
        allowed={"weight": {"it in torch.float64"}},
    ),
    "coupling_stack": stacks("coupling_stack"),
    "mlp_coupling": stacks("mlp_coupling"),
    "linearizer_stack": Good(
        lambda: (
            ops.linearizer_stack,
            {
                "x": x(3, 4),
                "g_x": stack(),
                "A": x(4, 4),
                "g_y": stack(),
                "alpha": 0.5,
                "precision": None,
                "packed": None,
            },
        ),
        {"x": "b D", "A": "D D"},
        "x",
        {"A": {"one rank fewer"}},
    ),
    "depthwise_conv": Good(
        lambda: (ops.depthwise_conv, {"x": x(2, 3, 4, 4), "weight": x(3, 3, 3), "transpose": False}),
        {"x": "b C h w", "weight": "C k l"},
        "x",
        {"weight": {"one rank more in front"}},
    ),
    "norm_activate": Good(
        lambda: (
            ops.norm_activate,
            {
                "x": x(3, 4),
                "activation": "elu",
                "bias": x(4),
                "weight": x(4),
                "shift": x(4),
                "mean": x(4),
                "var": x(4).exp(),
                "skip": x(3, 4),
                "gate": x(3, 4),
                "with_sum": True,
                "of_batch": False,
                "eps": 1e-5,
            },
        ),
        {
            **{"x": "B C", "skip": "B C", "gate": "B C"},
            **{"bias": "C", "weight": "C", "shift": "C", "mean": "C", "var": "C"},
        },
        "x",
        {"gate": {"dimension 0 of size 1"}},
    ),
    "group_norm_silu": Good(
        lambda: (
            ops.group_norm_silu,
            {
                "x": x(2, 4, 3),
                "groups": 2,
                "weight": x(4),
                "bias": x(4),
                "scale": x(2, 4),
                "shift": x(2, 4),
                "eps": 1e-5,
                "activation": True,
            },
        ),
        {"x": "B C p *", "weight": "C", "bias": "C", "scale": "B C", "shift": "B C"},
        "x",
    ),
    "latent_matmul": Good(
        lambda: (
            ops.latent_matmul,
            {
                "z": x(3, 4),
                "A": x(2, 4, 4),
                "index": torch.tensor([1, 0, 1]),
                "alpha": 0.5,
                "bias": x(4),
                "precision": "exact",
            },
        ),
        {"z": "B N", "A": "k N N", "index": "B", "bias": "N"},
        "z",
    ),
    "rq_spline": Good(
        lambda: (
            ops.rq_spline,
            {
                "x": x(3, 2),
                "widths": x(3, 2, 4),
                "heights": x(3, 2, 4),
                "derivatives": x(3, 2, 3),
                "tails": "linear",
                "interval": (-2.0, 1.0),
                "min_width": 1e-3,
                "min_height": 1e-3,
                "min_derivative": 1e-3,
                "temperature": 1.0,
                "parameters": "softmax",
                "inverse": True,
                "log_det": True,
            },
        ),
        {"x": "B D", "widths": "B D K", "heights": "B D K", "derivatives": "B D J"},
        "x",
        {name: {"dimension 0 of size 1"} for name in ("widths", "heights", "derivatives")},
    ),
    "low_rank": Good(
        lambda: (ops.low_rank, {"x": x(3, 4), "U": x(4, 2), "V": x(4, 2), "alpha": 0.5}),
        {"x": "b N", "U": "N R", "V": "N R"},
        "x",
    ),
}
