"""Valid calls of accelerate, files, the backend and the functions that read other code."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import linfast as lf
from linfast import io
from linfast.accelerate import find_mlp
from linfast.compat import linearizer as compat
from tests.arguments.calls import Good, flow, made, method, timed, x
from tests.compat import image_stand_in


class Coupling(nn.Module):
    """The coupling that is registered with register_adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, y: Tensor) -> Tensor:
        return y


def register_anew(**options: Any) -> None:
    lf.register_adapter(
        type("Fresh", (Coupling,), {}) if options["cls"] is Coupling else options.pop("cls"),
        **{k: v for k, v in options.items() if k != "cls"},
    )


def _saved() -> str:
    """A file in the working directory, which belongs to the test."""
    lf.save(lf.Dense(2), "model.safetensors")
    return "model.safetensors"


def entered(context: Callable[..., Any]) -> Callable[..., None]:
    def run(**arguments: Any) -> None:
        with context(**arguments):
            pass

    return run


@functools.cache
def _reference() -> nn.Module:
    options = {"width": 4, "channel_mult": (1,), "num_blocks": 1, "attention": (), "dropout": 0.0}
    g = image_stand_in.InverseUnet(1, 1, 4, **options)
    return image_stand_in.OneStepLinearizer(g, image_stand_in.LinearKernel(8, 2, 1))


_COUNT = itertools.count()
NOTHING_COMPUTED = {"x": {"it on the meta device"}}
REST: dict[str, Good] = {
    "accelerate": Good(
        lambda: (
            lf.accelerate,
            {
                "model": nn.Linear(2, 2),
                "precision": None,
                "memory": "store",
                "keep_defects": (),
            },
        ),
        allowed={"keep_defects": {"a dict"}},
    ),
    "Density": Good(
        lambda: (lf.Density, {"flow": flow(), "base": None, "embedding": None, "shape": (4,)}),
        allowed={"shape": {"a list"}},
    ),
    **{
        f"Density.{name}": Good(
            lambda name=name, of=of: (
                getattr(lf.Density(flow(context_features=2)), name),
                {**of, "context": x(3, 2)},
            ),
            {"x": "B D", "context": "B C"},
            allowed={"context": {"one rank fewer", "dimension 0 of size 1"}},
        )
        for name, of in (
            ("forward", {"x": x(3, 4)}),
            ("log_prob", {"x": x(3, 4)}),
            ("sample", {"n": 3}),
            ("rsample", {"n": 3}),
            ("sample_and_log_prob", {"n": 3}),
        )
    },
    "Density.standardize": method(lambda: lf.Density(flow()), "standardize", {"x": "n D"}, x=x(3, 4)),
    "FlowTransform": made(lf.FlowTransform, flow=flow(), cache_size=1),
    "FlowTransform.with_cache": method(lambda: lf.FlowTransform(flow()), "with_cache", cache_size=1),
    "restore": Good(lambda: (lf.restore, {"model": nn.Linear(2, 2)})),
    "register_adapter": Good(
        lambda: (
            register_anew,
            {
                "cls": Coupling,
                "conditioner": "net",
                "scale_map": lf.ScaleMap(),
                "order": "shift_first",
                "layout": "halves",
                "moves": "first",
                "log_det": False,
                "forward": None,
                "inverse": "inverse",
                "features": None,
            },
        ),
        allowed={"conditioner": {"a string"}, "features": {"a string"}},
    ),
    "find_mlp": Good(lambda: (find_mlp, {"module": nn.Linear(2, 2)})),
    "backend": Good(lambda: (entered(lf.backend), {"name": "reference"}), symbol=True),
    "freeze": Good(lambda: (entered(lf.freeze), {"model": flow()})),
    "plan": Good(
        lambda: (lf.plan, {"model": timed(), "x": x(3, 4), "t": 0.5}), {"x": "b D"}, allowed=NOTHING_COMPUTED
    ),
    "explain": Good(
        lambda: (lf.explain, {"model": timed(), "x": x(3, 4), "t": 0.5}), {"x": "b D"}, allowed=NOTHING_COMPUTED
    ),
    "save": Good(lambda: (lf.save, {"model": lf.Dense(2), "path": _saved()}), allowed={"path": {"a string"}}),
    "load": Good(lambda: (lf.load, {"path": _saved(), "device": "cpu"}), allowed={"path": {"a string"}}),
    "register": Good(lambda: (io.register, {"cls": type(f"Anew{next(_COUNT)}", (nn.Module,), {})})),
    "from_reference": Good(lambda: (lf.from_reference, {"linearizer": _reference(), "memory": "auto"})),
    "compat.G": made(compat.G, in_ch=1, image_resolution=2),
    "compat.Linearizer": made(compat.Linearizer, gx=flow(), linear_network=lf.Dense(4), gy=flow()),
    **{
        f"compat.Linearizer.{name}": Good(
            lambda name=name, given=given: (
                getattr(compat.Linearizer(flow(), lf.Dense(4)), name),
                {given: x(3, 4)},
            ),
            {given: "b D" + (" *" if name in ("A", "A_inverse", "gx_inverse", "gy_inverse") else "")},
            given,
        )
        for name, given in (
            ("forward", "x"),
            ("inverse", "y"),
            ("gx", "x"),
            ("gy", "y"),
            ("gx_inverse", "g_x"),
            ("gy_inverse", "g_y"),
            ("A", "g_x"),
            ("A_inverse", "g_y"),
        )
    },
}
