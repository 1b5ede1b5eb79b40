"""The model of rounding: what it leaves unchanged, what it changes and how far, and which errors it allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from linfast.bench.rounding import Rounding, allowed_error, allowed_errors, operand_rounding, relative_error
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
DRAWS = 6


def _draws(function: Callable[..., Tensor], *inputs: Tensor) -> list[float]:
    """The function's error in each run."""
    errors, truth = [], function(*(t.double() for t in inputs))
    for seed in range(DRAWS):
        with Rounding(seed):
            errors.append(relative_error(function(*inputs), truth))
    return errors


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat((x, -x)).flip(0).mT.contiguous(),
        lambda x: 0.25 * x.relu().clamp(max=1.5),
        lambda x: torch.where(x > 0, x, 0.0)[:, 1:].abs(),
        lambda x: x.half(),
        lambda x: F.pad(x, (1, 2)).sum(0, keepdim=True)[:, :1],
    ],
    ids=["moves", "powers of two", "masks", "a cast is rounded once", "sums of zeros"],
)
def test_what_is_exact_stays(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(7, 5)
    for seed in (0, None):
        with Rounding(seed):
            y = function(x)
        assert torch.equal(y, function(x))


def test_without_a_seed_every_operation_is_rounded_to_nearest() -> None:
    x, y = torch.randn(2, 50, 60)
    with Rounding():
        product, sine = x @ y.mT, x.sin()
    assert torch.equal(product, (x.double() @ y.double().mT).float())
    assert torch.equal(sine, x.double().sin().float())


@pytest.mark.parametrize(
    ("function", "units"),
    [
        (lambda x: x * 1.1, 1),
        (lambda x: x.clamp(max=2).exp(), 2),
        (lambda x: x @ x.mT, math.sqrt(400) / 2),
        (lambda x: (x + 5).sum(1), math.sqrt(400) / 2),
        (lambda x: (x + 5).mean(1), math.sqrt(400) / 2),
        (lambda x: torch.linalg.inv(x[:, :30] + 30 * torch.eye(30).to(x)), math.sqrt(30)),
    ],
    ids=["product", "exponential", "matrix product", "sum", "mean", "inverse"],
)
def test_errors_are_of_the_size_that_the_model_says(function: Callable[[Tensor], Tensor], units: float) -> None:
    x = torch.randn(30, 400)
    errors = _draws(function, x)
    assert units / 6 * EPS < min(errors) < max(errors) < units * EPS
    assert len(set(errors)) == DRAWS
    assert errors == _draws(function, x)


def test_in_place_operations_move_what_they_write() -> None:
    x = torch.randn(40)
    with Rounding(0):
        y = x.clone()
        y[10:].mul_(1.1)
        expected = torch.cat((x[:10], x[10:] * 1.1))
    assert torch.equal(y[:10], x[:10])
    assert 0 < relative_error(y, torch.cat((x[:10], x[10:].double() * 1.1))) < EPS
    assert 0 < relative_error(y, expected) < 2 * EPS


@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_step_by_step_is_torchs(affine: bool) -> None:
    x = torch.randn(3, 6, 5).requires_grad_()
    parameters = [torch.randn(6).requires_grad_() for _ in range(2)] if affine else []

    def results(dtype: torch.dtype) -> list[Tensor]:
        tensors = [t.to(dtype) for t in (x, *parameters)]
        y = F.group_norm(tensors[0], 2, *tensors[1:])
        return [y, *torch.autograd.grad((y * torch.arange(90).view(3, 6, 5).to(y)).sum(), (x, *parameters))]

    with Rounding():
        got = results(torch.float32)
    for value, truth in zip(got, results(torch.float64), strict=True):
        assert relative_error(value, truth) < 4 * EPS


def test_the_allowance_takes_one_number_to_vary_and_thousands_not_to() -> None:
    assert allowed_error([2e-6] * 6, torch.float32) == pytest.approx(4e-6)
    assert allowed_error([1e-6, 3e-6], torch.float32) == pytest.approx(2 * math.sqrt(5e-12) + 6e-6)
    assert allowed_error([0.0], torch.float16) == torch.finfo(torch.float16).eps


def _one_by_one(x: Tensor, w: Tensor) -> Tensor:
    """A sum term by term, as one thread computes it."""
    total = x.new_zeros(x.shape[0])
    for i in range(x.shape[1]):
        total = total + x[:, i] * w[i]
    return total


@pytest.mark.parametrize(
    ("computed", "right"),
    [
        (lambda x, w: x @ w, True),
        (_one_by_one, True),
        (lambda x, w: (x.half() @ w.half()).float(), False),
        (lambda x, w: x.bfloat16().float() @ w, False),
        (lambda x, w: x[:, :-1] @ w[:-1], False),
        (lambda x, w: -(x @ w), False),
    ],
    ids=["a product", "one after the other", "in half precision", "one operand's half", "a term too few", "a sign"],
)
def test_what_is_allowed(computed: Callable[[Tensor, Tensor], Tensor], right: bool) -> None:
    x, w = torch.randn(20, 500), torch.randn(500)
    truth = x.double() @ w.double()
    (allowed,) = allowed_errors(lambda: [x @ w], [truth])
    assert (relative_error(computed(x, w), truth) <= allowed) == right


def test_a_missing_output_has_no_allowance() -> None:
    assert allowed_errors(lambda: [None, torch.ones(2)], [None, torch.ones(2).double()]) == [0.0, EPS]


@pytest.mark.parametrize(("precision", "unit"), [("high", 2.0**-17), ("tf32", 2.0**-11), ("fast", 2.0**-8)])
def test_operands_are_rounded_as_the_mode_says_and_anew_in_every_draw(precision: str, unit: float) -> None:
    """In a product of two numbers only the operands are rounded much."""
    x, w = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)), torch.full((1, 1), 1.2345678)
    truth, errors = x.double() @ w.double(), []
    operands = operand_rounding(precision)
    for seed in range(4):
        with Rounding(seed, operands):
            errors.append((x @ w).double() / truth - 1)
    for i, error in enumerate(errors):
        assert unit / 8 < float(error.abs().max()) <= 2.1 * unit + 2.0**-23
        assert all(not torch.equal(error, other) for other in errors[:i])
