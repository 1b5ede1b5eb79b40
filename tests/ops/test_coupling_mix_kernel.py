"""Coupling and mix in one launch against float64: maps, widths, layouts, strides, precisions, transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.ops import affine_coupling, channel_mix, coupling_mix
from linfast.ops.affine_coupling import coupling_constants, split_sizes
from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
from tests.marks import long
from tests.ops.budget import DEVICE, assert_within_budget, hostile
from tests.ops.checks import (
    assert_registered,
    assert_same_bits,
    assert_transforms,
    fixed_cotangents,
    second_derivatives,
    turned,
)

# Odd sizes, one row, no rows, more columns than a tile, several positions that a power of two divides.
SHAPES = [
    (9, 7),
    (1, 2),
    (0, 4),
    (3, 6, 5, 7),
    (2, 3, 40, 31),
    (2, 17, 20, 12),
    (150, 20),
    (2, 4, 0, 3),
    (3, 4, 2, 3, 2),
]


def _inputs(
    shape: tuple[int, ...], n_out: int | None = None, moves: str = "first", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """(x, params, weight, bias)"""
    n_out = shape[1] if n_out is None else n_out
    moved = split_sizes(shape[1])[moves == "second"]
    sizes = (shape, (shape[0], 2 * moved, *shape[2:]), (n_out, shape[1]), (n_out,))
    return [torch.randn(size).to(DEVICE, dtype).requires_grad_() for size in sizes]


def _outputs_and_gradients(scale_map: ScaleMap | None = None, **options: object) -> Callable[..., Sequence[Tensor]]:
    """(y, log_det, dx, dparams, dweight, dbias) for fixed random cotangents."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, params, *rest = tensors
        y, log_det = coupling_mix(x, params, scale_map or ScaleMap(), *rest, log_det=True, **options)  # type: ignore[arg-type]
        return (y, log_det, *torch.autograd.grad((y, log_det), tensors, fixed_cotangents(y, log_det)))

    return call


def _last(x: Tensor) -> Tensor:
    return x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()


@pytest.mark.parametrize(("kind", "inverse", "order"), turned(SCALE_MAP_KINDS))
@pytest.mark.parametrize("channels", [5, *long(18)])
def test_every_map_order_and_direction(kind: str, inverse: bool, order: str, channels: int) -> None:
    call = _outputs_and_gradients(ScaleMap(kind, floor=1e-3), inverse=inverse, order=order)
    assert_within_budget(call, _inputs((2, channels, 7, 4)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("moves", "layout"),
    [("first", "halves"), ("second", "interleaved"), *long(("first", "interleaved"), ("second", "halves"))],
)
def test_every_shape_and_layout(shape: tuple[int, ...], moves: str, layout: str) -> None:
    assert_within_budget(_outputs_and_gradients(moves=moves, layout=layout), _inputs(shape, moves=moves))


@pytest.mark.parametrize(
    ("n_in", "n_out"), [(2, 2), (3, 5), (15, 15), (15, 16), (16, 16), (33, 33), (65, 64), (128, 128)]
)
@pytest.mark.parametrize(
    ("last", "moves"), [(False, "second"), (True, "first"), *long((False, "first"), (True, "second"))]
)
def test_every_width(n_in: int, n_out: int, last: bool, moves: str) -> None:
    x, params, *rest = _inputs((2, n_in, 5, 4), n_out, moves)
    inputs = [_last(x), _last(params), *rest] if last else [x, params, *rest]
    assert_within_budget(_outputs_and_gradients(moves=moves), inputs)
    assert_within_budget(_outputs_and_gradients(moves=moves), inputs[:3])


@pytest.mark.parametrize("n_in", [3, 20])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.float16, torch.float32)])
def test_half_precision_sums_and_scales_in_fp32(n_in: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, params, *rest = _inputs((2, n_in, 5, 7))
    x, params = (t.detach().to(dtypes[0]).requires_grad_() for t in (x, params))
    inputs = [x, params, *(t.detach().to(dtypes[1]).requires_grad_() for t in rest)]
    with lf.backend("triton"):
        results = _outputs_and_gradients()(*inputs)
    narrow, wide = dtypes
    assert [t.dtype for t in results] == [narrow, torch.float32, narrow, narrow, wide, wide]
    assert_within_budget(_outputs_and_gradients(), inputs)


@pytest.mark.parametrize(("n_in", "inverse"), [(5, True), (18, False), *long((5, False), (18, True))])
def test_strides_of_inputs_and_of_the_incoming_gradient(n_in: int, inverse: bool) -> None:
    x, params, weight, bias = (t.detach() for t in _inputs((2, n_in, 3, 4)))
    cotangent = torch.randn(x.shape).to(x)
    for name in hostile(x):
        for gradient_name in {name, "contiguous", "expanded"}:

            def call(*tensors: Tensor, gradient_name: str = gradient_name) -> tuple[Tensor, ...]:
                x, params, *rest = tensors
                y, _ = coupling_mix(x, params, ScaleMap("tanh"), *rest, inverse=inverse)
                return (y, *torch.autograd.grad(y, tensors, hostile(cotangent.to(y.dtype))[gradient_name]))

            strided = [hostile(x)[name], hostile(params)[name], weight.t(), bias.expand(3, -1)[1]]
            assert_within_budget(call, [t.requires_grad_() for t in strided])


def test_each_tensor_in_a_separate_layout() -> None:
    for n_in in (4, 16):
        x, params, weight, bias = (t.detach() for t in _inputs((3, n_in, 5, 4)))
        wide = torch.full((2 * n_in, 3 * n_in), float("nan"), device=DEVICE)
        wide[::2, ::3] = weight
        mixed = [hostile(x)["channels_last"], hostile(params)["transposed"], wide[::2, ::3], bias[:1].expand(n_in)]
        inputs = [t.detach().requires_grad_() for t in mixed]
        assert_within_budget(_outputs_and_gradients(), inputs)
        inputs = [x.requires_grad_(), _last(params), *inputs[2:]]
        assert_within_budget(_outputs_and_gradients(), inputs)


@pytest.mark.parametrize("only", range(4))
@pytest.mark.parametrize("n_in", [4, 17])
@pytest.mark.parametrize("output", [0, 1])
def test_each_gradient_alone(only: int, n_in: int, output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import linfast.kernels.channel_mix as mix_kernels
    import linfast.kernels.coupling_mix_backward as kernels

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, params, *rest = tensors
        value = coupling_mix(x, params, ScaleMap(), *rest, log_det=True)[output]
        if not value.requires_grad:  # the reference's log_det has no graph to what it does not depend on
            return (torch.zeros_like(tensors[only]),)
        return torch.autograd.grad(value.square().sum(), tensors[only], allow_unused=True, materialize_grads=True)

    inputs = [t.detach().requires_grad_(i == only) for i, t in enumerate(_inputs((2, n_in, 3, 5)))]
    assert_within_budget(call, inputs)

    def refuse(*_: object) -> None:
        raise AssertionError("computed a gradient that is not required")

    monkeypatch.setattr(mix_kernels, "weight_partials", refuse) if only < 2 else monkeypatch.setattr(
        kernels, "_backward", refuse
    )
    with lf.backend("triton"):
        call(*inputs)


@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives_are_autograds(inverse: bool) -> None:
    def loss(x: Tensor, params: Tensor, *rest: Tensor) -> Tensor:
        y, log_det = coupling_mix(x, params, ScaleMap("tanh"), *rest, inverse=inverse, log_det=True)
        return y.pow(3).sum() + log_det.square().sum()  # type: ignore[union-attr]

    assert_within_budget(second_derivatives(loss), _inputs((2, 4, 3, 2), 5))


@pytest.mark.parametrize("n_in", [4, 17])
@pytest.mark.parametrize("last", [False, True])
def test_int64_offsets_and_a_second_run_give_the_same_bits(
    n_in: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import linfast.kernels.channel_mix as kernels

    x, params, *rest = _inputs((3, n_in, 12, 17))
    inputs = [_last(x), _last(params), *rest] if last else [x, params, *rest]
    assert_same_bits(_outputs_and_gradients(), inputs, monkeypatch, kernels)


def test_int64_is_chosen_where_an_offset_needs_it() -> None:
    from linfast.kernels.channel_mix import columns_need_int64

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    assert not columns_need_int64(2**20, meta(2**10, 2, 2**10), meta(2, 2))
    assert columns_need_int64(2**20, meta(2**10, 2, 2**10), meta(2**11, 2, 2**19 + 1))
    assert columns_need_int64(2**31 - 1, meta(1).expand(1, 2, 2**31 - 1))  # a tile past the last column overflows


def test_log_det_is_the_couplings_and_its_groups_lie_in_one_sample() -> None:
    for shape in (
        (5, 4),
        (3, 4, 7, 3),
        (3, 4, 6, 2),
        (2, 4, 16, 16),
        (2, 4, 64, 32),
        (3, 17, 6, 3),
        (2, 17, 16, 16),
    ):
        x, params, weight, bias = (t.detach() for t in _inputs(shape))
        for inverse in (False, True):
            _, expected = affine_coupling(x, params, ScaleMap(), inverse=inverse, log_det=True)
            with lf.backend("triton"):
                y, got = coupling_mix(x, params, ScaleMap(), weight, bias, inverse=inverse, log_det=True)
                without, none = coupling_mix(x, params, ScaleMap(), weight, bias, inverse=inverse)
            torch.testing.assert_close(got, expected)
            assert none is None
            assert torch.equal(y, without)


def test_nan_stays_in_its_column() -> None:
    for n_in in (3, 20):
        x, params, weight, bias = (t.detach() for t in _inputs((2, n_in, 3, 3)))
        params[0, 1, 2, 2] = float("nan")
        with lf.backend("triton"):
            y, log_det = coupling_mix(x, params, ScaleMap(), weight, bias, log_det=True)
        assert bool(y[0, :, 2, 2].isnan().all())
        assert int(y.isnan().sum()) == n_in
        params[0, -1, 2, 2] = float("nan")
        with lf.backend("triton"):
            _, log_det = coupling_mix(x, params, ScaleMap(), weight, bias, log_det=True)
        assert log_det is not None
        assert log_det.isnan().tolist() == [True, False]


@pytest.mark.parametrize(("bias", "last"), [(False, True), (True, False), *long((False, False), (True, True))])
def test_opcheck(bias: bool, last: bool) -> None:
    forward, backward = [], []
    for shape in ((2, 18, 5, 1), (2, 4, 3, 3), (3, 5)):
        x, params, weight, *rest = (t.detach() for t in _inputs(shape, 6))
        x, params = (_last(x).detach(), _last(params).detach()) if last else (x, params)
        constants = coupling_constants(ScaleMap(), "shift_first", "halves", "first", last, bias)
        forward.append((x, params, weight, rest[0] if bias else None, *constants))
        grad = torch.randn(shape[0], 6, *shape[2:], device=DEVICE)
        h = x.new_ones(shape[0]) if bias else None
        alone = [[i == only for i in range(4)] for only in range(4)]
        backward += [(x, params, weight, grad, h, *constants, n) for n in ([True, True, True, bias], *alone)]
    assert_registered(torch.ops.linfast.coupling_mix.default, *forward)
    assert_registered(torch.ops.linfast.coupling_mix_backward.default, *backward)


@pytest.mark.parametrize(("log_det", "channels"), [(True, 4), (False, 17), *long((False, 4), (True, 17))])
def test_compiles_whole_and_runs_the_kernels(log_det: bool, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs((2, channels, 3, 2))

    def loss(*tensors: Tensor) -> Tensor:
        x, params, *rest = tensors
        y, total = coupling_mix(x, params, ScaleMap(), *rest, log_det=log_det)
        return y.pow(3).sum() + (total.sum() if total is not None else 0.0)

    with lf.backend("triton"):
        expected = torch.autograd.grad(loss(*inputs), inputs)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        seen = _launches(monkeypatch)
        got = torch.autograd.grad(compiled(*inputs), inputs)
    assert seen == ["launch_coupling_mix", "launch_coupling_mix_backward"]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_transforms() -> None:
    def loss(x: Tensor, params: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, log_det = coupling_mix(x, params, ScaleMap(), weight, bias, log_det=True)
        return y.pow(3).sum() + log_det.sum()  # type: ignore[union-attr]

    def transforms(x: Tensor, params: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        one_row = torch.func.vmap(lambda x, p: torch.func.grad(loss)(x[None], p[None], weight, bias)[0])
        jacobian = torch.func.jacrev(lambda w: coupling_mix(x, params, ScaleMap(), w, bias)[0])
        gradients = torch.func.grad(loss, argnums=(0, 1, 2, 3))(x, params, weight, bias)
        return [*gradients, one_row(x, params), jacobian(weight)]

    assert_transforms(transforms, loss, [t.detach() for t in _inputs((2, 3, 2, 2))])


def _launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the launchers that run from here on."""
    from linfast.ops import register

    seen, launcher = [], register._launcher
    monkeypatch.setattr(register, "_launcher", lambda path: seen.append(path.partition(":")[2]) or launcher(path))
    return seen


@pytest.mark.parametrize(
    ("shape", "launches"),
    [
        ((2, 64), ["launch_coupling_mix"]),
        ((2, 65), ["launch_affine_coupling"]),  # and cuBLAS
        ((1, 128, 1, 2), ["launch_coupling_mix"]),
        ((1, 129, 1, 2), ["launch_affine_coupling", "launch_channel_mix"]),
    ],
)
def test_which_shapes_are_one_launch(
    shape: tuple[int, ...], launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, params, weight, bias = (t.detach() for t in _inputs(shape))
    seen = _launches(monkeypatch)
    expected, _ = coupling_mix(x, params, ScaleMap(), weight, bias)
    with lf.backend("triton"):
        coupling_mix(x.double(), params.double(), ScaleMap(), weight.double(), bias.double())
    assert seen == []
    with lf.backend("triton"):
        y, _ = coupling_mix(x, params, ScaleMap(), weight, bias)
    assert seen == launches
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("narrow", [False, True])
def test_autocast_casts_as_the_two_ops_do(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, params, weight, bias = (t.detach() for t in _inputs((2, 6, 4, 4)))
    x = x.half() if narrow else x
    seen = _launches(monkeypatch)
    with torch.autocast(DEVICE, torch.float16):
        expected = channel_mix(affine_coupling(x, params, ScaleMap())[0], weight, bias)
        with lf.backend("triton"):
            y, log_det = coupling_mix(x, params, ScaleMap(), weight, bias, log_det=True)
    assert (seen == ["launch_coupling_mix"]) == narrow
    assert (y.dtype, log_det.dtype) == (torch.float16, torch.float32)  # type: ignore[union-attr]
    assert expected.dtype == torch.float16
    torch.testing.assert_close(y, expected, rtol=3e-3, atol=3e-3)


def test_bad_input_is_named() -> None:
    x, params, weight, bias = (t.detach() for t in _inputs((3, 4, 2, 2)))
    with pytest.raises(ValueError, match=r"params must be \(3, 4, 2, 2\).*\(3, 3, 2, 2\)"):
        coupling_mix(x, params[:, :3], ScaleMap(), weight)
    with pytest.raises(ValueError, match=r"weight.*\(4, 3\)"):
        coupling_mix(x, params, ScaleMap(), weight[:, :3])
    with pytest.raises(ValueError, match=r"bias must be \[4\].*\(3,\)"):
        coupling_mix(x, params, ScaleMap(), weight, bias[:3])
    with pytest.raises(ValueError, match=r"order.*'x'"):
        coupling_mix(x, params, ScaleMap(), weight, order="x")
