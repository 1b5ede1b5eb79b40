"""norm_activate's kernels against float64: every norm, activation, gate, skip, option, shape and stride."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linfast.kernels import norm_activate as kernels
from torch import Tensor

import linfast as lf
from linfast.ops import norm_activate
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


def _activated(
    norm: str, activation: str | None = "silu", names: tuple[str, ...] = ("bias", "weight", "shift"),
    with_gradient: bool | None = None,
) -> Call:  # fmt: skip
    """Outputs, statistics and gradients, as a function of x and the named tensors.

    ``with_gradient``: the gradients of y alone, or those of u alone; None: of both.
    """

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        width, given = x.shape[1], {}
        if norm == "given":
            given = {"mean": torch.linspace(-1, 1, width).to(x), "var": torch.linspace(0.5, 2, width).to(x)}
        named = dict(zip(names, parameters, strict=True))
        found = norm_activate(x, activation, **named, **given, of_batch=norm == "of the batch", eps=1e-3)
        outputs = [t for t in found if t is not None]
        of = [t for t in found[:2] if t is not None and with_gradient in (None, t is found[1])]
        wanted = [t for t in (x, *parameters) if t.requires_grad]
        return (*outputs, *torch.autograd.grad(of, wanted, fixed_cotangents(*of), materialize_grads=True))

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
            y: Any = norm_activate(x, "tanh", *rest, of_batch=True)[1]
            return (y, *torch.autograd.grad(y, (x, *rest), hostile(cotangent.to(y))[name]))

        assert_within_budget(call, [hostile(x.detach())[name].requires_grad_(), *rest])

    def gated(r: Tensor, skip: Tensor, gate: Tensor, *, name: str) -> tuple[Tensor, ...]:
        both: Any = norm_activate(r, "tanh", skip=skip, gate=gate, of_batch=True)[:2]
        gradients = [hostile(cotangent.to(t))[name] for t in both]
        return (*both, *torch.autograd.grad(both, (r, skip, gate), gradients))

    for name in hostile(x.detach()):
        tensors = [hostile(t.detach())[name].requires_grad_() for t in _drawn((9, 6), (9, 6), (9, 6))]
        assert_within_budget(lambda *t, name=name: gated(*t, name=name), tensors)


def test_it_is_torchs_batch_norm() -> None:
    x, bias, weight, shift = (t.detach() for t in _inputs("of the batch", (30, 6)))
    mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    expected = F.elu(F.batch_norm(x + bias, mean, var, weight, shift, True, 1.0, 1e-3))
    with lf.backend("triton"):
        found = norm_activate(x, "elu", bias, weight, shift, of_batch=True, eps=1e-3)[1:]
    for got, value in zip(found, (expected, mean, var), strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("wide", ["bias", "gate", "weight", "shift", "mean", "var"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_float64_parameter_is_not_rounded(backend: str, wide: str) -> None:
    x = torch.randn(5, 3, device=DEVICE)
    given = {name: torch.rand(3, device=DEVICE) + 0.5 for name in ("bias", "weight", "shift", "mean", "var")}
    if wide == "gate":
        given["gate"] = torch.rand(1, 3, device=DEVICE)
    given[wide] = given[wide].double() + 1e-9
    exact = {name: t.double() for name, t in given.items()}
    with lf.backend(backend):
        u, y = norm_activate(x, "silu", **given)[:2]
    if u is not None:  # y is that of the rounded u
        assert torch.equal(u, ((x + exact["bias"]) * exact["gate"].sigmoid()).float())
        x, exact = u, {**exact, "bias": torch.zeros(3, device=DEVICE, dtype=torch.float64)}
        del exact["gate"]
    expected: Any = norm_activate(x.double(), "silu", **exact)[1]
    assert y is not None
    assert torch.equal(y, expected.float())


def test_numbers_are_those_of_the_kernels() -> None:
    assert (NORMS.index("given"), NORMS.index("of the batch")) == (kernels.GIVEN.value, kernels.OF_BATCH.value)


def _blocks(
    shape: tuple[int, int], names: tuple[str, ...], rows: int | None = None, **options: Any
) -> tuple[tuple[str, ...], list[Tensor]]:
    """The names, and x with a tensor for each; ``rows``: those of the gate."""
    shapes = {"skip": shape, "gate": (shape[0] if rows is None else rows, shape[1])}
    return names, _drawn(shape, *(shapes.get(name, shape[1:]) for name in names), **options)


_END = ("bias", "skip", "gate")
_BETWEEN = (*_END, "weight", "shift")


@pytest.mark.parametrize("names", [_END, ("gate",), ("skip",), ("bias", "skip")])
@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("shape", [(1, 1), *SHAPES])
def test_the_end_of_a_block(shape: tuple[int, int], rows: int | None, names: tuple[str, ...]) -> None:
    names, tensors = _blocks(shape, names, rows)
    assert_within_budget(_activated("none", None, names), tensors)


@pytest.mark.parametrize("with_gradient", [None, False, True])
@pytest.mark.parametrize("names", [_END, ("skip",), ("gate",)])
@pytest.mark.parametrize("norm", NORMS)
def test_between_two_blocks(norm: str, names: tuple[str, ...], with_gradient: bool | None) -> None:
    """u and y, and the gradients of both, of u alone, of y alone."""
    names = (*names, "weight", "shift") if norm != "none" else names
    for shape, rows in (((9, 6), None), ((300, 5), 1)):
        names, tensors = _blocks(shape, names, rows)
        assert_within_budget(_activated(norm, "elu", names, with_gradient), tensors)


def test_the_sum_is_returned_where_it_is_asked_for() -> None:
    for norm in ("none", "of the batch"):

        def call(x: Tensor, *rest: Tensor, norm: str = norm) -> tuple[Tensor, ...]:
            found: Any = norm_activate(x, "gelu", *rest, of_batch=norm == "of the batch", with_sum=True)[:2]
            return (*found, *torch.autograd.grad(found, (x, *rest), fixed_cotangents(*found)))

        assert_within_budget(call, _inputs(norm, (9, 6)))
    x = torch.randn(4, 3, device=DEVICE)
    for backend in ("auto", "triton"):
        with lf.backend(backend):
            assert norm_activate(x, "elu")[0] is None
            u, y = norm_activate(x, None)[:2]
        assert y is None
        assert u is not None
        assert torch.equal(u, x)


@pytest.mark.parametrize("only", range(4))
@pytest.mark.parametrize("rows", [9, 1])
def test_each_gradient_of_the_end_alone(only: int, rows: int) -> None:
    names, tensors = _blocks((9, 6), _END, rows)
    assert_within_budget(
        _activated("none", None, names), [t.detach().requires_grad_(i == only) for i, t in enumerate(tensors)]
    )


@pytest.mark.parametrize("only", range(6))
def test_each_gradient_between_blocks_alone(only: int) -> None:
    names, tensors = _blocks((9, 6), _BETWEEN)
    inputs = [t.detach().requires_grad_(i == only) for i, t in enumerate(tensors)]
    y_alone = True if only > 3 else None  # u does not depend on the norm's parameters
    assert_within_budget(_activated("of the batch", "silu", names, y_alone), inputs)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_blocks_in_half_precision(dtype: torch.dtype) -> None:
    names, tensors = _blocks((40, 6), _BETWEEN, dtype=dtype)
    assert_within_budget(_activated("of the batch", "silu", names), tensors)
    with_wide_gate = [
        t if name != "gate" else t.detach().float().requires_grad_()
        for name, t in zip(("x", *names), tensors, strict=True)
    ]
    assert_within_budget(_activated("given", "silu", names), with_wide_gate)


@pytest.mark.parametrize("norm", ["none", "of the batch"])
def test_y_is_that_of_the_stored_sum(norm: str) -> None:
    """In half precision the stored sum is rounded, and the next step's backward reads it."""
    x, skip = (torch.randn(40, 6, device=DEVICE, dtype=torch.float16) for _ in range(2))
    with lf.backend("triton"):
        u, y = norm_activate(x, "tanh", skip=skip, of_batch=norm == "of the batch")[:2]
        assert u is not None
        again = norm_activate(u, "tanh", of_batch=norm == "of the batch")[1]
    assert y is not None
    assert again is not None
    assert torch.equal(y, again)


def test_x_is_not_kept_where_the_sum_is_enough() -> None:
    """Without a gate the backward reads u, and x may be freed."""
    for gate in (False, True):
        names, tensors = _blocks((9, 6), _BETWEEN if gate else ("bias", "skip"))
        x = tensors[0].detach().requires_grad_()
        kept: list[int] = []

        def keep(t: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(t.data_ptr())
            return t

        with lf.backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            norm_activate(x, "elu", **dict(zip(names, tensors[1:], strict=True)), of_batch=gate)
        assert (x.data_ptr() in kept) == gate


def test_second_derivatives_are_the_references() -> None:
    loss = second_derivatives(lambda x, *p: norm_activate(x, "tanh", *p, of_batch=True)[1].pow(3).sum())
    assert_within_budget(loss, _inputs("of the batch", (7, 3)))

    def both(x: Tensor, skip: Tensor, *rest: Tensor) -> Tensor:
        found = norm_activate(
            x, "tanh", skip=skip, of_batch=True, **dict(zip(("bias", "gate"), rest, strict=False))
        )
        return sum(t.pow(3).sum() for t in found[:2])

    for shapes in (((4, 3), (4, 3), (3,), (4, 3)), ((4, 3), (4, 3))):
        assert_within_budget(second_derivatives(both), _drawn(*shapes))


def test_int64_offsets_and_a_second_run_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in NORMS:
        assert_same_bits(_activated(norm, names=_names(norm)), _inputs(norm, (300, 9)), monkeypatch, kernels)
    for rows in (300, 1):
        names, tensors = _blocks((300, 9), _BETWEEN, rows)
        assert_same_bits(_activated("of the batch", "silu", names), tensors, monkeypatch, kernels)


def test_nan_stays_in_its_column_and_an_empty_batch_has_zero_gradients() -> None:
    x = torch.randn(9, 6, device=DEVICE)
    x[3, 2] = float("nan")
    with lf.backend("triton"):
        y: Any = norm_activate(x, "relu", of_batch=True)[1]
        assert bool(y[:, 2].isnan().all())
        assert not bool(y[:, [0, 1, 3, 4, 5]].isnan().any())
        for rows in (None, 1):
            names, tensors = _blocks((0, 6), _END, rows)
            assert not any(bool(t.any()) for t in _activated("none", None, names)(*tensors))
        assert not any(bool(t.any()) for t in _activated("given")(*_inputs("given", (0, 6))))


def test_opcheck() -> None:
    x, bias, weight, shift = (t.detach() for t in _inputs("given", (5, 6)))
    mean, var, none = torch.zeros_like(bias), torch.ones_like(bias), torch.empty(0, device=DEVICE)
    skip, gate, g = (torch.randn_like(x) for _ in range(3))
    between = (x, bias, skip, gate, weight, shift, None, None, 2, 1e-3, 1, True)
    given = (x, bias, None, None, weight, shift, mean, var, 1, 1e-3, 4, False)
    bare = (x, None, None, None, None, None, None, None, 0, 1e-3, 0, False)
    end = (x, bias, None, gate[:1], None, None, None, None, 0, 1e-3, -1, True)
    plain_end = (x, None, skip, None, None, None, None, None, 0, 1e-3, -1, True)
    assert_registered(torch.ops.linfast.norm_activate.default, between, given, bare, end, plain_end)
    needs = [True] * 6 + [False] * 2
    assert_registered(
        torch.ops.linfast.norm_activate_backward.default,
        (x, x, bias, gate, weight, shift, None, None, mean, var, g, g, None, None, *between[8:], needs),
        (none, x, bias, None, weight, shift, mean, var, none, none, None, g, None, None, *given[8:],
         [True, True, False, False, True, True, False, False]),
        (none, x, *[None] * 6, none, none, None, g, None, None, *bare[8:], [True] + [False] * 7),
        (x, x, bias, gate[:1], *[None] * 4, none, none, g, None, None, None, *end[8:],
         [True, True, False, True] + [False] * 4),
        (x, None, *[None] * 6, none, none, g, None, None, None, *plain_end[8:],
         [True, False, True] + [False] * 5),
    )  # fmt: skip


def _of_both(x: Tensor, skip: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    u, y, *_ = norm_activate(x, "elu", bias, skip=skip, gate=gate)
    assert u is not None
    assert y is not None
    return u + 2 * y


def test_compiles_whole_and_runs_the_kernels() -> None:
    inputs = _inputs("of the batch", (9, 6))
    loss = squared_sum(lambda x, *p: norm_activate(x, "elu", *p, of_batch=True)[1])
    assert_compiles_whole(loss, inputs, "norm_activate")
    assert_compiles_whole(squared_sum(_of_both), _drawn((9, 6), (9, 6), (9, 6), (6,)), "norm_activate")
    loss = squared_sum(lambda x, skip: norm_activate(x, None, skip=skip)[0])
    assert_compiles_whole(loss, _drawn((9, 6), (9, 6)), "norm_activate")


def test_functional_transforms() -> None:
    loss = squared_sum(lambda x, *p: norm_activate(x, "elu", *p)[1])

    def transforms(x: Tensor, bias: Tensor) -> list[Tensor]:
        rows = torch.func.vmap(lambda row: torch.func.grad(loss)(row[None], bias)[0])(x)
        return [*torch.func.grad(loss, argnums=(0, 1))(x, bias), rows]

    assert_transforms(transforms, loss, [t.detach() for t in _inputs("none", (3, 4))])
    gates = squared_sum(_of_both)

    def of_gate(x: Tensor, skip: Tensor, gate: Tensor) -> list[Tensor]:
        rows = torch.func.vmap(lambda a, b: torch.func.grad(gates)(a[None], b[None], gate[:1])[0])(x, skip)
        return [*torch.func.grad(gates, argnums=(0, 1, 2))(x, skip, gate), rows]

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
    with pytest.raises(ValueError, match=r"gate must be \[3, 4\] or \[1, 4\] for x \(3, 4\); got \(2, 4\)"):
        norm_activate(x, "relu", gate=x[:2])
    with pytest.raises(ValueError, match=r"skip must be \[3, 4\] for x \(3, 4\); got \(1, 4\)"):
        norm_activate(x, "relu", skip=x[:1])
    with pytest.raises(ValueError, match=r"skip is torch\.float64 and x torch\.float32"):
        norm_activate(x, "relu", skip=x.double())
    with pytest.raises(ValueError, match="activation is None: without one there is no norm"):
        norm_activate(x, None, of_batch=True)
    with pytest.raises(TypeError, match="with_sum must be True or False"):
        norm_activate(x, "relu", with_sum=1)  # type: ignore[arg-type]
