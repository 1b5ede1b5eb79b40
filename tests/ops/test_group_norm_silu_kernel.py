"""group_norm_silu's kernels against float64: every shape, grouping, layout, stride and option."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.ops import group_norm_silu
from tests.marks import long
from tests.ops.budget import DEVICE, HALF_DTYPES, assert_within_budget, hostile
from tests.ops.checks import (
    assert_compiles_whole,
    assert_registered,
    assert_same_bits,
    assert_transforms,
    fixed_cotangents,
    refuse_launches,
    second_derivatives,
    squared_sum,
)

SHAPES = [
    ((3, 8, 5, 7), (1, 2, 8)),
    ((3, 6, 5, 7), (3,)),
    ((9, 7), (7,)),
    ((1, 2), (1,)),
    ((1, 6, 40, 31), (1, 3, 6)),  # more positions than one tile holds
    ((2, 3, 1, 1), (1, 3)),
    ((1, 2, 1, 1), (2,)),  # one value per group
    ((0, 4, 3, 3), (2,)),
    ((4, 6), (1, 3)),
    ((2, 5000), (1,)),
    ((1, 40000), (2,)),  # more channels than one tile holds
    ((2, 4, 9), (2,)),
    ((1, 4, 3, 4, 5), (4,)),
    ((1, 2, 130, 131), (1, 2)),
]
NAMES = ("x", "weight", "bias", "scale", "shift")

Call = Callable[..., tuple[Tensor, ...]]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias, scale, shift; x's mean is not small relative to its spread."""
    shapes = (shape, shape[1:2], shape[1:2], shape[:2], shape[:2])
    values = [torch.randn(s) + offset for s, offset in zip(shapes, (2.0, 1.0, 0.0, 0.0, 0.0), strict=True)]
    return [v.to(DEVICE, dtype).requires_grad_() for v in values]


def _output_and_gradients(groups: int, activation: bool = True, given: tuple[str, ...] = NAMES[1:]) -> Call:
    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y = group_norm_silu(x, groups, **dict(zip(given, parameters, strict=True)), activation=activation)
        return (y, *torch.autograd.grad(y, (x, *parameters), fixed_cotangents(y)[0]))

    return call


@pytest.mark.parametrize(("shape", "groupings"), SHAPES)
@pytest.mark.parametrize("activation", [True, *long(False)])
def test_every_shape_and_grouping(shape: tuple[int, ...], groupings: tuple[int, ...], activation: bool) -> None:
    for groups in groupings:
        assert_within_budget(_output_and_gradients(groups, activation), _inputs(shape))


@pytest.mark.parametrize(
    "given", [(), ("weight", "bias"), ("scale", "shift"), ("weight",), ("bias", "scale"), ("shift",), ("scale",)]
)
def test_what_is_not_given_is_one_or_zero(given: tuple[str, ...]) -> None:
    inputs = dict(zip(NAMES, _inputs((3, 8, 5, 7)), strict=True))
    call = _output_and_gradients(2, given=given)
    assert_within_budget(call, [inputs["x"], *(inputs[name] for name in given)])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 4, 130, 131)])
def test_half_precision_accumulates_in_fp32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_within_budget(_output_and_gradients(2), _inputs(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_with_fp32_parameters(dtype: torch.dtype) -> None:
    """Only the output is rounded below fp32: parameter gradients keep fp32 accuracy in every dtype."""
    x, *parameters = _inputs((2, 8, 5, 7))
    assert_within_budget(_output_and_gradients(2), [x.detach().to(dtype).requires_grad_(), *parameters])


@pytest.mark.parametrize("shape", [(2, 8, 20, 15), (1, 2, 130, 131)], ids=["one group per tile", "several tiles"])
def test_a_mean_a_thousand_times_the_spread_costs_only_the_inputs_own_digits(shape: tuple[int, ...]) -> None:
    inputs = [(t.detach() + 1000.0 * (i == 0)).requires_grad_() for i, t in enumerate(_inputs(shape))]
    assert_within_budget(_output_and_gradients(2), inputs)


@pytest.mark.parametrize("shape", [(5, 8), (2, 6, 5, 4), *long(((2, 4, 70, 62),))])
def test_strides_of_inputs_and_of_the_incoming_gradient(shape: tuple[int, ...]) -> None:
    inputs = [t.detach() for t in _inputs(shape)]
    cotangent = torch.randn(shape).to(inputs[0])
    names = [*hostile(inputs[0]), *(["transposed"] if len(shape) == 4 else [])]
    for name in names:

        def strided(t: Tensor, name: str = name) -> Tensor:
            if name == "transposed" and t.ndim == 4:
                return t.mT.contiguous().mT
            return hostile(t if t.ndim > 1 else t[None]).get(name, t).reshape(t.shape)

        def call(*tensors: Tensor, name: str = name) -> tuple[Tensor, ...]:
            x, *parameters = tensors
            y = group_norm_silu(x, 2, *parameters)
            return (y, *torch.autograd.grad(y, tensors, strided(cotangent.to(y.dtype), name)))

        assert_within_budget(call, [strided(t).requires_grad_() for t in inputs])


def test_scale_and_shift_as_halves_of_one_embedding() -> None:
    x, weight, bias, *_ = _inputs((3, 8, 5, 7))
    embedding = torch.randn(3, 16, device=DEVICE).requires_grad_()

    def call(x: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        scale, shift = embedding.chunk(2, dim=1)
        y = group_norm_silu(x, 4, weight.to(x), bias.to(x), scale, shift)
        y = y + group_norm_silu(x, 4, weight.to(x), bias.to(x), scale, shift.mT.contiguous().mT)
        return (y, *torch.autograd.grad(y, (x, embedding), fixed_cotangents(y)[0]))

    assert_within_budget(call, [x, embedding])


@pytest.mark.parametrize("only", range(5), ids=NAMES)
@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (1, 2, 130, 131)])
def test_each_gradient_alone(only: int, shape: tuple[int, ...]) -> None:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        y = group_norm_silu(tensors[0], 2, *tensors[1:])
        return torch.autograd.grad(y, tensors[only], fixed_cotangents(y)[0])

    assert_within_budget(call, [t.detach().requires_grad_(i == only) for i, t in enumerate(_inputs(shape))])


def test_second_derivatives_are_the_references() -> None:
    call = second_derivatives(lambda x, *parameters: group_norm_silu(x, 2, *parameters).pow(3).sum())
    assert_within_budget(call, _inputs((2, 4, 3, 3)))


@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (1, 2, 130, 131)])
def test_int64_offsets_and_a_second_run_give_the_same_bits(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import linfast.kernels.group_norm_silu as kernels

    assert_same_bits(_output_and_gradients(2), _inputs(shape), monkeypatch, kernels)


def test_nan_and_constant_groups() -> None:
    x, *parameters = (t.detach() for t in _inputs((2, 4, 3, 3)))
    x[0, 0, 0, 0], x[1] = float("nan"), 7.0
    with lf.backend("triton"):
        y = group_norm_silu(x, 2, *parameters)
    assert bool(y[0, :2].isnan().all())
    assert not bool(y[0, 2:].isnan().any())
    _, bias, scale, shift = parameters
    u = bias * (1 + scale[1]) + shift[1]
    torch.testing.assert_close(y[1], torch.nn.functional.silu(u)[:, None, None].expand(4, 3, 3))


@pytest.mark.parametrize("present", [NAMES[1:], *long((("weight", "bias"),), ((),))])
def test_opcheck(present: tuple[str, ...]) -> None:
    forward, backward = [], []
    for shape in ((2, 8, 3, 5), (3, 8)):
        x, *parameters = (t.detach() for t in _inputs(shape))
        given = [p if name in present else None for name, p in zip(NAMES[1:], parameters, strict=True)]
        forward.append((x, *given, 2, 1e-5, True))
        stats = (torch.randn(shape[0], 2).to(x), torch.rand(shape[0], 2).to(x) + 0.5)
        for needs in ([True] * 5, [False, True, False, True, False], [True] + [False] * 4):
            wanted = [need and (i == 0 or given[i - 1] is not None) for i, need in enumerate(needs)]
            backward.append((x, *given, *stats, torch.randn_like(x), None, None, 2, 1e-5, True, wanted))
    assert_registered(torch.ops.linfast.group_norm_silu.default, *forward)
    assert_registered(torch.ops.linfast.group_norm_silu_backward.default, *backward)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiles_whole_and_runs_the_kernels(layout: torch.memory_format) -> None:
    x, *parameters = _inputs((2, 8, 5, 7))
    inputs = [x.detach().contiguous(memory_format=layout).requires_grad_(), *parameters]
    assert_compiles_whole(squared_sum(lambda x, *given: group_norm_silu(x, 2, *given)), inputs, "group_norm_silu")


def test_functional_transforms() -> None:
    loss = squared_sum(lambda x, *parameters: group_norm_silu(x, 2, *parameters))

    def transforms(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
        def one_row(x: Tensor, scale: Tensor) -> Tensor:
            return torch.func.grad(loss)(x[None], weight, bias, scale[None])[0]

        jacobian = torch.func.jacrev(lambda x: group_norm_silu(x, 2, weight, bias, scale, shift))
        gradients = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(x, weight, bias, scale, shift)
        return [*gradients, torch.func.vmap(one_row)(x, scale), jacobian(x)]

    assert_transforms(transforms, loss, [t.detach() for t in _inputs((3, 4))])


def test_float64_and_the_reference_backend_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    x = torch.randn(3, 4, device=DEVICE)
    with lf.backend("triton"):
        group_norm_silu(x.double(), 2)
        with pytest.raises(AssertionError, match="group_norm_silu:launch"):
            group_norm_silu(x, 2)
    with lf.backend("reference"):
        group_norm_silu(x, 2)


def test_errors_name_the_argument_and_the_shape() -> None:
    x = torch.randn(2, 6, 3, 3)
    with pytest.raises(ValueError, match=r"groups must divide the 6 channels of x \(2, 6, 3, 3\); got 4"):
        group_norm_silu(x, 4)
    for groups in (0, -2):
        with pytest.raises(ValueError, match=f"groups must be at least 1; got {groups}"):
            group_norm_silu(x, groups)
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match=rf"{name} must be \(6,\) for x .*; got \(5,\)"):
            group_norm_silu(x, 2, **{name: torch.ones(5)})
    for name in ("scale", "shift"):
        with pytest.raises(ValueError, match=rf"{name} must be \(2, 6\) for x .*; got \(1, 6\)"):
            group_norm_silu(x, 2, **{name: torch.ones(1, 6)})
    with pytest.raises(ValueError, match=r"x must be \[B, C, \.\.\.\]; got \(6,\)"):
        group_norm_silu(x[0, :, 0, 0], 2)


@pytest.mark.parametrize("op", ["group_norm_silu", "conv2d_fused"])
@pytest.mark.parametrize("x_requires_grad", [False, True])
def test_parameters_alone_have_gradients_in_channels_last(op: str, x_requires_grad: bool) -> None:
    """torch's group norm crashes the process there, so the test runs in a separate one."""

    def gradients(x: Tensor, parameters: list[Tensor], kernel: Tensor) -> tuple[Tensor, ...]:
        with lf.backend("reference"):
            if op == "group_norm_silu":
                y = group_norm_silu(x, 2, *parameters)
            else:
                y = lf.ops.conv2d_fused(x, kernel, groups=2, norm_weight=parameters[0], norm_bias=parameters[1])[0]
            return torch.autograd.grad(y.square().sum(), parameters)

    parameters = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x, kernel = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    truth = gradients(x, parameters, kernel)
    child = os.fork()
    if child == 0:
        given = x.contiguous(memory_format=torch.channels_last).requires_grad_(x_requires_grad)
        found = gradients(given, parameters, kernel)
        os._exit(0 if all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, truth, strict=True)) else 1)
    assert os.waitpid(child, 0)[1] == 0
