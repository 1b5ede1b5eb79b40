"""The affine coupling's kernels against float64: every map, direction, layout and stride."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.ops import affine_coupling
from linfast.ops.affine_coupling import split_sizes
from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
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
    turned,
)

SHAPES = [(9, 7), (1, 2), (0, 4), (3, 6, 5, 7), (130, 33), (2, 3, 40, 31), (3, 5000)]


def _inputs(shape: tuple[int, ...], moves: str = "first", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    moved = split_sizes(shape[1])[moves == "second"]
    params = torch.randn(shape[0], 2 * moved, *shape[2:])
    return [t.to(DEVICE, dtype).requires_grad_() for t in (torch.randn(shape), params)]


def _outputs_and_gradients(scale_map: ScaleMap, **options: object):
    """(y, log_det, dx, dparams) for fixed random cotangents."""

    def call(x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
        y, log_det = affine_coupling(x, params, scale_map, log_det=True, **options)  # type: ignore[arg-type]
        return (y, log_det, *torch.autograd.grad((y, log_det), (x, params), fixed_cotangents(y, log_det)))

    return call


@pytest.mark.parametrize(("kind", "inverse", "order"), turned(SCALE_MAP_KINDS))
def test_every_map_order_and_direction(kind: str, inverse: bool, order: str) -> None:
    """Default bounds and floors and others, with raw values that reach the bounds."""
    for scale_map in (ScaleMap(kind), ScaleMap(kind, bound=0.5, floor=0.0), ScaleMap(kind, bound=0.9, floor=1e-3)):
        call = _outputs_and_gradients(scale_map, inverse=inverse, order=order)
        assert_within_budget(call, _inputs((40, 9)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moves", ["first", "second"])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_every_shape_and_layout(shape: tuple[int, ...], moves: str, layout: str) -> None:
    call = _outputs_and_gradients(ScaleMap(), moves=moves, layout=layout)
    assert_within_budget(call, _inputs(shape, moves))


@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32])
def test_half_precision_keeps_scale_and_log_det_in_fp32(dtype: torch.dtype) -> None:
    x, params = _inputs((33, 10), dtype=dtype)
    with lf.backend("triton"):
        y, log_det = affine_coupling(x, params, ScaleMap(), log_det=True)
    assert y.dtype == dtype
    assert log_det is not None
    assert log_det.dtype == torch.float32
    assert_within_budget(lambda *a: affine_coupling(*a, ScaleMap(), log_det=True), [x, params])


@pytest.mark.parametrize("shape", [(5, 7), (3, 6, 5, 4)])
@pytest.mark.parametrize("inverse", [False, True])
def test_strides_of_inputs_and_of_the_incoming_gradient(shape: tuple[int, ...], inverse: bool) -> None:
    x, params = (t.detach() for t in _inputs(shape))
    cotangent = torch.randn(shape).to(x)
    for name in hostile(x):
        strided = [hostile(t)[name].requires_grad_() for t in (x, params)]

        def call(x: Tensor, params: Tensor, name: str = name) -> tuple[Tensor, ...]:
            y, _ = affine_coupling(x, params, ScaleMap("tanh"), inverse=inverse)
            gradient = hostile(cotangent.to(y.dtype))[name]
            return (y, *torch.autograd.grad(y, (x, params), gradient))

        assert_within_budget(call, strided)


@pytest.mark.parametrize("only", ["x", "params"])
@pytest.mark.parametrize("output", ["y", "log_det"])
def test_each_gradient_alone(only: str, output: str) -> None:
    def call(x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
        y, log_det = affine_coupling(x, params, ScaleMap(), log_det=True)
        value = y if output == "y" else log_det
        wanted = x if only == "x" else params
        if not value.requires_grad:  # the reference's log_det knows that it does not depend on x
            return (torch.zeros_like(wanted),)
        return torch.autograd.grad(value.square().sum(), wanted, allow_unused=True, materialize_grads=True)

    x, params = _inputs((6, 5))
    assert_within_budget(
        call, [x.detach().requires_grad_(only == "x"), params.detach().requires_grad_(only != "x")]
    )


@pytest.mark.parametrize("order", ["shift_first", "scale_first"])
@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives_are_autograds(order: str, inverse: bool) -> None:
    def loss(x: Tensor, params: Tensor) -> Tensor:
        y, log_det = affine_coupling(x, params, ScaleMap("tanh"), order=order, inverse=inverse, log_det=True)
        return y.pow(3).sum() + log_det.square().sum()  # type: ignore[union-attr]

    assert_within_budget(second_derivatives(loss), _inputs((4, 5)))


def test_forward_and_inverse_use_bit_identical_log_scales() -> None:
    x, params = _inputs((64, 12))
    with lf.backend("triton"), torch.no_grad():
        y, forward = affine_coupling(x, params, ScaleMap(), log_det=True)
        back, inverse = affine_coupling(y, params, ScaleMap(), log_det=True, inverse=True)
        again, _ = affine_coupling(x, params, ScaleMap(), log_det=True)
    assert torch.equal(forward, -inverse)  # type: ignore[operator]
    assert torch.equal(y, again)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)


def test_int64_offsets_and_a_second_run_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import linfast.kernels.affine_coupling as kernels

    assert_same_bits(_outputs_and_gradients(ScaleMap()), _inputs((9, 3, 5, 7)), monkeypatch, kernels)


def test_int64_is_chosen_past_two_to_the_31_elements() -> None:
    from linfast.kernels.launch import needs_int64

    assert not needs_int64(torch.empty(2**31, device="meta"))
    assert needs_int64(torch.empty(2**31 + 1, device="meta"))
    assert needs_int64(torch.empty(3, 2, device="meta"), torch.empty_strided((2, 2), (2**31, 1), device="meta"))
    assert not needs_int64(torch.empty(1, device="meta").expand(2**40))
    assert not needs_int64(torch.empty(0, 2**40, device="meta"))


def test_nan_stays_nan() -> None:
    x, params = (t.detach() for t in _inputs((2, 4)))
    params[0, 2] = float("nan")
    for kind in SCALE_MAP_KINDS:
        with lf.backend("triton"):
            y, log_det = affine_coupling(x, params, ScaleMap(kind), log_det=True)
        assert bool(y[0, 0].isnan())
        assert bool(log_det[0].isnan())  # type: ignore[index]
        assert not bool(y[1].isnan().any())


def test_kernels_know_the_maps_by_the_same_ids() -> None:
    from linfast.kernels import math

    for kind in ("clamp", "smooth", "tanh", "arctan", "sigmoid", "softplus"):
        constant = getattr(math, kind.upper())
        assert getattr(constant, "value", constant) == ScaleMap(kind).constexpr_id


@pytest.mark.parametrize(
    ("inverse", "log_det"), [(False, True), (True, False), *long((False, False), (True, True))]
)
def test_opcheck(inverse: bool, log_det: bool) -> None:
    forward, backward = [], []
    for shape in ((5, 7), (2, 4, 3, 3)):
        x, params = (t.detach() for t in _inputs(shape))
        constants = (2, 0.5, 0.0, False, False, False, inverse, log_det)
        gradients = (torch.randn_like(x), x.new_ones(shape[0]) if log_det else None)
        forward.append((x, params, *constants))
        backward.append((x, params, *gradients, *constants))
    assert_registered(torch.ops.linfast.affine_coupling.default, *forward)
    assert_registered(torch.ops.linfast.affine_coupling_backward.default, *backward)


def test_flows_compile_whole_and_run_the_kernels() -> None:
    # The conditioner is not an lf.MLP: with one the flow would be a coupling_stack.
    conditioners = (
        torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)) for _ in "ab"
    )
    halves = ("first", "second")
    g = lf.Flow([lf.AffineCoupling(c, 6, half) for c, half in zip(conditioners, halves, strict=True)]).to(DEVICE)

    def loss(x: Tensor) -> Tensor:
        z, log_det = g.forward_and_log_det(x)
        return z.square().sum() - log_det.sum()

    x = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    assert_compiles_whole(loss, [x], "affine_coupling", launches=2)


def test_functional_transforms() -> None:
    def loss(x: Tensor, params: Tensor) -> Tensor:
        y, log_det = affine_coupling(x, params, ScaleMap(), log_det=True)
        return y.square().sum() + log_det.sum()  # type: ignore[union-attr]

    def transforms(x: Tensor, params: Tensor) -> list[Tensor]:
        one_row = torch.func.vmap(lambda x, p: torch.func.grad(loss)(x[None], p[None])[0])
        jacobian = torch.func.jacrev(lambda x: affine_coupling(x, params, ScaleMap())[0])
        return [torch.func.grad(loss, argnums=1)(x, params), one_row(x, params), jacobian(x)]

    assert_transforms(transforms, loss, [t.detach() for t in _inputs((3, 4))])


def test_float64_and_the_reference_backend_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    x, params = (t.detach() for t in _inputs((3, 4)))
    with lf.backend("triton"):
        affine_coupling(x.double(), params.double(), ScaleMap())
        with pytest.raises(AssertionError, match="affine_coupling:launch"):
            affine_coupling(x, params, ScaleMap())
    with lf.backend("reference"):
        affine_coupling(x, params, ScaleMap())


def test_backend_names() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of.*'cuda'"), lf.backend("cuda"):
        pass
