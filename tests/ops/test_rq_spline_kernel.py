"""rq_spline's kernels against float64: every kind of tails and parameters, direction, layout, size and stride."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linfast.kernels.spline_spec import TAILS, Spline
from torch import Tensor

import linfast as lf
from linfast.ops.rq_spline import spline_transform
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

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bins last": lambda p: p.contiguous(),
    "planes": lambda p: p.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "features last": lambda p: p.mT.contiguous().mT,
    "shared": lambda p: p[:1].contiguous(),
}
BINS = (8, 2, 5)  # all of a matrix's columns, the fewest bins, and fewer than the columns
# (tails, soft clip, bins, layout, inverse): directions alternate in the default ones; the long ones are the others.
FORMS = [
    (tails, (i + j // 2 + inverse) % 2 == 1, BINS[(i + j) % 3], layout, inverse)
    for i, tails in enumerate(TAILS)
    for j, layout in enumerate(LAYOUTS)
    for inverse in ((i + j) % 2 == 0, (i + j) % 2 == 1)
]
# One value, no sample, two tiles of features, features that do not fill a tile, rows that do not.
SHAPES = [(1, 1), (0, 4), (3, 130), (13, 11), (260, 1)]
Call = Callable[..., tuple[Tensor, ...]]


def _spline(tails: str = "linear", soft_clip: bool = False, bins: int = 8) -> Spline:
    least = 0.0 if soft_clip else 1e-3
    return Spline(bins, -3.0, 2.5, least, 2 * least, 1e-3, 0.7, TAILS.index(tails), soft_clip)


def _inputs(
    shape: tuple[int, int], spline: Spline, layout: str = "bins last", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, of which some values are outside the interval, and its parameters."""
    params = LAYOUTS[layout](torch.randn(*shape, spline.per_feature))
    return [t.to(DEVICE, dtype).requires_grad_() for t in (2 * torch.randn(shape), params)]


def _outputs_and_gradients(spline: Spline, inverse: bool = False) -> Call:
    """(y, log_det, dx, dparams) for fixed random cotangents."""

    def call(x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
        y, log_det = spline_transform(x, params, spline, inverse, True)
        assert log_det is not None
        return (y, log_det, *torch.autograd.grad((y, log_det), (x, params), fixed_cotangents(y, log_det)))

    return call


@pytest.mark.parametrize(("tails", "soft_clip", "bins", "layout", "inverse"), [*FORMS[::2], *long(*FORMS[1::2])])
def test_every_form(tails: str, soft_clip: bool, bins: int, layout: str, inverse: bool) -> None:
    spline = _spline(tails, soft_clip, bins)
    assert_within_budget(_outputs_and_gradients(spline, inverse), _inputs((29, 6), spline, layout))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["bins last", *long("planes", "features last", "shared")])
def test_every_shape(shape: tuple[int, int], layout: str) -> None:
    spline = _spline(bins=3)
    inputs = _inputs(shape, spline, layout if shape[0] else "bins last")
    assert_within_budget(_outputs_and_gradients(spline, inverse=shape[1] % 2 == 0), inputs)


@pytest.mark.parametrize("tails", ["bounded", *long("linear", "circular")])
def test_more_bins_than_the_first_tile_has(tails: str) -> None:
    for bins in (9, 16):
        spline = _spline(tails, bins=bins)
        assert_within_budget(_outputs_and_gradients(spline), _inputs((7, 3), spline))


@pytest.mark.parametrize("layout", ["bins last", "shared"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_computes_in_fp32(dtype: torch.dtype, layout: str) -> None:
    spline = _spline()
    inputs = _inputs((40, 5), spline, layout, dtype)
    with lf.backend("triton"):
        y, log_det = spline_transform(*inputs, spline, False, True)
    assert y.dtype == dtype
    assert log_det is not None
    assert log_det.dtype == torch.float32
    for inverse in (False, True):
        assert_within_budget(_outputs_and_gradients(spline, inverse), inputs)


def test_half_precision_values_with_fp32_parameters() -> None:
    spline = _spline()
    x, params = _inputs((20, 3), spline)
    inputs = [x.detach().to(HALF_DTYPES[-1]).requires_grad_(), params]
    assert_within_budget(_outputs_and_gradients(spline), inputs)


@pytest.mark.parametrize("inverse", [False, *long(True)])
def test_strides_of_inputs_and_of_the_incoming_gradients(inverse: bool) -> None:
    spline = _spline(bins=3)
    x, params = (t.detach() for t in _inputs((6, 5), spline))
    cotangents = fixed_cotangents(x, x[:, 0])
    for name in hostile(x):

        def call(x: Tensor, params: Tensor, name: str = name) -> tuple[Tensor, ...]:
            y, log_det = spline_transform(x, params, spline, inverse, True)
            assert log_det is not None
            given = [hostile(cotangents[0].to(y))[name], cotangents[1].to(log_det)[:1].expand(log_det.shape)]
            return (y, log_det, *torch.autograd.grad((y, log_det), (x, params), given))

        assert_within_budget(call, [hostile(t)[name].requires_grad_() for t in (x, params)])


@pytest.mark.parametrize("only", ["x", "params"])
@pytest.mark.parametrize("output", [0, 1], ids=["y", "log_det"])
def test_each_gradient_alone(only: str, output: int) -> None:
    spline = _spline("circular", bins=4)

    def call(x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
        value = spline_transform(x, params, spline, output == 0, True)[output]
        assert value is not None
        return torch.autograd.grad(value, x if only == "x" else params, fixed_cotangents(value)[0])

    x, params = _inputs((6, 5), spline)
    assert_within_budget(
        call, [x.detach().requires_grad_(only == "x"), params.detach().requires_grad_(only != "x")]
    )


def test_no_log_det_where_it_is_not_requested() -> None:
    spline = _spline(bins=4)

    def call(x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
        y, log_det = spline_transform(x, params, spline, False, False)
        assert log_det is None
        return (y, *torch.autograd.grad(y, (x, params), fixed_cotangents(y)))

    assert_within_budget(call, _inputs((6, 5), spline))


@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives_are_the_references(inverse: bool) -> None:
    spline = _spline(bins=3)

    def loss(x: Tensor, params: Tensor) -> Tensor:
        y, log_det = spline_transform(x, params, spline, inverse, True)
        assert log_det is not None
        return y.pow(3).sum() + log_det.square().sum()

    assert_within_budget(second_derivatives(loss), _inputs((4, 3), spline))


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("tails", TAILS)
def test_nothing_is_nan_and_the_map_is_monotone(tails: str, size: float) -> None:
    """On a grid that contains the ends, the knots and values outside, with raw parameters up to 1e4."""
    spline = _spline(tails, bins=5)
    params = size * torch.randn(1, 4, spline.per_feature, device=DEVICE)
    params[:, 0, :5] = 0  # equal widths: knots of known positions
    knots = torch.linspace(spline.low, spline.high, 6, device=DEVICE)
    grid = torch.cat((knots, torch.linspace(-4, 4, 120, device=DEVICE))).sort().values
    outside, ends = (grid < spline.low) | (grid > spline.high), (grid == spline.low) | (grid == spline.high)
    for inverse in (False, True):
        x = grid[:, None].expand(-1, 4).clone().requires_grad_()
        with lf.backend("triton"):
            results = _outputs_and_gradients(spline, inverse)(x, params.clone().requires_grad_())
        assert all(bool(t.isfinite().all()) for t in results)
        y = results[0]
        assert bool((y.diff(dim=0) >= -1e-6).all())
        assert torch.equal(y[outside], x[outside])
        if size == 1.0:  # a slope of 1e4 makes a rounded knot a large error
            torch.testing.assert_close(y[ends], x[ends])


def test_the_inverse_is_accurate_where_a_bin_ends_steeply() -> None:
    """There b + sqrt(b^2 + 4 a s z), the denominator of the usual form, loses the digits of 1e4."""
    spline = Spline(2, tails=TAILS.index("bounded"))
    params = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e4], device=DEVICE).expand(1, 1, -1)
    y = torch.linspace(0.1, 3, 50, device=DEVICE)[:, None]
    with lf.backend("triton"):
        x, _ = spline_transform(y, params, spline, True, False)
    with lf.backend("reference"):
        truth, _ = spline_transform(y.double(), params.double(), spline, True, False)
    assert float((x - truth).abs().max()) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int64_offsets_and_a_second_run_give_the_same_bits(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import linfast.kernels.rq_spline as kernels

    spline = _spline(bins=4)
    assert_same_bits(_outputs_and_gradients(spline), _inputs((70, 3), spline, layout), monkeypatch, kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_launch_each_way(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import linfast.kernels.rq_spline as kernels

    launched = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            launched.append(self.name)
            return self.kernel[grid]

    names = ["_rq_spline_kernel", "_rq_spline_backward_kernel"]
    for name in names:
        monkeypatch.setattr(kernels, name, Counted(name))
    spline = _spline(bins=2)
    with lf.backend("triton"):
        _outputs_and_gradients(spline)(*_inputs((300, 2), spline, layout))
    assert launched == names


@pytest.mark.parametrize(
    ("layout", "inverse", "log_det"), [("bins last", False, True), ("planes", True, False), ("shared", True, True)]
)
def test_opcheck(layout: str, inverse: bool, log_det: bool) -> None:
    spline = _spline(bins=3)
    x, params = (t.detach() for t in _inputs((5, 4), spline, layout))
    options = (*spline, inverse, log_det)
    assert_registered(torch.ops.linfast.rq_spline.default, (x, params, *options))
    given = (torch.randn_like(x), torch.randn_like(x[:, 0]) if log_det else None)
    needs = ([True, True], [True, False], [False, True])
    calls = [(x, params, *given, *options, needed) for needed in needs]
    assert_registered(torch.ops.linfast.rq_spline_backward.default, *calls)


def _loss(x: Tensor, params: Tensor) -> Tensor:
    y, log_det = spline_transform(x, params, _spline(bins=3), False, True)
    assert log_det is not None
    return y.square().sum() + log_det.sum()


def test_compiles_whole_and_runs_the_kernels() -> None:
    assert_compiles_whole(_loss, _inputs((5, 4), _spline(bins=3)), "rq_spline")


def test_functional_transforms() -> None:
    spline = _spline(bins=3)

    def transforms(x: Tensor, params: Tensor) -> list[Tensor]:
        one_row = torch.func.vmap(lambda x, p: torch.func.grad(_loss)(x[None], p[None])[0])
        jacobian = torch.func.jacrev(lambda x: spline_transform(x, params, spline, True, False)[0])
        return [*torch.func.grad(_loss, argnums=(0, 1))(x, params), one_row(x, params), jacobian(x)]

    assert_transforms(transforms, _loss, [t.detach() for t in _inputs((3, 2), spline)])


def test_float64_and_the_reference_backend_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    spline = _spline(bins=3)
    x, params = (t.detach() for t in _inputs((3, 4), spline))
    with lf.backend("triton"):
        if DEVICE != "cpu":  # where float64 runs the op's plain code, which the test's patch refuses as well
            spline_transform(x.double(), params.double(), spline, False, True)
        with pytest.raises(AssertionError, match="rq_spline:launch"):
            spline_transform(x, params, spline, False, True)
    with lf.backend("reference"):
        spline_transform(x, params, spline, False, True)
