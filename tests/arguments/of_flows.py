"""Valid calls of flows, conditioners and scale maps."""

from __future__ import annotations

import torch

import linfast as lf
from linfast import flows
from linfast.flows import reversible
from tests.arguments.calls import Good, flow, made, method, x


def step() -> reversible.Step:
    g = flow()
    return reversible.Step.of("g", g, lambda v, _: (g(v), None), lambda v, _: g.inverse(v))


FLOW = {
    "activation": "silu", "transform": "spline", "bins": 4, "tail_bound": 2.0, "scale_map": None,
    "order": "shift_first", "actnorm": False, "mix": "lu", "time_features": 0, "memory": "auto", "coupling": None,
}  # fmt: skip

SPLINE = {
    "bins": 4, "tail_bound": 2.0, "tails": "linear", "min_width": 0.01, "min_height": 0.02, "min_derivative": 0.03,
}  # fmt: skip

ONE_ROW = {"context": {"dimension 0 of size 1"}}

FLOWS: dict[str, Good] = {
    "MLP": made(
        lf.MLP,
        n_in=2,
        n_out=4,
        hidden=(4,),
        activation="silu",
        bias=True,
        time_features=0,
        context_features=0,
        zero_last=True,
    ),
    "MLP.forward": Good(
        lambda: (
            lf.MLP(2, 4, (4,), time_features=4, context_features=3),
            {"x": x(3, 2), "t": 0.5, "context": x(3, 3)},
        ),
        {"x": "B N", "context": "B C"},
        allowed=ONE_ROW,
    ),
    "MLP.folded": Good(
        lambda: (
            lf.MLP(2, 4, (4,), time_features=4, context_features=3).folded,
            {"t": 0.5, "context": x(1, 3)},
        ),
        {"context": "R C"},
    ),
    "ResidualMLP": made(
        lf.ResidualMLP,
        n_in=2,
        n_out=4,
        hidden=4,
        blocks=1,
        activation="elu",
        dropout=0.1,
        batch_norm=True,
        time_features=0,
        context_features=0,
        zero_last=True,
    ),
    "ResidualMLP.forward": Good(
        lambda: (
            lf.ResidualMLP(2, 4, 4, time_features=4, context_features=3),
            {"x": x(3, 2), "t": 0.5, "context": x(3, 3), "transposed": False},
        ),
        {"x": "B N", "context": "B C"},
        allowed=ONE_ROW,
    ),
    "MaskedMLP": Good(
        lambda: (
            lf.MaskedMLP,
            {
                "features": 3,
                "per_feature": 2,
                "hidden": (4, 4),
                "activation": "relu",
                "residual": False,
                "time_features": 0,
                "context_features": 0,
                "feature_order": torch.tensor([2, 0, 1]),
            },
        ),
        {"feature_order": "C"},
        allowed={"feature_order": {"it as a list"}},
    ),
    **{
        f"MaskedMLP.{name}": Good(
            lambda name=name: (
                getattr(lf.MaskedMLP(2, 2, (4,), time_features=4, context_features=3), name),
                {"x": x(3, 2), "t": 0.5, "context": x(3, 3)},
            ),
            {"x": "B N", "context": "B C"},
            allowed=ONE_ROW,
        )
        for name in ("forward", "extras")
    },
    "MaskedAutoregressive": made(
        lf.MaskedAutoregressive,
        conditioner=lf.MaskedMLP(3, 11, (4,)),
        scale_map="smooth",
        order="scale_first",
        **SPLINE,
    ),
    "autoregressive_flow": made(
        lf.autoregressive_flow,
        features=4,
        depth=2,
        hidden=(4, 4),
        residual=True,
        feature_order="random",
        context_features=0,
        **{k: v for k, v in FLOW.items() if k != "coupling"} | {"order": "scale_first"},
    ),
    "ConvNet": made(
        lf.ConvNet,
        channels_in=2,
        channels_out=4,
        width=4,
        activation="silu",
        time_features=0,
        context_features=0,
    ),
    "ConvNet.forward": Good(
        lambda: (
            lf.ConvNet(2, 4, 4, time_features=4, context_features=3),
            {"x": x(2, 2, 5, 5), "t": 0.5, "context": x(2, 3)},
        ),
        {"x": "B C h w", "context": "B N"},
        allowed=ONE_ROW,
    ),
    "UNet": made(
        lf.UNet,
        channels_in=2,
        channels_out=4,
        resolution=4,
        width=4,
        channel_mult=(1, 1),
        blocks=1,
        attention_resolutions=(4,),
        dropout=0.0,
        time_features=4,
        nchw_dropout=False,
        context_features=0,
    ),
    "UNet.forward": Good(
        lambda: (
            lf.UNet(2, 4, 4, 4, (1,), 1, (), 0.0, 4, context_features=3),
            {"x": x(2, 2, 4, 4), "t": 0.5, "context": x(2, 3)},
        ),
        {"x": "B C h w", "context": "B N"},
        allowed=ONE_ROW,
    ),
    "SinusoidalEmbedding": made(flows.SinusoidalEmbedding, features=4, max_period=100.0, scale=1.0),
    "SinusoidalEmbedding.forward": Good(
        lambda: (flows.SinusoidalEmbedding(4).forward, {"t": x(3)}),
        {"t": "b"},
        "t",
        {"t": {"a meta tensor", "it on the meta device"}},
    ),
    "ActNorm": made(lf.ActNorm, features=4, min_std=0.1),
    "ActNorm.initialize": Good(lambda: (lf.ActNorm(4).initialize, {"x": x(5, 4)}), {"x": "b C *"}),
    "AdditiveCoupling": made(lf.AdditiveCoupling, conditioner=lf.MLP(2, 2, (4,)), features=4, moves="first"),
    "AffineCoupling": made(
        lf.AffineCoupling,
        conditioner=lf.MLP(2, 4, (4,)),
        features=4,
        moves="first",
        scale_map="smooth",
        order="shift_first",
        layout="halves",
    ),
    "SplineCoupling": made(
        lf.SplineCoupling,
        conditioner=lf.MLP(2, 22, (4,)),
        features=4,
        moves="first",
        layout="bins_first",
        **SPLINE,
    ),
    "Bijection.forward": method(flow, "forward", {"x": "b D"}, x=x(3, 4)),
    "Bijection.inverse": method(flow, "inverse", {"z": "b D"}, z=x(3, 4)),
    "Bijection.forward_and_log_det": method(lambda: lf.Mix(4), "forward_and_log_det", {"x": "b D *"}, x=x(3, 4)),
    "Bijection.inverse_and_log_det": method(
        lambda: lf.Inverse(lf.Mix(4)), "inverse_and_log_det", {"z": "b D *"}, z=x(3, 4)
    ),
    "Conditioned": made(flows.Conditioned, bijection=flow(), context={"t": 0.5}),
    "Inverse": made(lf.Inverse, bijection=flow()),
    "Flow": made(lf.Flow, bijections=[lf.Mix(4)], features=4, shape=(4,), memory="auto"),
    "Mix": made(lf.Mix, features=4, kind="lu"),
    "Householder": made(lf.Householder, features=4, count=2),
    "Permute": Good(
        lambda: (lf.Permute, {"features": 3, "permutation": torch.tensor([2, 0, 1])}),
        {"permutation": "C"},
        allowed={"permutation": {"it as a list", "it as an array", "it on the meta device"}},
    ),
    "Squeeze": made(lf.Squeeze, features=2),
    "coupling_flow": made(lf.coupling_flow, features=4, depth=2, hidden=(4,), context_features=0, **FLOW),
    "image_flow": made(
        lf.image_flow,
        channels=2,
        resolution=(2, 2),
        depth=2,
        width=4,
        conditioner="conv",
        unet_options=None,
        context_features=0,
        **FLOW,
    ),
    "same_space": Good(lambda: (flows.same_space, {"g": flow(), "h": flow()})),
    "reversible": Good(
        lambda: (
            reversible.reversible,
            {"steps": [step()], "x": x(3, 4), "context": {}, "guard": None, "memory": "auto"},
        ),
        {"x": "b D"},
        "x",
    ),
    "ScaleMap": made(lf.ScaleMap, kind="softplus", bound=3.0, floor=0.1),
    **{
        f"ScaleMap.{name}": Good(
            lambda name=name, given=given: (getattr(lf.ScaleMap(), name), {given: 0.2 * x(3)}),
            {given: "b *"},
            given,
            {
                given: {
                    "it on the meta device",
                    "a tensor [2]",
                    "one rank more in front",
                    "0-d",
                    "one rank fewer",
                    "a meta tensor",
                }
            },
        )
        for name, given in (("log_scale", "raw"), ("derivative", "raw"), ("inverse", "log_scale"))
    },
}
