"""depthwise_conv's kernels against float64: every size, layout, stride, both directions."""

from __future__ import annotations

from collections.abc import Callable

import linfast.kernels.depthwise_conv as kernels
import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.ops import depthwise_conv
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

# An odd number of channels, one pixel, more pixels than a tile holds, no sample, one row.
SHAPES = [(2, 3, 1, 1), (1, 1, 33, 32), (0, 4, 3, 3), (1, 3, 1, 9)]
SIZES = [(1, 1), (3, 3), (2, 2), (4, 1), (1, 9)]
KINDS = [(False, True), (True, False), *long((False, False), (True, True))]  # (per_sample, transpose)

Call = Callable[..., tuple[Tensor, ...]]


def _inputs(
    shape: tuple[int, ...], size: tuple[int, int], per_sample: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    weight = torch.randn(*(shape[:2] if per_sample else shape[1:2]), *size)
    return [t.to(DEVICE, dtype).requires_grad_() for t in (torch.randn(shape), weight)]


def _output_and_gradients(transpose: bool = False) -> Call:
    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = depthwise_conv(x, weight, transpose=transpose)
        return (y, *torch.autograd.grad(y, (x, weight), fixed_cotangents(y)[0]))

    return call


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("per_sample", "transpose"), KINDS)
def test_every_size(size: tuple[int, int], per_sample: bool, transpose: bool) -> None:
    assert_within_budget(_output_and_gradients(transpose), _inputs((2, 2, 5, 4), size, per_sample))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(2, 3), *long(((3, 3),), ((2, 2),), ((4, 1),))])
@pytest.mark.parametrize(("per_sample", "transpose"), KINDS)
def test_every_shape(shape: tuple[int, ...], size: tuple[int, int], per_sample: bool, transpose: bool) -> None:
    assert_within_budget(_output_and_gradients(transpose), _inputs(shape, size, per_sample))


@pytest.mark.parametrize("transpose", [False, True])
def test_rows_of_taps_in_several_programs(transpose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of a row has one tap in place of two."""
    monkeypatch.setattr(kernels, "MOST_TAPS", 2)
    assert_within_budget(_output_and_gradients(transpose), _inputs((2, 2, 5, 4), (3, 3)))


@pytest.mark.parametrize("transpose", [False, True])
def test_more_channels_than_a_tile_innermost(transpose: bool) -> None:
    x, weight = _inputs((2, 33, 1, 3), (1, 2))
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_within_budget(_output_and_gradients(transpose), [x, weight])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_accumulates_in_fp32(dtype: torch.dtype) -> None:
    for transpose in (False, True):
        assert_within_budget(_output_and_gradients(transpose), _inputs((1, 2, 40, 31), (2, 3), dtype=dtype))


def test_half_precision_products_are_not_rounded() -> None:
    near = 1 + 2**-10
    x = torch.tensor([near, 1.0], device=DEVICE).half().view(1, 1, 1, 2)
    weight = torch.tensor([near, -near], device=DEVICE).half().view(1, 1, 2)
    with lf.backend("triton"):
        y = depthwise_conv(x, weight)
    assert float(y[0, 0, 0, 0]) == near * 2**-10  # from rounded products 2**-10


def test_bfloat16_images_with_fp32_kernels() -> None:
    x, weight = _inputs((2, 2, 5, 6), (3, 2))
    assert_within_budget(_output_and_gradients(), [x.detach().bfloat16().requires_grad_(), weight])


@pytest.mark.parametrize(("per_sample", "transpose"), KINDS)
def test_strides_of_inputs_and_of_the_incoming_gradient(per_sample: bool, transpose: bool) -> None:
    x, weight = (t.detach() for t in _inputs((2, 2, 3, 4), (2, 2), per_sample))
    cotangent = torch.randn(x.shape).to(x)
    for name in [*hostile(x), "transposed"]:

        def strided(t: Tensor, name: str = name) -> Tensor:
            return t.mT.contiguous().mT if name == "transposed" else hostile(t).get(name, t)

        def call(x: Tensor, weight: Tensor, name: str = name) -> tuple[Tensor, ...]:
            y = depthwise_conv(x, weight, transpose=transpose)
            return (y, *torch.autograd.grad(y, (x, weight), strided(cotangent.to(y.dtype), name)))

        assert_within_budget(call, [strided(t).requires_grad_() for t in (x, weight)])


@pytest.mark.parametrize("only", [0, 1], ids=["x", "weight"])
def test_each_gradient_alone(only: int) -> None:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        y = depthwise_conv(*tensors)
        return torch.autograd.grad(y, tensors[only], fixed_cotangents(y)[0])

    inputs = _inputs((2, 2, 5, 4), (2, 3))
    assert_within_budget(call, [t.detach().requires_grad_(i == only) for i, t in enumerate(inputs)])


@pytest.mark.parametrize("transpose", [False, True])
def test_second_derivatives_are_the_references(transpose: bool) -> None:
    call = second_derivatives(lambda x, weight: depthwise_conv(x, weight, transpose=transpose).pow(3).sum())
    assert_within_budget(call, _inputs((2, 2, 3, 4), (2, 2)))


def test_the_transpose_is_the_adjoint() -> None:
    x, weight = (t.detach() for t in _inputs((2, 2, 4, 5), (2, 3)))
    y = torch.randn_like(x)
    with lf.backend("triton"):
        left = (depthwise_conv(x, weight).double() * y).sum()
        right = (x.double() * depthwise_conv(y, weight, transpose=True)).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (1, 1, 33, 32)])
def test_int64_offsets_and_a_second_run_give_the_same_bits(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_bits(_output_and_gradients(), _inputs(shape, (2, 3)), monkeypatch, kernels)


@pytest.mark.parametrize(("per_sample", "transpose"), KINDS)
def test_opcheck(per_sample: bool, transpose: bool) -> None:
    x, weight = (t.detach() for t in _inputs((2, 2, 3, 4), (2, 2), per_sample))
    assert_registered(torch.ops.linfast.depthwise_conv.default, (x, weight, transpose))
    needs = ([True, True], [True, False], [False, True])
    calls = [(x, weight, torch.randn_like(x), transpose, needed) for needed in needs]
    assert_registered(torch.ops.linfast.depthwise_conv_backward.default, *calls)


def test_compiles_whole_and_runs_the_kernels() -> None:
    assert_compiles_whole(squared_sum(depthwise_conv), _inputs((2, 2, 4, 3), (2, 2)), "depthwise_conv")


def test_functional_transforms() -> None:
    loss = squared_sum(depthwise_conv)

    def transforms(x: Tensor, weight: Tensor) -> list[Tensor]:
        one_row = torch.func.vmap(lambda x: torch.func.grad(loss)(x[None], weight)[0])
        jacobian = torch.func.jacrev(lambda x: depthwise_conv(x, weight))
        return [*torch.func.grad(loss, argnums=(0, 1))(x, weight), one_row(x), jacobian(x)]

    assert_transforms(transforms, loss, [t.detach() for t in _inputs((2, 2, 3, 3), (2, 1))])


def test_float64_and_the_reference_backend_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    x, weight = (t.detach() for t in _inputs((1, 2, 3, 3), (2, 2)))
    with lf.backend("triton"):
        depthwise_conv(x.double(), weight.double())
        with pytest.raises(AssertionError, match="depthwise_conv:launch"):
            depthwise_conv(x, weight)
    with lf.backend("reference"):
        depthwise_conv(x, weight)
