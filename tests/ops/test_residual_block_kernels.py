"""norm_activate's and glu_skip's kernels against float64: every norm, activation, option, shape and stride."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linfast.kernels import norm_activate as kernels
from torch import Tensor

import linfast as lf
from linfast.ops import glu_skip, norm_activate
from linfast.ops.masked_autoregressive import MASKED_ACTIVATIONS
from linfast.ops.norm_activate import NORMS
from tests.ops.budget import DEVICE, HALF_DTYPES, assert_within_budget, hostile
from tests.ops.checks import (
    assert_compiles_whole,
    assert_registered,
    assert_same_bits,
    assert_transforms,
    fixed_cotangents,
    second_derivatives,
    squared_sum,
)

Call = Callable[..., tuple[Tensor, ...]]
SHAPES = [(2, 1), (5, 7), (17, 64), (300, 5), (600, 9)]  # more rows than a tile


def _drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: float = 0.0) -> list[Tensor]:
    return [
        (torch.randn(shape) + offset * (i == 0)).to(DEVICE, dtype).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def _activated(norm: str, activation: str = "silu", names: tuple[str, ...] = ("bias", "weight", "shift")) -> Call:
    """Output, statistics and gradients, as a function of x and the named parameters."""

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        width, given = x.shape[1], {}
        if norm == "given":
            given = {"mean": torch.linspace(-1, 1, width).to(x), "var": torch.linspace(0.5, 2, width).to(x)}
        named = dict(zip(names, parameters, strict=True))
        y, *found = norm_activate(x, activation, **named, **given, of_batch=norm == "of the batch", eps=1e-3)
        wanted = [t for t in (x, *parameters) if t.requires_grad]
        return (y, *(s for s in found if s is not None), *torch.autograd.grad(y, wanted, fixed_cotangents(y)[0]))

    return call


def _inputs(norm: str, shape: tuple[int, int], **options: Any) -> list[Tensor]:
    return _drawn(shape, *((shape[1],) for _ in range(1 if norm == "none" else 3)), **options)


def _names(norm: str) -> tuple[str, ...]:
    return ("bias",) if norm == "none" else ("bias", "weight", "shift")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_and_shape(norm: str, shape: tuple[int, int]) -> None:
    assert_within_budget(_activated(norm, names=_names(norm)), _inputs(norm, shape))


@pytest.mark.parametrize("activation", MASKED_ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", "of the batch"])
def test_every_activation(norm: str, activation: str) -> None:
    assert_within_budget(_activated(norm, activation, _names(norm)), _inputs(norm, (9, 6)))


@pytest.mark.parametrize("names", [(), ("bias",), ("weight",), ("shift",), ("bias", "shift")])
def test_what_is_not_given_is_one_or_zero(names: tuple[str, ...]) -> None:
    for norm in NORMS[1:] if {"weight", "shift"} & {*names} else NORMS:
        assert_within_budget(_activated(norm, names=names), _drawn((9, 6), *((6,) for _ in names)))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_accumulates_in_fp32(norm: str, dtype: torch.dtype) -> None:
    assert_within_budget(_activated(norm, names=_names(norm)), _inputs(norm, (40, 6), dtype=dtype))


def test_a_mean_a_thousand_times_the_spread_costs_only_the_inputs_own_digits() -> None:
    assert_within_budget(_activated("of the batch"), _inputs("of the batch", (300, 5), offset=1000.0))


@pytest.mark.parametrize("only", range(4))
@pytest.mark.parametrize("norm", ["given", "of the batch"])
def test_each_gradient_alone(norm: str, only: int) -> None:
    inputs = [t.detach().requires_grad_(i == only) for i, t in enumerate(_inputs(norm, (9, 6)))]
    assert_within_budget(_activated(norm), inputs)


def test_strides_of_inputs_and_of_the_incoming_gradient() -> None:
    x, *rest = _inputs("of the batch", (9, 6))
    cotangent = torch.randn(9, 6)
    for name in hostile(x.detach()):

        def call(x: Tensor, *rest: Tensor, name: str = name) -> tuple[Tensor, ...]:
            y = norm_activate(x, "tanh", *rest, of_batch=True)[0]
            return (y, *torch.autograd.grad(y, (x, *rest), hostile(cotangent.to(y))[name]))

        assert_within_budget(call, [hostile(x.detach())[name].requires_grad_(), *rest])

    def gated(*tensors: Tensor, name: str) -> tuple[Tensor, ...]:
        y = glu_skip(*tensors)
        return (y, *torch.autograd.grad(y, tensors, hostile(cotangent.to(y))[name]))

    for name in hostile(x.detach()):
        tensors = [hostile(t.detach())[name].requires_grad_() for t in _drawn((9, 6), (9, 6), (9, 6))]
        assert_within_budget(lambda *t, name=name: gated(*t, name=name), tensors)


def test_it_is_torchs_batch_norm() -> None:
    x, bias, weight, shift = (t.detach() for t in _inputs("of the batch", (30, 6)))
    mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    expected = F.elu(F.batch_norm(x + bias, mean, var, weight, shift, True, 1.0, 1e-3))
    with lf.backend("triton"):
        y, *found = norm_activate(x, "elu", bias, weight, shift, of_batch=True, eps=1e-3)
    for got, value in zip((y, *found), (expected, mean, var), strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("wide", ["bias", "weight", "shift", "mean", "var"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_float64_parameter_is_not_rounded(backend: str, wide: str) -> None:
    x = torch.randn(5, 3, device=DEVICE)
    given = {name: torch.rand(3, device=DEVICE) + 0.5 for name in ("bias", "weight", "shift", "mean", "var")}
    given[wide] = given[wide].double() + 1e-9
    exact = {name: t.double() for name, t in given.items()}
    with lf.backend(backend):
        y = norm_activate(x, "silu", **given)[0]
    assert torch.equal(y, norm_activate(x.double(), "silu", **exact)[0].float())


def test_numbers_are_those_of_the_kernels() -> None:
    assert (NORMS.index("given"), NORMS.index("of the batch")) == (kernels.GIVEN.value, kernels.OF_BATCH.value)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("shape", [(1, 1), *SHAPES])
def test_the_gate_and_the_skip(shape: tuple[int, int], rows: int | None, bias: bool) -> None:
    tensors = _drawn(shape, shape, (rows or shape[0], shape[1]), *[shape[1:]] * bias)
    assert_within_budget(_gated, tensors)


def _gated(*tensors: Tensor) -> tuple[Tensor, ...]:
    y = glu_skip(*tensors)
    return (y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], fixed_cotangents(y)[0]))


@pytest.mark.parametrize("only", range(4))
@pytest.mark.parametrize("rows", [9, 1])
def test_each_gradient_of_the_gate_alone(only: int, rows: int) -> None:
    tensors = _drawn((9, 6), (9, 6), (rows, 6), (6,))
    assert_within_budget(_gated, [t.detach().requires_grad_(i == only) for i, t in enumerate(tensors)])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_the_gate_in_half_precision(dtype: torch.dtype) -> None:
    assert_within_budget(_gated, _drawn((40, 6), (40, 6), (40, 6), (6,), dtype=dtype))


def test_second_derivatives_are_the_references() -> None:
    loss = second_derivatives(lambda x, *p: norm_activate(x, "tanh", *p, of_batch=True)[0].pow(3).sum())
    assert_within_budget(loss, _inputs("of the batch", (7, 3)))
    assert_within_budget(
        second_derivatives(lambda *t: glu_skip(*t).pow(3).sum()), _drawn((4, 3), (4, 3), (4, 3), (3,))
    )


def test_int64_offsets_and_a_second_run_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import linfast.kernels.glu_skip as gates

    for norm in NORMS:
        assert_same_bits(_activated(norm, names=_names(norm)), _inputs(norm, (300, 9)), monkeypatch, kernels)
    for rows in (300, 1):
        assert_same_bits(_gated, _drawn((300, 9), (300, 9), (rows, 9), (9,)), monkeypatch, gates)


def test_nan_stays_in_its_column_and_an_empty_batch_has_zero_gradients() -> None:
    x = torch.randn(9, 6, device=DEVICE)
    x[3, 2] = float("nan")
    with lf.backend("triton"):
        y = norm_activate(x, "relu", of_batch=True)[0]
        assert bool(y[:, 2].isnan().all())
        assert not bool(y[:, [0, 1, 3, 4, 5]].isnan().any())
        tensors = _drawn((0, 6), (0, 6), (1, 6), (6,))
        assert not any(bool(t.any()) for t in _gated(*tensors))
        assert not any(bool(t.any()) for t in _activated("given")(*_inputs("given", (0, 6))))


def test_opcheck() -> None:
    x, bias, weight, shift = (t.detach() for t in _inputs("given", (5, 6)))
    mean, var, none = torch.zeros_like(bias), torch.ones_like(bias), torch.empty(0, device=DEVICE)
    given = (x, bias, weight, shift, mean, var, 1, 1e-3, 4)
    batch = (x, bias, weight, shift, None, None, 2, 1e-3, 1)
    bare = (x, None, None, None, None, None, 0, 1e-3, 0)
    assert_registered(torch.ops.linfast.norm_activate.default, given, batch, bare)
    g, needs = torch.randn_like(x), [True] * 4 + [False] * 2
    assert_registered(
        torch.ops.linfast.norm_activate_backward.default,
        (*given[:6], none, none, g, None, None, *given[6:], needs),
        (*batch[:6], mean, var, g, None, None, *batch[6:], needs),
        (*bare[:6], none, none, g, None, None, *bare[6:], [True] + [False] * 5),
    )
    h, r, gate, b = (t.detach() for t in _drawn((5, 6), (5, 6), (5, 6), (6,)))
    assert_registered(torch.ops.linfast.glu_skip.default, (h, r, b, gate), (h, r, None, gate[:1]))
    assert_registered(
        torch.ops.linfast.glu_skip_backward.default,
        (r, b, gate, g, [True] * 4),
        (r, None, gate[:1], g, [True, False, False, True]),
    )


def test_compiles_whole_and_runs_the_kernels() -> None:
    inputs = _inputs("of the batch", (9, 6))
    loss = squared_sum(lambda x, *p: norm_activate(x, "elu", *p, of_batch=True)[0])
    assert_compiles_whole(loss, inputs, "norm_activate")
    assert_compiles_whole(squared_sum(glu_skip), _drawn((9, 6), (9, 6), (9, 6), (6,)), "glu_skip")


def test_functional_transforms() -> None:
    loss = squared_sum(lambda x, *p: norm_activate(x, "elu", *p)[0])

    def transforms(x: Tensor, bias: Tensor) -> list[Tensor]:
        rows = torch.func.vmap(lambda row: torch.func.grad(loss)(row[None], bias)[0])(x)
        return [*torch.func.grad(loss, argnums=(0, 1))(x, bias), rows]

    assert_transforms(transforms, loss, [t.detach() for t in _inputs("none", (3, 4))])
    gates = squared_sum(glu_skip)

    def of_gate(h: Tensor, r: Tensor, gate: Tensor) -> list[Tensor]:
        return list(torch.func.grad(gates, argnums=(0, 1, 2))(h, r, gate))

    assert_transforms(of_gate, gates, [t.detach() for t in _drawn((3, 4), (3, 4), (3, 4))])


def test_errors_name_the_argument_and_the_shape() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"weight must be \[4\] for x \(3, 4\); got \(3,\)"):
        norm_activate(x, "relu", weight=torch.ones(3))
    with pytest.raises(ValueError, match="weight and shift are those of a norm"):
        norm_activate(x, "relu", shift=torch.ones(4))
    with pytest.raises(ValueError, match="mean and var must be given together, and without of_batch"):
        norm_activate(x, "relu", mean=torch.ones(4))
    with pytest.raises(ValueError, match="x: Expected more than 1 value per channel"):
        norm_activate(x[:1], "relu", of_batch=True)
    with pytest.raises(ValueError, match="eps must be a finite number above 0"):
        norm_activate(x, "relu", of_batch=True, eps=0.0)
    with pytest.raises(ValueError, match=r"gate must be \[3, 4\] or \[1, 4\] for h \(3, 4\); got \(2, 4\)"):
        glu_skip(x, x, x[:2])
    with pytest.raises(ValueError, match=r"r is torch.float64 and h torch.float32"):
        glu_skip(x, x.double(), x)
