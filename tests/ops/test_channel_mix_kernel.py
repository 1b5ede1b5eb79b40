"""The channel mix's kernels against float64: sizes, layouts, strides, precisions, transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.flows import Mix
from linfast.ops.channel_mix import channel_mix
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
)

CHANNELS = [(2, 2), (3, 3), (5, 3), (12, 12), (15, 16), (16, 16), (33, 33), (128, 128), (7, 130), (1, 1)]


def _inputs(
    shape: tuple[int, ...], n_out: int | None = None, bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    n_out = shape[1] if n_out is None else n_out
    sizes = (shape, (n_out, shape[1]), *([(n_out,)] if bias else []))
    return [torch.randn(size).to(DEVICE, dtype).requires_grad_() for size in sizes]


def _outputs_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(y, dx, dweight, dbias) for a fixed random cotangent."""
    y = channel_mix(*tensors)
    return (y, *torch.autograd.grad(y, tensors, fixed_cotangents(y)))


@pytest.mark.parametrize(("n_in", "n_out"), CHANNELS)
@pytest.mark.parametrize(("last", "bias"), [(False, True), (True, False), *long((False, False), (True, True))])
def test_every_width_and_layout(n_in: int, n_out: int, last: bool, bias: bool) -> None:
    x, *rest = _inputs((2, n_in, 5, 7), n_out, bias)
    if last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_within_budget(_outputs_and_gradients, [x, *rest])


@pytest.mark.parametrize(
    "shape",
    [
        (3, 6, 5, 7),
        (9, 7, 1),
        (1, 2, 1),
        (0, 4, 3, 3),
        (2, 4, 0, 3),
        (3, 6, 1, 1),
        (2, 3, 40, 31),
        (2, 17, 40, 31),
        (1, 5, 9),
        (2, 4, 2, 3, 5),
    ],
)
def test_every_shape(shape: tuple[int, ...]) -> None:
    assert_within_budget(_outputs_and_gradients, _inputs(shape))


@pytest.mark.parametrize("splits", [2, 512])
def test_more_columns_than_one_split(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import linfast.kernels.channel_mix as kernels

    monkeypatch.setattr(kernels, "SPLITS", splits)  # 2: more chunks per split than the minimum
    inputs = _inputs((3, 3, 64, 37))
    assert 8 * kernels.WEIGHTS[0][1]["COLUMNS"] * 8 < 3 * 64 * 37
    assert_within_budget(_outputs_and_gradients, inputs)


@pytest.mark.parametrize("n_in", [3, 20])
@pytest.mark.parametrize("dtypes", [(half, other) for half in HALF_DTYPES for other in (half, torch.float32)])
def test_half_precision_sums_in_fp32(n_in: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight, bias = _inputs((2, n_in, 5, 7))
    x = x.detach().to(dtypes[0]).requires_grad_()
    weight, bias = (t.detach().to(dtypes[1]).requires_grad_() for t in (weight, bias))
    with lf.backend("triton"):
        results = _outputs_and_gradients(x, weight, bias)
    assert [t.dtype for t in results] == [dtypes[0], dtypes[0], dtypes[1], dtypes[1]]
    assert_within_budget(_outputs_and_gradients, [x, weight, bias])


@pytest.mark.parametrize("n_in", [5, 18])
def test_strides_of_inputs_and_of_the_incoming_gradient(n_in: int) -> None:
    x, weight, bias = (t.detach() for t in _inputs((2, n_in, 3, 4)))
    cotangent = torch.randn(x.shape).to(x)
    for name in hostile(x):
        for gradient_name in {name, "contiguous", "expanded"}:

            def call(*tensors: Tensor, gradient_name: str = gradient_name) -> tuple[Tensor, ...]:
                y = channel_mix(*tensors)
                return (y, *torch.autograd.grad(y, tensors, hostile(cotangent.to(y.dtype))[gradient_name]))

            strided = [hostile(x)[name], weight.t(), bias.expand(3, -1)[1]]
            assert_within_budget(call, [t.requires_grad_() for t in strided])


def test_weights_with_a_step_and_a_bias_of_stride_zero() -> None:
    x, weight, bias = (t.detach() for t in _inputs((2, 4, 5, 4)))
    wide = torch.full((8, 12), float("nan"), device=DEVICE)
    wide[::2, ::3] = weight
    assert_within_budget(_outputs_and_gradients, [x.requires_grad_(), wide[::2, ::3].requires_grad_()])
    strided = [x, wide[::2, ::3].detach(), bias[:1].expand(4)]
    assert_within_budget(_outputs_and_gradients, [t.requires_grad_() for t in strided])


@pytest.mark.parametrize("only", [0, 1, 2])
@pytest.mark.parametrize("n_in", [4, 17])
def test_each_gradient_alone(only: int, n_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import linfast.kernels.channel_mix as kernels

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(channel_mix(*tensors).square().sum(), tensors[only])

    inputs = [t.detach().requires_grad_(i == only) for i, t in enumerate(_inputs((2, n_in, 3, 5)))]
    assert_within_budget(call, inputs)
    with lf.backend("triton"):
        y = channel_mix(*inputs)

    def refuse(*_: object) -> None:
        raise AssertionError("computed a gradient that is not required")

    monkeypatch.setattr(kernels, "weight_partials" if only == 0 else "_mix", refuse)
    y.sum().backward()


@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives_are_the_references(bias: bool) -> None:
    call = second_derivatives(lambda *tensors: channel_mix(*tensors).pow(3).sum())
    assert_within_budget(call, _inputs((2, 3, 4, 5), 4, bias))


@pytest.mark.parametrize("n_in", [4, 17])
@pytest.mark.parametrize("last", [False, True])
def test_int64_offsets_and_a_second_run_give_the_same_bits(
    n_in: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import linfast.kernels.channel_mix as kernels

    x, *rest = _inputs((3, n_in, 15, 17))
    inputs = [x.detach().to(memory_format=torch.channels_last).requires_grad_() if last else x, *rest]
    assert_same_bits(_outputs_and_gradients, inputs, monkeypatch, kernels)


def test_nan_stays_in_its_column() -> None:
    for n_in in (3, 20):
        x, weight = (t.detach() for t in _inputs((2, n_in, 3, 3), bias=False))
        x[0, 1, 2, 2] = float("nan")
        with lf.backend("triton"):
            y = channel_mix(x, weight)
        assert bool(y[0, :, 2, 2].isnan().all())
        assert int(y.isnan().sum()) == n_in


@pytest.mark.parametrize("features", [6, 24])
@pytest.mark.parametrize("kind", ["lu", "free"])
def test_a_mix_and_its_inverse_run_the_kernel(features: int, kind: str) -> None:
    mix, x = Mix(features, kind).to(DEVICE), torch.randn(2, features, 5, 7, device=DEVICE)
    with lf.backend("triton"), torch.no_grad():
        y, log_det = mix.forward_and_log_det(x)
        back, inverse = mix.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)
    assert torch.equal(log_det, -inverse)
    torch.testing.assert_close(y, mix(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bias", "last"), [(False, True), (True, False), *long((False, False), (True, True))])
def test_opcheck(bias: bool, last: bool) -> None:
    forward, backward = [], []
    for shape in ((2, 4, 3, 3), (2, 18, 5, 1)):
        x, weight, *rest = (t.detach() for t in _inputs(shape, 6, bias))
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        forward.append((x, weight, *(rest or [None])))
        grad = torch.randn(shape[0], 6, *shape[2:], device=DEVICE)
        needs = ([True, True, bias], [True, False, False], [False, True, False], [False, False, True])
        backward += [(x, weight, grad, needed) for needed in needs]
    assert_registered(torch.ops.linfast.channel_mix.default, *forward)
    assert_registered(torch.ops.linfast.channel_mix_backward.default, *backward)


def test_flows_compile_whole_and_run_the_kernels() -> None:
    g = lf.Flow([Mix(4), Mix(4, "free")]).to(DEVICE)  # both are folded into one map

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        z, log_det = g.forward_and_log_det(x)
        return z.pow(3).sum() - log_det.sum()

    x = torch.randn(2, 4, 3, 5, device=DEVICE, requires_grad=True)
    assert_compiles_whole(loss, [x, *g.parameters()], "channel_mix")


def test_functional_transforms() -> None:
    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return channel_mix(x, weight, bias).pow(3).sum()

    def transforms(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        one_row = torch.func.vmap(lambda x: torch.func.grad(loss)(x[None], weight, bias)[0])
        one_weight = torch.func.vmap(lambda w: torch.func.grad(loss, argnums=1)(x, w, bias))
        jacobian = torch.func.jacrev(lambda w: channel_mix(x, w, bias))
        gradients = torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, bias)
        return [*gradients, one_row(x), one_weight(torch.stack((weight, 2 * weight))), jacobian(weight)]

    assert_transforms(transforms, loss, [t.detach() for t in _inputs((2, 3, 2, 2))])


def test_autocast_casts_as_matmul_does() -> None:
    x, weight, bias = (t.detach() for t in _inputs((2, 3, 4, 4)))
    with torch.autocast(DEVICE, torch.float16):
        y, narrow = channel_mix(x, weight, bias), channel_mix(x.double(), weight.double())
    assert (y.dtype, narrow.dtype) == (torch.float16, torch.float64)
    with lf.backend("triton"), torch.autocast(DEVICE, torch.float16):
        torch.testing.assert_close(channel_mix(x, weight, bias), y, rtol=2e-3, atol=2e-3)


def test_vectors_float64_and_the_reference_backend_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    x, weight, bias = (t.detach() for t in _inputs((3, 4, 2, 2)))
    with lf.backend("triton"):
        channel_mix(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(channel_mix(x[..., 0, 0], weight, bias), x[..., 0, 0] @ weight.mT + bias)
        with pytest.raises(AssertionError, match="channel_mix:launch"):
            channel_mix(x, weight, bias)
    with lf.backend("reference"):
        channel_mix(x, weight, bias)


def test_shapes_that_do_not_fit() -> None:
    x, weight, bias = (t.detach() for t in _inputs((3, 4, 2, 2), 5))
    with pytest.raises(ValueError, match=r"\(3, 4, 2, 2\).*\(4, 5\)"):
        channel_mix(x, weight.t())
    with pytest.raises(ValueError, match=r"bias must be \[5\].*\(4,\)"):
        channel_mix(x, weight, bias[:4])
