"""rq_spline on a CPU: errors, derivatives, extreme parameters, sizes, strides and torch's transforms.

Errors against float64 are compared with what rounding allows the reference, and with the errors of the libraries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linfast.bench.rounding import relative_error
from linfast.kernels.spline_spec import Spline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import linfast as lf
from linfast.ops import rq_spline, spline_plain
from linfast.ops.rq_spline import spline_backward
from tests.ops.budget import DEVICE, Outputs, assert_accurate
from tests.ops.op_cases import gradients_of

TAILS = {"linear": -1, "circular": 0, "bounded": 1}
KINDS = [(tails, parameters) for tails in TAILS for parameters in ("softmax", "soft_clip")]


def drawn(
    B: int, D: int, K: int, tails: str = "linear", rows: int | None = None, scale: float = 1.0
) -> list[Tensor]:
    """x, partly outside the interval, and raw widths, heights and derivatives; float64 that fits bfloat16."""
    rows = B if rows is None else rows
    shapes = [(rows, D, K), (rows, D, K), (rows, D, K + TAILS[tails])]
    tensors = [2 * torch.randn(B, D), *(scale * torch.randn(shape) for shape in shapes)]
    return [t.bfloat16().double() for t in tensors]


def splined(*tensors: Tensor, **options: Any) -> Outputs:
    """y, log|det| and the gradients of a weighted sum of both for all tensors."""
    tensors = tuple(t.detach().requires_grad_() for t in tensors)
    outputs = rq_spline(*tensors, log_det=True, **options)
    return (*(o.detach() for o in outputs), *gradients_of(outputs, tensors))


def check(tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
    """In this dtype the fast code errs no more than the reference may."""
    narrow = [t.to(dtype) for t in tensors]
    with lf.backend("reference"):
        truth = splined(*tensors, **options)
    got = splined(*narrow, **options)
    assert got[1].dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in (got[0], *got[2:])] == 5 * [dtype]
    assert_accurate(got, lambda: splined(*narrow, **options), truth)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("tails", "parameters"), KINDS)
def test_errors_are_those_of_rounding(tails: str, parameters: str, inverse: bool) -> None:
    for dtype, K, rows in (
        (torch.float32, 8, 60),
        (torch.float32, 3, 1),
        (torch.float16, 2, 60),
        (torch.bfloat16, 8, 60),
    ):
        tensors = drawn(60, 3, K, tails, rows)
        options: dict[str, Any] = {"interval": (-2.0, 3.0)}
        if parameters == "softmax":
            options |= {"temperature": 1.5, "min_width": 2e-3, "min_height": 4e-3}
        check(tensors, dtype, tails=tails, parameters=parameters, inverse=inverse, **options)


def test_many_bins() -> None:
    check(drawn(40, 2, 64, scale=3.0), torch.float32)


def test_float64() -> None:
    """The fast code and the reference round differently, so that both being wrong alike is unlikely."""
    for inverse, (tails, parameters) in itertools.product((False, True), KINDS):
        tensors, options = drawn(50, 3, 5, tails), {"tails": tails, "parameters": parameters, "inverse": inverse}
        with lf.backend("reference"):
            truth = splined(*tensors, **options)
        for got, exact in zip(splined(*tensors, **options), truth, strict=True):
            assert relative_error(got, exact) < 1e-12


# Beside the libraries' code


def of_nflows(x: Tensor, *raw: Tensor, inverse: bool) -> Outputs:
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    y, logs = unconstrained_rational_quadratic_spline(x, *raw, inverse=inverse, tail_bound=3.0)
    return y, logs.sum(1)


def of_normflows(x: Tensor, *raw: Tensor, inverse: bool) -> Outputs:
    from normflows.utils.splines import unconstrained_rational_quadratic_spline

    y, logs = unconstrained_rational_quadratic_spline(x, *raw, inverse=inverse, tails="circular", tail_bound=3.0)
    return y, logs.sum(1)


def of_zuko(x: Tensor, *raw: Tensor, inverse: bool) -> Outputs:
    from zuko.transforms import MonotonicRQSTransform

    transform = MonotonicRQSTransform(*raw, bound=3.0)
    y, logs = (transform.inv if inverse else transform).call_and_ladj(x)
    return y, logs.sum(1)


LIBRARIES = {
    "nflows": (of_nflows, {}),
    "normflows": (of_normflows, {"tails": "circular"}),
    "zuko": (of_zuko, {"parameters": "soft_clip"}),
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_errors_are_at_most_twice_those_of_a_library(name: str, inverse: bool) -> None:
    of_name, options = LIBRARIES[name]
    pytest.importorskip(name)
    tensors = drawn(1000, 4, 8, options.get("tails", "linear"))
    tensors[0] = (2 * torch.randn(1000, 4)).double()  # not at the ends, where the libraries differ

    def of_library(*tensors: Tensor) -> Outputs:
        tensors = tuple(t.detach().requires_grad_() for t in tensors)
        outputs = of_name(*tensors, inverse=inverse)
        return (*outputs, *gradients_of(outputs, tensors))

    truth = of_library(*tensors)
    for got, exact in zip(splined(*tensors, inverse=inverse, **options), truth, strict=True):
        assert relative_error(got, exact) < 1e-11  # the same function
    narrow = [t.float() for t in tensors]
    found, others = splined(*narrow, inverse=inverse, **options), of_library(*narrow)
    quantiles = torch.tensor([0.9, 0.99], dtype=torch.float64)  # the largest errors depend on luck at a few knots
    for i, (got, other, exact) in enumerate(zip(found, others, truth, strict=True)):
        ours, theirs = ((t.detach() - exact).abs().flatten().quantile(quantiles) for t in (got, other))
        assert bool((ours <= 2 * theirs).all()), f"output {i}: {ours} > 2 x {theirs}"


def test_32_splines_and_back() -> None:
    """The round trip's error is that of the reference, and at most twice that of nflows."""
    x = 2 * torch.randn(300, 4)
    layers = [drawn(300, 4, 8)[1:] for _ in range(32)]

    def there_and_back(spline: Callable[..., Outputs], dtype: torch.dtype) -> Outputs:
        y = x.to(dtype)
        for inverse, raw in ((False, layers), (True, layers[::-1])):
            for tensors in raw:
                y = spline(y, *(t.to(dtype) for t in tensors), inverse=inverse)[0]
        return (y,)

    got = there_and_back(rq_spline, torch.float32)
    assert_accurate(got, functools.partial(there_and_back, rq_spline, torch.float32), (x.double(),))
    theirs = there_and_back(of_nflows, torch.float32)[0]
    assert relative_error(got[0], x.double()) <= 2 * relative_error(theirs, x.double())


# Extreme parameters


EXTREMES = {"softmax": ("linear", "circular", "bounded"), "soft_clip": ("linear",)}


def extreme(seed: int, tails: str, K: int) -> tuple[Tensor, list[Tensor]]:
    """Values [n] sorted, and parameters [1, n] that they share: raw values to 1e4, also equal and zero ones."""
    random = torch.Generator().manual_seed(seed)
    scale = (0.0, 1.0, 30.0, 1e3, 1e4)[seed % 5]
    raw = [scale * (2 * torch.rand(n, generator=random) - 1) for n in (K, K, K + TAILS[tails])]
    if seed % 3 == 0:
        raw = [scale * (r > 0).float() - scale * (r < 0).float() for r in raw]
    if seed % 7 == 0:
        raw[0] = torch.full_like(raw[0], -scale)
        raw[0][seed % K] = scale  # the other bins have the least width
    x = torch.cat((6 * torch.rand(200, generator=random) - 3, torch.tensor([-3.0, 3.0, 0.0, -1e4, 1e4, -0.0])))
    ends = torch.tensor([-3.0, 3.0])
    outside = torch.nextafter(ends, torch.tensor([-9.0, 9.0]))
    return torch.cat((x, outside, torch.nextafter(ends, torch.zeros(2)))), raw


def knots(raw: Tensor, least: float) -> Tensor:
    """The starts of bins, in fp32 as the reference computes them."""
    sizes = 6 * (least + (1 - least * len(raw)) * torch.softmax(raw, 0))
    return -3 + sizes.cumsum(0)[:-1]


@pytest.mark.parametrize("seed", range(35))
def test_extreme_parameters(seed: int) -> None:
    """Raw values to 1e4; x on knots, at ends and just outside: all is finite, monotonic, undone by the inverse."""
    least, K = 1e-6, (2, 5, 8, 16)[seed % 4]
    for parameters, tails in [(p, t) for p, every in EXTREMES.items() for t in every]:
        options: dict[str, Any] = {"min_derivative": least}
        options |= {} if parameters == "soft_clip" else {"min_width": least, "min_height": least}
        x, raw = extreme(seed, tails, K)
        on_knots = [knots(r, least) for r in raw[:2]]
        x = (
            torch.cat((x, *on_knots, *(torch.nextafter(k, torch.full_like(k, 9.0)) for k in on_knots)))
            .sort()
            .values
        )
        one = [r.expand(len(x), 1, -1).contiguous() for r in raw]
        options |= {"tails": tails, "parameters": parameters}
        for inverse, backend in itertools.product((False, True), ("auto", "reference")):
            with lf.backend(backend):
                outputs = splined(x[:, None], *one, inverse=inverse, **options)
            for i, output in enumerate(outputs):
                assert bool(output.isfinite().all()), f"{tails}, {parameters}, {inverse=}, {backend}, output {i}"
            assert float(outputs[0][:, 0].diff().min()) >= -_APART  # x is sorted
            assert float(outputs[1].abs().max()) < 60
            _assert_undone(x, outputs[0], one, inverse, options)


_APART = 48 * torch.finfo(torch.float32).eps  # sixteen roundings, of sums of 16 bins, of numbers as large as 3


def _assert_undone(x: Tensor, y: Tensor, one: list[Tensor], inverse: bool, options: dict[str, Any]) -> None:
    """y [B, 1] is the image of x and the other direction maps it back, both but for ``_APART`` in x and in y."""
    back, _ = rq_spline(y, *one, inverse=not inverse, **options)
    wide = [t.double() for t in one]
    with lf.backend("reference"):
        low, high = (
            rq_spline(y.double() + d, *wide, inverse=not inverse, **options)[0][:, 0] + d for d in (-_APART, _APART)
        )
    slack = 1e-6 * (x.abs() - 3).clamp_min(0)  # outside the interval
    for each in (x, back[:, 0]):
        assert bool(((low - slack <= each) & (each <= high + slack)).all())


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter, where a kernel's branch is not taken
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(("tails", "parameters"), KINDS)
def test_raw_values_to_1e8(tails: str, parameters: str, backend: str) -> None:
    """Nothing is NaN or infinite, with the least sizes, in the largest interval, for the least temperature."""
    options: dict[str, Any] = {"tails": tails, "parameters": parameters, "min_derivative": 1e-6}
    for interval in ((-3.0, 3.0), (-1e6, 1e6)):
        drawn_ones = [t.float().to(DEVICE) for t in drawn(40, 5, 8, tails)]
        x = drawn_ones[0] * interval[1] / 3
        raw = [1e8 * t.sign() * 10 ** -(8 * torch.rand_like(t)) for t in drawn_ones[1:]]
        if parameters == "softmax":
            options |= {"min_width": 1e-6, "min_height": 1e-6, "temperature": 1e-6 if interval[1] == 3 else 1.0}
        for inverse in (False, True):
            with lf.backend(backend):
                outputs = splined(x, *raw, interval=interval, inverse=inverse, **options)
            assert all(bool(output.isfinite().all()) for output in outputs)


def test_the_reference_takes_the_steepest_slopes() -> None:
    x, widths, heights, derivatives = (t.float() for t in drawn(20, 2, 4, "bounded"))
    with lf.backend("reference"):
        outputs = splined(x, widths, heights, derivatives.abs() * 1e25, tails="bounded")
    assert all(bool(output.isfinite().all()) for output in outputs)


def test_bad_arguments_get_a_clear_error() -> None:
    tensors = drawn(2, 3, 4)
    for options, message in (
        (
            {"interval": (-1.0, 1e7)},
            "each of interval must be a finite number of at least -1e\\+06 and at most 1e\\+06",
        ),
        ({"temperature": 1e-7}, "temperature must be a finite number of at least 1e-06"),
        ({"parameters": "soft_clip", "min_width": 7.0}, "min_width must be 0.001 for parameters='soft_clip'"),
        ({"parameters": "soft_clip", "min_height": 1e-6}, "min_height must be 0.001 for parameters='soft_clip'"),
        ({"parameters": "soft_clip", "temperature": 1e-3}, "temperature must be 1.0 for parameters='soft_clip'"),
    ):
        with pytest.raises(ValueError, match=message):
            rq_spline(*tensors, **options)
    with pytest.raises(ValueError, match=r"x must be \[B, ...\]; got \(\)"):
        rq_spline(torch.tensor(1.0), *tensors[1:])
    with pytest.raises(ValueError, match=r"widths must be \[2 or 1, 3, K\] for x \(2, 3\); got \(2, 2, 4\)"):
        rq_spline(tensors[0], tensors[1][:, :2], *tensors[2:])
    with pytest.raises(ValueError, match="tail_bound must be a finite number above 0 and at most 1e\\+06"):
        lf.coupling_flow(4, transform="spline", tail_bound=1e30)


# Derivatives


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("tails", "parameters"), KINDS)
def test_derivatives(tails: str, parameters: str, inverse: bool) -> None:
    """First derivatives by the formulas, and second ones, of both outputs."""
    for rows in (3, 1):
        tensors = [t.requires_grad_() for t in drawn(3, 2, 3, tails, rows)]

        def both(*tensors: Tensor) -> Outputs:
            options: dict[str, Any] = {"tails": tails, "parameters": parameters, "inverse": inverse}
            options |= {"temperature": 0.7} if parameters == "softmax" else {}
            return rq_spline(*tensors, interval=(-2.5, 3.0), log_det=True, **options)

        assert torch.autograd.gradcheck(both, tensors)
        assert torch.autograd.gradgradcheck(both, tensors)


def test_a_gradient_of_one_output_or_for_one_tensor() -> None:
    x, *raw = (t.requires_grad_() for t in drawn(9, 2, 4))
    for inverse in (False, True):
        options = {"inverse": inverse, "log_det": True}
        for pick in (0, 1):
            expected = []
            for backend in ("auto", "reference"):
                with lf.backend(backend):
                    output = rq_spline(x, *raw, **options)[pick]
                    expected.append(torch.autograd.grad(output.square().sum(), (x, *raw)))
            torch.testing.assert_close(*expected, rtol=1e-11, atol=1e-11)
        every = torch.autograd.grad(rq_spline(x, *raw, **options)[0].sum(), (x, *raw))
        for i, tensor in enumerate((x, *raw)):
            given = [t if t is tensor else t.detach() for t in (x, *raw)]
            (alone,) = torch.autograd.grad(rq_spline(*given, **options)[0].sum(), tensor)
            assert torch.equal(alone, every[i])


# Sizes and strides


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bins first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "rows innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "interleaved": lambda t: torch.stack((t, t), -1)[..., 0],
    "slices": lambda t: torch.cat((t, t, t), 1)[:, t.shape[1] : 2 * t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides(name: str) -> None:
    """Strides change no bit; x is [B, C, H, W]."""
    x, *raw = (t.float() for t in drawn(40, 6, 8))
    moved = [LAYOUTS[name](t) for t in raw]
    x = x.unflatten(1, (1, 2, 3)).transpose(2, 3)
    shaped = [t.unflatten(1, (1, 2, 3)).transpose(2, 3) for t in moved]
    for inverse in (False, True):
        got = splined(x, *shaped, inverse=inverse)
        expected = splined(x.contiguous(), *(t.contiguous() for t in shaped), inverse=inverse)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        assert got[0].is_contiguous()


def test_one_tensor_of_parameters_gives_the_same() -> None:
    """As conditioners give them, bins last, bins first and with rows innermost; gradients too."""
    from linfast.ops.rq_spline import spline_of, spline_transform

    x, *raw = (t.float() for t in drawn(40, 3, 8))
    options: dict[str, Any] = {"tails": "linear", "interval": (-3.0, 3.0)}
    options |= {"min_width": 1e-3, "min_height": 1e-3, "min_derivative": 1e-3}
    spline = spline_of(8, **options)
    expected = splined(x, *raw)
    for layout in (lambda t: t, LAYOUTS["bins first"], LAYOUTS["rows innermost"], LAYOUTS["interleaved"]):
        params = layout(torch.cat(raw, -1)).detach().requires_grad_()
        leaf = x.clone().requires_grad_()
        outputs = spline_transform(leaf, params, spline, False, True)
        of_x, of_params = gradients_of(outputs, [leaf, params])
        got = (*outputs, of_x, *of_params.split((8, 8, 7), -1))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (4, 0), (0, 0), (2, 3000)])
def test_sizes(shape: tuple[int, int], rows: int | None) -> None:
    tensors = drawn(*shape, 4, rows=rows)
    got = splined(*tensors)
    assert [g.shape for g in got] == [shape, shape[:1], *(t.shape for t in tensors)]
    with lf.backend("reference"):
        for value, exact in zip(got, splined(*tensors), strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [None, 1])
def test_a_batch_in_parts(monkeypatch: pytest.MonkeyPatch, rows: int | None) -> None:
    tensors = drawn(100, 3, 4, rows=rows)
    expected = splined(*tensors)
    monkeypatch.setattr(spline_plain, "_AT_ONCE", 7 * 3 * 4)
    for value, exact in zip(splined(*tensors), expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)


def test_dtypes_of_x_and_parameters_may_differ() -> None:
    x, *raw = drawn(20, 3, 4)
    for dtype, of_raw in (
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        given = [x.to(dtype), *(t.to(of_raw) for t in raw)]
        got = splined(*given)
        wide = torch.promote_types(torch.promote_types(dtype, of_raw), torch.float32)
        expected = splined(*(t.to(wide) for t in given))
        assert got[1].dtype == wide
        for value, exact, like in zip(got, expected, (given[0], got[1], *given), strict=True):
            assert value.dtype == like.dtype
            torch.testing.assert_close(value, exact.to(like.dtype), rtol=2e-2, atol=2e-2)  # of cotangents too
        assert torch.equal(got[0], expected[0].to(dtype))
        assert torch.equal(got[1], expected[1])


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    x, *raw = (t.float() for t in drawn(5, 2, 4))
    expected = splined(x, *raw)
    x[1, 0], x[2, 1], x[3, 0] = float("nan"), float("inf"), -float("inf")
    got = splined(x, *raw)
    for value, exact in zip(got, expected, strict=True):
        assert torch.equal(value[[0, 4]], exact[[0, 4]])
    assert bool(got[0][1, 0].isnan())
    assert torch.equal(got[0][[2, 3], [1, 0]], x[[2, 3], [1, 0]])


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_beside_a_nan_are_finite(inverse: bool) -> None:
    x, *raw = (t.float() for t in drawn(5, 2, 4))
    x[1, 0] = float("nan")
    given = [t.requires_grad_() for t in (x, *raw)]
    y, logs = rq_spline(*given, inverse=inverse, log_det=True)
    found = torch.autograd.grad(y.nan_to_num().sum() + logs.sum(), given)
    assert all(bool(gradient.isfinite().all()) for gradient in found)
    assert all(not gradient[1, 0].any() for gradient in found)


# torch's transforms


def test_torch_func() -> None:
    x, *raw = drawn(5, 3, 4)
    for inverse in (False, True):

        def one(x: Tensor, *raw: Tensor) -> Outputs:
            return rq_spline(x[None], *(r[None] for r in raw), inverse=inverse, log_det=True)  # noqa: B023

        y, logs = torch.vmap(one)(x, *raw)
        expected, expected_logs = rq_spline(x, *raw, inverse=inverse, log_det=True)
        torch.testing.assert_close(y[:, 0], expected)
        torch.testing.assert_close(logs[:, 0], expected_logs)
        jacobian = torch.func.jacrev(lambda x: rq_spline(x, *raw, inverse=inverse)[0])(x)  # noqa: B023
        diagonal = jacobian.flatten(2).flatten(0, 1).diagonal()
        torch.testing.assert_close(diagonal.log().view(5, 3).sum(1), expected_logs)
        _, pull = torch.func.vjp(lambda *tensors: rq_spline(*tensors, inverse=inverse)[0], x, *raw)  # noqa: B023
        leaves = [t.clone().requires_grad_() for t in (x, *raw)]
        wanted = torch.autograd.grad(rq_spline(*leaves, inverse=inverse)[0], leaves, x)
        torch.testing.assert_close(pull(x), wanted)


def test_compiled_with_batches_of_any_size() -> None:
    with_log_det = functools.partial(rq_spline, log_det=True)
    torch.compiler.reset()
    compiled = torch.compile(with_log_det, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (4, 9, 33):
        tensors = [t.float().requires_grad_() for t in drawn(B, 3, 4)]
        got, expected = compiled(*tensors), with_log_det(*tensors)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients_of(got, tensors), gradients_of(expected, tensors))


def test_an_exported_program_has_gradients() -> None:
    class Splined(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Outputs:
            return rq_spline(*tensors, log_det=True)

    tensors = drawn(4, 3, 5)
    with torch.no_grad():
        program = torch.export.export(Splined(), tuple(tensors)).module()
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = program(*leaves)
    for got, expected in zip((*outputs, *gradients_of(outputs, leaves)), splined(*tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_autocast_changes_nothing(backend: str) -> None:
    x, *raw = (t.float().to(DEVICE) for t in drawn(300, 3, 4))
    params, grads = torch.cat(raw, -1), (torch.ones_like(x), torch.ones(300, device=DEVICE))

    def outputs() -> Outputs:
        return (*splined(x, *raw), *spline_backward(x, params, *grads, Spline(4), False))

    with lf.backend(backend):
        expected = outputs()
        with torch.autocast(DEVICE, torch.bfloat16):
            for value, exact in zip(outputs(), expected, strict=True):
                assert torch.equal(value, exact)


@pytest.mark.skipif(DEVICE != "cpu", reason="a kernel has no forward-mode derivative")
@pytest.mark.parametrize("inverse", [False, True])
def test_forward_mode_on_a_cpu(inverse: bool) -> None:
    x, *raw = drawn(3, 2, 4)

    def splined_x(x: torch.Tensor) -> torch.Tensor:
        return rq_spline(x, *raw, inverse=inverse)[0]

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(splined_x(forward_ad.make_dual(x, x))).tangent
    _, pull = torch.func.vjp(splined_x, x)
    torch.testing.assert_close(found, pull(x)[0], rtol=1e-9, atol=1e-12)  # its Jacobian is diagonal


def test_meta_tensors_and_opcheck() -> None:
    x, *raw = (t.float().requires_grad_() for t in drawn(3, 2, 4))
    y, logs = rq_spline(*(t.to("meta") for t in (x, *raw)), log_det=True)
    assert y.is_meta
    assert (y.shape, logs.shape, logs.dtype) == (x.shape, (3,), torch.float32)
    op, planes = torch.ops.linfast.rq_spline_planes.default, torch.cat(raw, -1).detach()
    for inverse in (False, True):
        torch.library.opcheck(op, (x.detach(), planes, None, None, *Spline(4), inverse, True))
        torch.library.opcheck(op, (*(t.detach() for t in (x, *raw)), *Spline(4), inverse, False))


def test_what_is_kept_between_calls_holds_numbers() -> None:
    x, params = torch.randn(5, 3), torch.randn(5, 3, 11)
    spline = Spline(4, high=3.125)  # no other test keeps it
    with lf.backend("reference"):
        for _ in range(2):
            with FakeTensorMode() as mode:
                tensors = [mode.from_tensor(t) for t in (x, params)]
                grads = spline_backward(*tensors, tensors[0], None, spline, False)
                assert [g.shape for g in grads] == [x.shape, params.shape]
            assert all(bool(g.isfinite().all()) for g in spline_backward(x, params, x, None, spline, False))
