"""Faults inside an argument: in its contents, in its return value, or in combination with another argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast import examples, ops, training
from linfast.operators import BlockDiagonal
from tests.arguments.calls import flow, linearizer, timed, x
from tests.arguments.of_rest import Coupling
from tests.arguments.of_sampling import styles

NAN = torch.full((4, 4), torch.nan)
INFINITE = torch.eye(4) / 0.0
OPERATORS = {
    "dense": lf.Dense.of(NAN),
    "infinite": lf.Dense.of(INFINITE),
    "diagonal": lf.Diagonal.of(NAN[0]),
    "low rank": lf.LowRank(1.0, NAN[:, :1], x(4, 1)),
    "alpha": lf.LowRank(torch.tensor(torch.nan), x(4, 1), x(4, 1)),
    "blocks": BlockDiagonal(NAN[None]),
    "half": lf.Dense.of(NAN.half()),
    "product": lf.Dense.of(NAN) @ lf.Dense(4),
    "scaled": torch.tensor(torch.inf) * lf.Dense(4),
}
ALGEBRA = {
    "svd": lambda A: A.svd(),
    "eig": lambda A: A.eig(),
    "pinv": lambda A: A.pinv(),
    "rank": lambda A: A.rank(),
    "norm": lambda A: A.norm("nuc"),
    "f.pinv": lambda A: lf.Linearizer(flow(), A).pinv(),
    "f.svd": lambda A: lf.Linearizer(flow(), A).svd(),
}


@pytest.mark.parametrize("what", ALGEBRA)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_that_is_not_finite_has_no_decomposition(name: str, what: str) -> None:
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        ALGEBRA[what](OPERATORS[name])


def test_what_overflows_has_no_decomposition() -> None:
    with pytest.raises(ValueError, match="Product has NaN or infinite values, or overflows"):
        (lf.Dense.of(1e30 * x(4, 4)) @ lf.Dense.of(1e30 * x(4, 4))).svd()
    with pytest.raises(ValueError, match="basis has NaN"):
        lf.InducedSpace(flow()).project(x(3, 4), NAN)


class Returns(nn.Module):
    """A conditioner, or an objective's distance, that returns something else."""

    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.value = value

    def forward(self, z: Tensor) -> Any:
        return self.value(z)


@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_log_det"])
@pytest.mark.parametrize("coupling", [lf.AffineCoupling, lf.AdditiveCoupling])
@pytest.mark.parametrize(
    "value",
    [
        lambda z: (z, z), lambda z: None, lambda z: [z], lambda z: np.ones((3, 4), np.float32), lambda z: 1.0,
        lambda z: x(3, 4).to_sparse(), lambda z: x(3, 4).long(), lambda z: x(3, 4).to("meta"),
        lambda z: torch.nested.nested_tensor([x(4)] * 3), lambda z: x(3),
    ],
)  # fmt: skip
def test_what_a_conditioner_returns(coupling: Any, method: str, value: Callable[[Tensor], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="conditioner"):
        getattr(coupling(Returns(value), 4), method)(x(3, 4))


def stack(*entry: Any) -> Callable[[], Any]:
    layer = ops.CouplingLayer([x(5, 2), x(4, 5)], [x(5), x(4)], map=ops.AffineMap(*entry))
    options: Any = {"activation": "silu", "scale_map": lf.ScaleMap(), "inverse": True, "log_det": True}
    return lambda: ops.coupling_stack(x(3, 4), [layer], **options)


def projecting(data: Tensor | None = None, **options: Any) -> Callable[[], Any]:
    f = linearizer(lf.Projection(4))
    return lambda: training.IdempotentGeneration(f, x(9, 4) if data is None else data, **options)


def taught(**options: Any) -> Callable[[], Any]:
    given: dict[str, Any] = {"conditioner": "net", "scale_map": lf.ScaleMap(), **options}
    return lambda: lf.register_adapter(type("Taught", (Coupling,), {}), **given)


def apart(a: Tensor, b: Tensor) -> Tensor:
    return a - b


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "a map's inverse": (stack(torch.eye(4), None, torch.eye(3)), r"map.inverse must be \(4, 4\).*got \(3, 3\)"),
    "a diagonal's inverse": (stack(torch.ones(4), None, torch.eye(4)), r"map.inverse must be \(4,\)"),
    "an inverse of words": (stack(torch.eye(4), None, "a"), "map.inverse must be a tensor; got 'a'"),
    "an inverse of integers": (stack(torch.eye(4), None, torch.eye(4).long()), "map.inverse must be floating"),
    "a log_det per feature": (stack(torch.eye(4), None, None, x(4)), r"map.log_det must be .* 0-d"),
    "a log_det of words": (stack(torch.eye(4), None, None, "a"), "map.log_det must be"),
    "a log_det of NaN": (stack(torch.eye(4), None, None, torch.nan), "map.log_det must be"),
    "a layer of numbers": (
        lambda: ops.coupling_stack(
            x(3, 4), [ops.CouplingLayer(3, 4)], activation="silu", scale_map=lf.ScaleMap()  # type: ignore[arg-type]
        ),
        r"layers\[0\].weights must be a sequence",
    ),
    "an unknown option": (projecting(foo=1), "'foo'"),
    "data of another width": (projecting(x(9, 5)), "data must have 4 numbers per row"),
    "data of another rank": (projecting(x(9, 2, 2)), "data must have 4 features"),
    "data of another dtype": (projecting(x(9, 4).double()), "data is torch.float64"),
    "a core without time": (
        lambda: training.OneStepFlowMatching(linearizer(), x(9, 4)), "f.A must be a time-dependent operator",
    ),
    "a loss's core without time": (lambda: training.one_step_loss(linearizer(), x(9, 4)), "f.A must be"),
    "no rows": (lambda: training.one_step_loss(timed(), x(0, 4)), "x_1 must be .* have at least one row"),
    "a distance per row": (
        lambda: training.one_step_loss(timed(), x(3, 4), distance=apart), "distance must return a 0-d tensor",
    ),
    "a projection's distance per row": (
        lambda: training.idempotent_loss(linearizer(lf.Projection(4)), x(3, 4), distance=apart),
        "distance must return a 0-d tensor",
    ),
    "a distance of None": (
        lambda: training.StyleTransfer(styles(), x(3, 2, 2, 2), x(2, 3, 2, 2, 2), lambda a, b: None)(  # type: ignore
            {"style": torch.tensor([0]), "content": torch.tensor([0])}
        ),
        "distance must return a 0-d tensor.*got NoneType",
    ),
    "contents of other channels": (
        lambda: training.StyleTransfer(styles(), x(3, 3, 2, 2), x(2, 3, 3, 2, 2)), "contents must have 2 features",
    ),
    "no model": (
        lambda: examples.Trainer(training.Objective(), examples.TrainSettings(1)), "objective.model must be a",
    ),
    "no styles": (lambda: styles().compose(), "names must hold at least one"),
    "an unknown style": (lambda: styles().compose("a", "c"), "names: no style 'c'"),
    "a style that is not a number": (lambda: bank()["a"], "k must be a whole number"),
    "half a style": (lambda: bank()[1.5], "k must be a whole number"),
    "a true style": (lambda: bank()[True], "k must be a whole number"),
    "an array times an operator": (lambda: np.ones((2, 2)) * lf.Dense(4), "factor must be"),
    "an array times a Linearizer": (lambda: np.ones((2, 2)) * linearizer(), "factor must be"),
    "an array after an operator": (lambda: np.ones((4, 4)) @ lf.Dense(4), "unsupported operand"),
    "no conditioner's name": (taught(conditioner=""), "conditioner must name an attribute"),
    "a file's path for a name": (taught(conditioner="net/0"), "conditioner must name an attribute"),
    "two names": (taught(features="a b"), "features must name an attribute"),
    "a class of maps": (taught(scale_map=lf.ScaleMap), "scale_map must be a function"),
    "forward as its inverse": (taught(inverse="forward"), "inverse must name a method"),
}  # fmt: skip


def bank() -> Any:
    return training.GeneratedDepthwise(2, 2, 1, (2, 2), 4, 4)


@pytest.mark.parametrize("what", CASES)
def test_it_is_named(what: str) -> None:
    call, match = CASES[what]
    with pytest.raises((TypeError, ValueError), match=match):
        call()


def test_what_goes_well_beside_it() -> None:
    assert len(list(bank())) == 2
    assert isinstance(bank()[np.int64(1)], lf.DepthwiseConv)
    assert torch.equal((np.float64(2) * lf.Dense.of(torch.eye(4))).to_dense(), 2 * torch.eye(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_takes_its_own_dtypes(weights: torch.dtype, dtype: torch.dtype) -> None:
    g, f = flow(time_features=4).to(weights), linearizer().to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        for other in (torch.float64, *{torch.float16} - {weights}):
            for call in (lambda v: g(v, t=0.5), f, f.inverse):
                with pytest.raises(ValueError, match=f"[xyz] is {other}"):
                    call(x(3, 4).to(other))
        for given in (dtype, weights):
            assert g.inverse(g(x(3, 4).to(given), t=0.5), t=0.5).isfinite().all()
            assert f(x(3, 4).to(given)).isfinite().all()
