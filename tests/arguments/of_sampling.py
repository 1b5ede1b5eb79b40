"""Valid calls of sampling and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import linfast as lf
from linfast import examples, training
from tests.arguments.calls import Good, flow, linearizer, made, method, timed, x


def drawn(call: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The items of an iterator; its arguments are checked before the first item is requested."""
    return lambda **arguments: list(result) if (result := call(**arguments)) is not None else []


def styles() -> training.ModularStyle:
    operators_ = [lf.DepthwiseConv(2, 1, (2, 2)), lf.DepthwiseConv(2, 1, (2, 2))]
    return training.ModularStyle(lf.image_flow(2, 2, 2, 4), operators_, ("a", "b"))


def labelled() -> lf.Linearizer:
    return lf.Linearizer(flow(context_features=2), timed().A, flow())


def objective() -> training.Objective:
    return training.OneStepFlowMatching(timed(), x(8, 4))


def trained(**arguments: Any) -> Any:
    return examples.Trainer(**arguments).run(progress=False)


ONE_STEP = {"steps": 3, "method": "midpoint", "stop": 0.5}

SAMPLING: dict[str, Good] = {
    "collapse": Good(lambda: (lf.collapse, {"A_t": timed().A, "tol": 0.1, **ONE_STEP})),
    "generator": Good(lambda: (lf.generator, {"f": timed(), "tol": 0.1, **ONE_STEP})),
    "sample": Good(
        lambda: (lf.sample, {"f": timed(), "noise": x(3, 4), "one_step": False, "return_path": True, **ONE_STEP}),
        {"noise": "b D"},
        "noise",
    ),
    "invert": Good(lambda: (lf.invert, {"f": timed(), "y": x(3, 4), **ONE_STEP}), {"y": "b D"}, "y"),
    "sample_stream": Good(
        lambda: (
            drawn(lf.sample_stream),
            {
                "f": timed(),
                "count": 3,
                "batch_size": 2,
                "out": None,
                "seed": 0,
                "noise_shape": (4,),
                "block_size": 2,
                "progress": False,
                "cuda_graph": False,
                "overwrite": False,
                **ONE_STEP,
            },
        ),
        allowed={"out": {"a string"}},
    ),
    "one_step_loss": Good(
        lambda: (
            training.one_step_loss,
            {
                "f": labelled(),
                "x_1": x(3, 4),
                "x_0": x(3, 4),
                "latent_noise": 0.1,
                "distance": F.mse_loss,
                "likelihood": 0.1,
                "t": torch.tensor([0.1, 0.2, 0.3]),
                "e_1": x(3, 4),
                "e_0": x(3, 4),
                "context": x(3, 2),
            },
        ),
        {"x_1": "B D", "x_0": "B D", "t": "B", "e_1": "B D", "e_0": "B D", "context": "B C"},
        allowed={"context": {"dimension 0 of size 1"}},
    ),
    "idempotent_loss": Good(
        lambda: (
            training.idempotent_loss,
            {
                "f": linearizer(lf.Projection(4)),
                "x": x(3, 4),
                "rank": 0.1,
                "isometry": 0.1,
                "denoising": 0.1,
                "noise": 0.1,
                "e": x(3, 4),
                "distance": F.mse_loss,
            },
        ),
        {"x": "B D", "e": "B D"},
    ),
    "OneStepFlowMatching": Good(
        lambda: (
            training.OneStepFlowMatching,
            {
                "f": labelled(),
                "data": x(8, 4),
                "latent_noise": 0.1,
                "distance": F.mse_loss,
                "likelihood": 0.0,
                "dequantise": 0.0,
                "context": x(8, 2),
            },
        ),
        {"data": "n D", "context": "n c"},
    ),
    "IdempotentGeneration": Good(
        lambda: (
            training.IdempotentGeneration,
            {
                "f": linearizer(lf.Projection(4)),
                "data": x(8, 4),
                "settle": 0.5,
                "rank": 0.1,
                "isometry": 0.1,
                "denoising": 0.1,
                "noise": 0.1,
                "distance": F.mse_loss,
            },
        ),
        {"data": "n D"},
    ),
    "GeneratedDepthwise": made(
        training.GeneratedDepthwise, count=2, channels=2, kernel_size=1, size=(2, 2), features=4, hidden=4
    ),
    "ModularStyle": Good(
        lambda: (
            training.ModularStyle,
            {"g": styles().g, "operators": [lf.Dense(8), lf.Dense(8)], "names": ("a", "b")},
        ),
        allowed={"names": {"a list of strings"}},
    ),
    "ModularStyle.operator": method(styles, "operator", name="a"),
    "ModularStyle.style": method(styles, "style", name="a"),
    "ModularStyle.interpolate": method(styles, "interpolate", first="a", second="b", alpha=0.5),
    "ModularStyle.decode": Good(
        lambda: (styles().decode, {"z": x(3, 2, 2, 2), "style": torch.tensor([0, 1, 0])}),
        {"z": "B C H W", "style": "B"},
        "z",
    ),
    "StyleTransfer": Good(
        lambda: (
            training.StyleTransfer,
            {
                "model": styles(),
                "contents": x(3, 2, 2, 2),
                "styled": x(2, 3, 2, 2, 2),
                "distance": F.mse_loss,
            },
        ),
        {"contents": "N C H W", "styled": "K N C H W"},
    ),
    "Trainer": Good(
        lambda: (
            trained,
            {"objective": objective(), "settings": examples.TrainSettings(1, 2), "checkpoint": None, "about": None},
        ),
        allowed={"checkpoint": {"a string"}},
    ),
    "Trainer.run": Good(
        lambda: (examples.Trainer(objective(), examples.TrainSettings(1, 2)).run, {"progress": False})
    ),
    "TrainSettings": made(
        examples.TrainSettings,
        steps=2,
        batch=2,
        learning_rate=0.1,
        warmup=0.1,
        clip=1.0,
        ema=0.1,
        precision="fp32",
        seed=0,
        checkpoint_every=2,
    ),
    "TrainSettings.learning_rate_at": method(lambda: examples.TrainSettings(4), "learning_rate_at", step=2),
}
