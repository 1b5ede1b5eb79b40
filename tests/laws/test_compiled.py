"""Every bijection and Linearizer under torch.compile(fullgraph=True): both directions, log_det or not, training.

Compiled code runs the kernels; its outputs and gradients equal those of eager code, within a few roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.flows import Bijection
from tests.laws import operators_zoo
from tests.laws.zoo import build, perturb, relative
from tests.marks import long
from tests.ops.budget import DEVICE, Outputs
from tests.ops.op_cases import gradients_of

BATCH = 3
SHORT = ("affine-odd-first", "masked-two", "actnorm", "mix-free", "permute", "flow-timed", "spline")
# One of each kind, for the long run; others only differ in options.
KINDS = (
    *SHORT,
    "flow-masked-timed",
    "masked-spline",
    "additive",
    "mix-lu",
    "householder",
    "inverse",
    "squeeze",
    "image-flow-even",
)


# Compiling C++ takes seconds. "mix-lu" is in "inverse", "squeeze" in the smaller image flow.
INDUCTOR = (*(name for name in KINDS[:-2] if name != "mix-lu"), "image-flow-one-channel")


@pytest.mark.parametrize("names", [KINDS, INDUCTOR], ids=["aot_eager", "inductor"])
def test_every_exported_bijection_is_compiled(names: tuple[str, ...]) -> None:
    exported = {v for v in vars(lf).values() if isinstance(v, type) and issubclass(v, Bijection)} - {Bijection}
    assert {type(module) for name in names for module in build(name)[0].modules()} >= exported


def _forward_alone(g: Bijection, x: Tensor) -> Outputs:
    return g(x), *g.inverse_and_log_det(1.5 * g(x))


def _inverse_alone(g: Bijection, x: Tensor) -> Outputs:
    z, log_det = g.forward_and_log_det(x)
    return z, log_det, g.inverse(1.5 * z)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *((name, _forward_alone) for name in SHORT),
        *long(*((name, _inverse_alone) for name in KINDS)),  # the other call by Inductor
    ],
)
def test_a_bijection_trains_compiled(name: str, call: Callable[..., Outputs]) -> None:
    g, shape = build(name, torch.float32)
    _assert_trains(g, call, torch.randn(BATCH, *shape), "aot_eager")


@pytest.mark.parametrize("name", long(*INDUCTOR))
def test_inductor_trains_a_bijection(name: str) -> None:
    g, shape = build(name, torch.float32)
    _assert_trains(g, _forward_alone, torch.randn(BATCH, *shape), "inductor")


def _conditional(**features: int) -> lf.Flow:
    return lf.coupling_flow(6, 2, (8,), mix="lu", **features)  # type: ignore[arg-type]


def _linearizer(A: lf.LatentOperator, g_y: bool = False) -> lf.Linearizer:
    return lf.Linearizer(lf.coupling_flow(6, 1, (8,)), A, lf.coupling_flow(6, 1, (8,)) if g_y else None)


# name -> (model, keywords beside x)
CONDITIONED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a time": (lambda: _conditional(time_features=4), {"t": 0.3}),
    "a time per sample": (lambda: _conditional(time_features=4), {"t": torch.linspace(0, 1, BATCH)}),
    "a context": (lambda: _conditional(context_features=4), {"context": torch.ones(BATCH, 4)}),
    "a time and a context": (
        lambda: _conditional(time_features=4, context_features=4),
        {"t": torch.tensor(0.3), "context": torch.ones(BATCH, 4)},
    ),
    "images in a context": (
        lambda: lf.image_flow(2, (1, 3), 1, 4, context_features=4),
        {"context": torch.ones(BATCH, 4)},
    ),
    "Dense": (lambda: _linearizer(lf.Dense(6)), {}),
    "Dense, two g": (lambda: _linearizer(lf.Dense(6), g_y=True), {}),
    "Diagonal": (lambda: _linearizer(lf.Diagonal(6)), {}),
    "LowRank": (lambda: _linearizer(operators_zoo.low_rank(1.3, 6, 2)), {}),
    "DepthwiseConv": (lambda: _linearizer(lf.DepthwiseConv(1, 3, (2, 3))), {}),
    "TimeLowRank": (lambda: _linearizer(lf.TimeLowRank(6, 2, 1.0, 4, 8)), {"t": 0.3}),
    "TimeLowRank, a time per sample": (
        lambda: _linearizer(lf.TimeLowRank(6, 2, 1.0, 4, 8)),
        {"t": torch.linspace(0, 1, BATCH)},
    ),
    "TimeDiagonal": (lambda: _linearizer(lf.TimeDiagonal(6, 2, 1.0, 4, 8)), {"t": torch.tensor(0.3)}),
    "TimeDepthwiseConv": (lambda: _linearizer(lf.TimeDepthwiseConv(1, 3, (2, 3), 4, (8,))), {"t": 0.3}),
}


CONDITIONED_SHORT = ("a time per sample", "Dense")


@pytest.mark.parametrize(
    "name", [*CONDITIONED_SHORT, *long(*(name for name in CONDITIONED if name not in CONDITIONED_SHORT))]
)
def test_what_takes_more_than_x_trains_compiled(name: str) -> None:
    make, given = CONDITIONED[name]

    def both_ways(g: Any, x: Tensor) -> Outputs:
        context = {k: v.to(x) if isinstance(v, Tensor) else v for k, v in given.items()}
        return g(x, **context), g.inverse(x, **context)

    shape = (2, 1, 3) if name.startswith("images") else (6,)
    _assert_trains(perturb(make()).float(), both_ways, torch.randn(BATCH, *shape), "aot_eager")


def _assert_trains(model: nn.Module, call: Callable[..., Outputs], x: Tensor, backend: str) -> None:
    """Outputs and gradients of the compiled call are those of the call."""
    model, x = model.to(DEVICE), x.to(DEVICE).requires_grad_()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.compiler.reset()
    with lf.backend("triton"):
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        got, expected = ([*o, *gradients_of(o, wanted)] for o in (compiled(model, x), call(model, x)))
    assert [value is None for value in got] == [value is None for value in expected]
    for value, truth in zip(got, expected, strict=True):
        assert truth is None or relative(value, truth) <= 64 * torch.finfo(torch.float32).eps


def test_compiling_a_flow_gives_no_warning_of_a_cache(recwarn: pytest.WarningsRecorder) -> None:
    """torch.compile warns of functools.lru_cache, which it does not see through."""
    torch._dynamo.reset()
    p, x = lf.Density(lf.coupling_flow(4, 2, (8,))), torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(p, fullgraph=True, backend="eager")(x), p(x))
    assert not [str(warning.message) for warning in recwarn if "lru_cache" in str(warning.message)]
