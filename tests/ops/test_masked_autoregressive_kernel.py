"""The kernel of masked autoregressive transforms against float64: directions, networks, modes, sizes, strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from linfast.bench.rounding import allowed_errors
from linfast.kernels import masked_autoregressive as kernels
from linfast.kernels import masked_schedule, masked_steps, mlp
from linfast.kernels.masked_spec import ALIGNED, MaskedSpec
from torch import Tensor

import linfast as lf
from linfast.ops import AutoregressiveMasks, masked_autoregressive
from linfast.ops.masked_autoregressive import MASKED_ACTIVATIONS
from linfast.ops.masked_walk_backward import SLOPES
from linfast.ops.stack_weights import rounded
from linfast.precision import PRECISIONS, half_dtype
from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
from tests.marks import long
from tests.ops.budget import DEVICE, HALF_DTYPES, Call, Outputs, assert_within, hostile
from tests.ops.checks import (
    assert_registered,
    assert_same_bits,
    fixed_cotangents,
    refuse_launches,
    second_derivatives,
    turned,
)
from tests.ops.made import Extras, Made, plain_masked, random_extras, random_made, rebuilt, tensors_of
from tests.ops.stacks import rounding

BOTH = [False, True]


def _call(made: Made, extras: Extras | None = None, precision: str = "exact", **options: Any) -> Call:
    """(y, log_det) from the op, of x and the network's tensors."""
    options = {"activation": "silu", "scale_map": ScaleMap(), **options}

    def call(x: Tensor, *tensors: Tensor) -> Outputs:
        (masks, weights, biases), given = rebuilt(made, tensors, extras)
        return masked_autoregressive(
            x, masks, weights, biases, extras=given, log_det=True, precision=precision, **options
        )

    return call


def _plain(made: Made, extras: Extras | None = None, **options: Any) -> Call:
    """The same from the formulas."""
    options = {"activation": "silu", "scale_map": ScaleMap(), **options}

    def call(x: Tensor, *tensors: Tensor) -> Outputs:
        other, given = rebuilt(made, tensors, extras)
        return plain_masked(x, other, extras=given, **options)

    return call


def _assert_within_budget(got: Outputs, plain: Call, inputs: Sequence[Tensor], precision: str) -> None:
    """The errors are within the rounding of the formulas in the dtypes of the inputs."""
    truth = plain(*[t.detach().double().requires_grad_(t.requires_grad) for t in inputs])
    assert_within(got, truth, allowed_errors(lambda: plain(*inputs), truth, rounding(precision)))


def _x(batch: int, D: int) -> Tensor:
    return torch.randn(batch, D).to(DEVICE)


def _assert_accurate(x: Tensor, made: Made, precision: str = "exact", **options: Any) -> None:
    inputs = [x, *tensors_of(made, options.get("extras"))]
    with lf.backend("triton"):
        got = _call(made, precision=precision, **options)(*inputs)
    _assert_within_budget(got, _plain(made, **options), inputs, precision)


@pytest.mark.parametrize("activation", MASKED_ACTIVATIONS)
@pytest.mark.parametrize("inverse", BOTH)
def test_every_activation(activation: str, inverse: bool) -> None:
    for precision in ("exact", "fast"):
        _assert_accurate(_x(20, 5), random_made(5, (20, 16)), precision, activation=activation, inverse=inverse)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("inverse", BOTH)
def test_every_mode(precision: str, inverse: bool) -> None:
    _assert_accurate(_x(20, 7), random_made(7, (40, 24)), precision, inverse=inverse)


@pytest.mark.parametrize(("kind", "inverse", "order"), turned(SCALE_MAP_KINDS))
def test_every_scale_map_and_order(kind: str, order: str, inverse: bool) -> None:
    _assert_accurate(_x(60, 3), random_made(3, (16,)), scale_map=ScaleMap(kind), order=order, inverse=inverse)


@pytest.mark.parametrize(("D", "hidden"), [(1, (7,)), (2, (9, 9)), (5, (20,) * 3), (16, (70, 64)), (33, (40, 100))])
@pytest.mark.parametrize("inverse", BOTH)
def test_every_size(D: int, hidden: tuple[int, ...], inverse: bool) -> None:
    _assert_accurate(_x(9, D), random_made(D, hidden), inverse=inverse)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("D", [1, 6, *long(33)])
def test_an_additive_transform(D: int, inverse: bool) -> None:
    _assert_accurate(_x(9, D), random_made(D, (20, 20), 1), scale_map=None, inverse=inverse)
    with lf.backend("triton"):
        made = random_made(D, (20, 20), 1)
        log_det = _call(made, scale_map=None, inverse=inverse)(_x(9, D), *tensors_of(made))[1]
    assert torch.equal(log_det, torch.zeros(9, device=DEVICE))


@pytest.mark.parametrize("order", [[3, 1, 5, 2, 4], [2, 1, 2, 1, 2], [1] * 5, [1, 3, 2, 3, 3, 2, 4]])
@pytest.mark.parametrize("inverse", BOTH)
def test_any_order_and_several_features_of_a_degree(order: list[int], inverse: bool) -> None:
    D = len(order)
    _assert_accurate(_x(9, D), random_made(D, (20, 16), order=order), inverse=inverse)
    additive = random_made(D, (20, 16), 1, order=order)
    _assert_accurate(_x(9, D), additive, inverse=inverse, scale_map=None)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("residual", BOTH)
@pytest.mark.parametrize("with_extras", BOTH)
def test_residual_blocks_terms_and_gates(residual: bool, with_extras: bool, inverse: bool) -> None:
    made = random_made(5, (24, 20, 33, 16), residual=residual, bias=with_extras)
    extras = random_extras(made[0], 9) if with_extras else None
    for precision in ("exact", "fast"):
        _assert_accurate(_x(9, 5), made, precision, extras=extras, inverse=inverse)


def test_raw_scales_before_shifts() -> None:
    for inverse in BOTH:
        _assert_accurate(_x(9, 5), random_made(5, (20,), raw_first=True), inverse=inverse)


@pytest.mark.parametrize("batch", [0, 1, 65, 200])
@pytest.mark.parametrize("inverse", BOTH)
def test_every_batch_and_more_tiles_than_programs(
    batch: int, inverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = random_made(4, (20, 20, 20, 20, 20), residual=True)
    extras = random_extras(made[0], batch)
    _assert_accurate(_x(batch, 4), made, extras=extras, inverse=inverse)
    few = {name: tile._replace(programs_with_more=2) for name, tile in kernels.TILES.items()}
    monkeypatch.setattr(kernels, "TILES", few)
    _assert_accurate(_x(batch, 4), made, extras=extras, inverse=inverse)


def test_scratch_for_one_program_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {name: tile._replace(cache=1) for name, tile in kernels.TILES.items()}
    monkeypatch.setattr(kernels, "TILES", tiny)
    _assert_accurate(_x(130, 4), random_made(4, (20,)), inverse=True)


@pytest.mark.parametrize("inverse", BOTH)
def test_strides_of_x(inverse: bool) -> None:
    made = random_made(5, (20, 16), order=[2, 1, 5, 3, 4])
    for strided in hostile(_x(9, 5)).values():
        _assert_accurate(strided, made, inverse=inverse)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("weights_too", BOTH)
@pytest.mark.parametrize("inverse", BOTH)
def test_half_precision_keeps_its_state_in_fp32(dtype: torch.dtype, weights_too: bool, inverse: bool) -> None:
    masks, weights, biases = random_made(5, (24, 16))
    if weights_too:
        weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases if b is not None]
    made, x = (masks, weights, biases), _x(20, 5).to(dtype)
    inputs = [x, *tensors_of(made)]
    with lf.backend("triton"):
        got = _call(made, precision="fast", inverse=inverse)(*inputs)
    assert [t.dtype for t in got] == [dtype, torch.float32]
    _assert_within_budget(got, _plain(made, inverse=inverse), inputs, "fast")


def test_int64_offsets_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for inverse in BOTH:
        made = random_made(5, (20, 16))
        with monkeypatch.context() as patch:
            assert_same_bits(_call(made, inverse=inverse), [_x(70, 5), *tensors_of(made)], patch, kernels)


@pytest.mark.parametrize("inverse", BOTH)
def test_nan_stays_in_its_row_and_is_not_lost(inverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {name: tile._replace(programs=1) for name, tile in kernels.TILES.items()}
    monkeypatch.setattr(kernels, "TILES", one)  # the rows after the first 64 use the same scratch
    made, x = random_made(4, (20, 16)), _x(200, 4)
    x[3, 0], x[60, 2], x[70, 1] = float("nan"), float("inf"), float("nan")
    clean = torch.ones(200, dtype=torch.bool, device=DEVICE)
    clean[[3, 60, 70]] = False
    for activation in MASKED_ACTIVATIONS:
        with lf.backend("triton"):
            y, log_det = _call(made, activation=activation, inverse=inverse)(x, *tensors_of(made))
        for finite in (y[clean], log_det[clean]):
            assert finite.isfinite().all()
        for lost in (y[3, 0], y[70, 1], log_det[[3, 70]]):
            assert lost.isnan().all()


def _with_gradients(call: Call) -> Call:
    """The outputs, and the gradients of all inputs for fixed cotangents."""

    def both(*tensors: Tensor) -> Outputs:
        outputs = call(*tensors)
        return (*outputs, *torch.autograd.grad(outputs, tensors, fixed_cotangents(*outputs)))

    return both


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("activation", ["silu", *long("elu", "tanh")])
def test_gradients(activation: str, inverse: bool) -> None:
    made = random_made(5, (16,), residual=True)
    extras = random_extras(made[0], 9)
    inputs = [t.requires_grad_() for t in (_x(9, 5), *tensors_of(made, extras))]
    options = {"activation": activation, "inverse": inverse}
    with lf.backend("triton"):
        got = _with_gradients(_call(made, extras, **options))(*inputs)
    _assert_within_budget(got, _with_gradients(_plain(made, extras, **options)), inputs, "exact")


@pytest.mark.parametrize("inverse", BOTH)
def test_opcheck(inverse: bool) -> None:
    masks, weights, biases = random_made(4, (9, 8))
    x, packed = _x(3, 4), masks.pack(weights, biases)
    extras, kinds = masks.pack_extras(random_extras(masks, 3))
    forward, backward = [], []
    for given, precision in ((extras, "high"), (None, "tf32")):
        operands = rounded(packed[: masks.spec((0, 0)).n_matrices], precision, half_dtype(x))
        constants = masks.spec(
            kinds if given is not None else (0, 0), 4, 1, 2.0, 0.0, True, inverse, precision
        ).constants
        forward.append((x, packed, operands, given, *constants))
        gradients = (torch.randn_like(x), x.new_ones(3))
        backward.append((x, packed, given, x, *gradients, *constants, [True, True, False, given is not None]))
    assert_registered(torch.ops.linfast.masked_autoregressive.default, *forward)
    assert_registered(torch.ops.linfast.masked_autoregressive_backward.default, *backward)


@pytest.mark.parametrize("inverse", BOTH)
def test_second_derivatives(inverse: bool) -> None:
    made = random_made(3, (8,))
    inputs = [t.requires_grad_() for t in (_x(4, 3), *tensors_of(made))]

    def loss(call: Call) -> Call:
        def total(*tensors: Tensor) -> Tensor:
            y, log_det = call(*tensors)
            return y.pow(3).sum() + log_det.square().sum()

        return second_derivatives(total)

    options = {"activation": "tanh", "inverse": inverse}
    with lf.backend("triton"):
        got = loss(_call(made, **options))(*inputs)
    _assert_within_budget(got, loss(_plain(made, **options)), inputs, "exact")


def test_functional_transforms() -> None:
    made = random_made(3, (8,))
    x, *tensors = _x(3, 3), *tensors_of(made)

    def loss(call: Call) -> Callable[[Tensor], Tensor]:
        return lambda x: sum(
            (o.square().sum() for o in call(x, *[t.to(x.dtype) for t in tensors])), x.new_zeros(())
        )

    def transforms(call: Call) -> Call:
        one_row = torch.func.vmap(lambda x: torch.func.grad(loss(call))(x[None])[0])
        return lambda x: [torch.func.grad(loss(call))(x), one_row(x), torch.func.jacrev(loss(call))(x)]

    for inverse in BOTH:
        with lf.backend("triton"):
            got = transforms(_call(made, inverse=inverse))(x)
            with pytest.raises(RuntimeError, match="jvp"):
                torch.func.jvp(loss(_call(made, inverse=inverse)), (x,), (x,))
        _assert_within_budget(got, transforms(_plain(made, inverse=inverse)), [x], "exact")


def test_float64_and_the_reference_backend_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_made(3, (8,))
    refuse_launches(monkeypatch)
    for inverse in BOTH:
        with lf.backend("triton"):
            _call(made, inverse=inverse)(*[t.double() for t in (_x(3, 3), *tensors_of(made))])
            with pytest.raises(AssertionError, match="masked_autoregressive:launch"):
                _call(made, inverse=inverse)(_x(3, 3), *tensors_of(made))
        with lf.backend("reference"):
            _call(made, inverse=inverse)(_x(3, 3), *tensors_of(made))


def _schedule(inverse: bool) -> tuple[AutoregressiveMasks, MaskedSpec, list[list[int]]]:
    """Of two residual blocks, with two features of degree 3; the steps."""
    masks, *_ = random_made(7, (40,), order=[2, 1, 4, 3, 3, 6, 5], residual=True)
    spec = masks.spec((0,) * 5, 0, 1, 1.0, 0.0, True, inverse, "exact")
    schedule = masked_schedule.schedule_of(spec, 16, torch.device("cpu"))
    steps = schedule.table[: masked_schedule.STEP * schedule.n_steps].view(-1, masked_schedule.STEP)
    return masks, spec, steps.tolist()


@pytest.mark.parametrize("inverse", BOTH)
def test_every_weight_is_in_one_step(inverse: bool) -> None:
    masks, spec, steps = _schedule(inverse)
    seen = torch.zeros(spec.n_matrices, dtype=torch.int)
    for _, count, known, matrix, stride, *_ in steps:
        for row in range(count):
            start = ALIGNED * (matrix + row * stride)
            seen[start : start + known] += 1
    used = masks.pack([torch.ones(shape) for shape in masks.shapes], [None] * spec.n_layers)[: spec.n_matrices] != 0
    assert int(seen.max()) == 1
    assert bool((seen[used] == 1).all())


@pytest.mark.parametrize("inverse", BOTH)
def test_no_step_reads_what_others_wrote_since_all_waited(inverse: bool) -> None:
    """The interpreter knows no threads, so that a missing wait is not seen there."""
    _, spec, steps = _schedule(inverse)
    units, values, done = set() if inverse else set(range(spec.sizes[0])), set(), set()
    params, waits = False, 0  # whether the place of a feature's parameters is in use
    for flags, count, known, _, _, _, reads, writes, keeps, adds, *_ in steps:
        if flags & masked_schedule.WAITS:
            done |= units
            units, values, params, waits = set(), set(), False, waits + 1
        last = bool(flags & masked_schedule.LAST)
        assert done.issuperset(range(reads, reads + known))
        assert not (last and params)
        if flags & masked_schedule.ADDS:
            assert values.isdisjoint(range(adds, adds + count))
        if flags & masked_schedule.KEEPS:
            values |= set(range(keeps, keeps + count))
        if inverse or not last:
            units |= set(range(writes, writes + (count // 2 if last else count)))
        params = inverse and last
    assert waits < len(steps)


def test_kernels_know_the_activations_by_the_same_ids() -> None:
    for i, name in enumerate(MASKED_ACTIVATIONS):
        assert getattr(masked_steps if name == "elu" else mlp, name.upper()).value == i


def test_derivatives_of_activations_are_automatic_ones() -> None:
    x = torch.linspace(-4, 4, 80, dtype=torch.float64).requires_grad_()  # without 0
    for function, slope in zip(MASKED_ACTIVATIONS.values(), SLOPES, strict=True):
        (expected,) = torch.autograd.grad(function(x).sum(), x)
        torch.testing.assert_close(slope(x.detach()), expected, rtol=1e-13, atol=1e-13)
