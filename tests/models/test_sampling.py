"""sample and invert through a flow: sampling step by step and in one step, and inversion."""

from __future__ import annotations

import pytest
import torch

import linfast as lf
from linfast.sampling.integrate import integrate, schedule
from tests.laws.zoo import perturb, relative


def _model(n: int = 8, rank: int = 3, dtype: torch.dtype = torch.float64) -> lf.Linearizer:
    g = perturb(lf.coupling_flow(n, 4, (16,), time_features=8))
    return lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(n, rank), g.at(t=0.0)).to(dtype)


def _plain_runge_kutta_4(A, z: torch.Tensor, steps: int) -> torch.Tensor:
    h = 1.0 / steps

    def v(z: torch.Tensor, t: float) -> torch.Tensor:
        return (A(z, t=t) - z) / (1 - t)

    for i in range(steps - 1):
        t = i * h
        k1 = v(z, t)
        k2 = v(z + h / 2 * k1, t + h / 2)
        k3 = v(z + h / 2 * k2, t + h / 2)
        k4 = v(z + h * k3, t + h)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


def test_rk4_is_the_textbook_scheme_with_the_papers_stop_rule() -> None:
    A, z = lf.TimeLowRank(6, 2).double(), torch.randn(3, 6, dtype=torch.float64)
    assert relative(lf.collapse(A, 10)(z), _plain_runge_kutta_4(A, z, 10)) < 1e-12


def test_euler_reaches_the_endpoint_that_a_constant_prediction_names() -> None:
    end = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    for stop, reached, times in ((None, 0.8, [0, 0.2, 0.4, 0.6]), (1.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8])):
        plan = schedule("euler", 5, stop)
        z = integrate(lambda z, k: end.expand_as(z), torch.zeros(1, 2, dtype=torch.float64), plan)
        assert plan.times == pytest.approx(times)
        torch.testing.assert_close(z, end * reached)  # a straight line


def test_collapse_of_a_composite_leaves_its_parts_alone() -> None:
    A = lf.TimeLowRank(4, 2) @ lf.Dense(4) + 0.5 * lf.Diagonal(4)
    B = lf.collapse(A, 10)
    assert all(p.dtype == torch.float32 for p in A.parameters())
    z = torch.randn(5, 4)
    assert relative(B(z), _plain_runge_kutta_4(A, z, 10)) < 1e-5


def test_invert_undoes_sample() -> None:
    f = _model(16, 4, torch.float32)
    noise = torch.randn(32, 16)
    data = lf.sample(f, noise, steps=20)
    assert relative(lf.invert(f, data, steps=20), noise) < 1e-4
    assert relative(lf.sample(f, lf.invert(f, data, steps=20), steps=20), data) < 1e-4


def test_inverting_in_float32_is_as_good_as_its_latents() -> None:
    """B is inverted and applied in float64, so that the noise is that of the float64 model, rounded once."""
    f = lf.Linearizer(lf.Flow([], features=256), lf.TimeLowRank(256, 1))
    noise = torch.randn(8, 256)
    data = lf.sample(f.double(), noise.double(), 100).float()
    truth = lf.invert(f.double(), data.double(), 100)
    assert relative(lf.invert(f.float(), data, 100), truth) < 1e-6


def test_sampling_to_the_end() -> None:
    """With stop=1 the last Euler step is the prediction itself, which has rank r and so no inverse."""
    f, noise = _model(), torch.randn(4, 8, dtype=torch.float64)
    many = lf.sample(f, noise, 10, "euler", one_step=False, stop=1.0)
    assert relative(lf.sample(f, noise, 10, "euler", stop=1.0), many) < 1e-10
    assert relative(lf.sample(f, noise, 10, "euler"), many) > 1e-2
    with pytest.raises(ValueError, match=r"singular.*pinv"):
        lf.invert(f, many, 10, "euler", stop=1.0)


def test_return_path_ends_in_the_sample() -> None:
    f = _model()
    noise = torch.randn(3, 8, dtype=torch.float64)
    y, path = lf.sample(f, noise, steps=6, one_step=False, return_path=True)
    assert path.shape == (6, 3, 8)
    assert torch.equal(path[-1], y)
    assert relative(path[0], f.gx_inverse(f.gy(noise))) < 1e-12


def test_collapse_leaves_an_operator_that_holds_one_part_twice_as_it_was() -> None:
    A = lf.TimeLowRank(4, 1)
    before = dict(A.named_parameters())
    lf.collapse(A + A.T, 5)
    assert all(value is before[name] for name, value in A.named_parameters())


def test_images_are_sampled_in_their_own_shape() -> None:
    g = perturb(lf.image_flow(1, 4, 2, 8))
    f = lf.Linearizer(g, lf.TimeLowRank(16, 2))
    noise = torch.randn(3, 1, 4, 4)
    many = lf.sample(f, noise, 5, one_step=False)
    assert many.shape == noise.shape
    assert relative(lf.sample(f, noise, 5), many) < 1e-5
    assert lf.invert(f, many, 5).shape == noise.shape


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f, x: lf.sample(f, x, steps=1), ValueError, "steps must be at least 2; got 1"),
        (lambda f, x: lf.sample(f, x, method="rk5"), ValueError, "method.*'rk5'"),
        (lambda f, x: lf.sample(f, x, return_path=True), ValueError, "one_step=False"),
        (lambda f, x: lf.sample(lf.Linearizer(f.g_x, lf.Dense(8)), x), ValueError, "time-dependent.*Dense"),
        (lambda f, x: lf.collapse(lf.Dense(8)), ValueError, "time-dependent"),
        (lambda f, x: lf.collapse(lf.Dense(3, 8) @ f.A), ValueError, "must be square.*3 x 8"),
        (lambda f, x: lf.sample(f.A, x), TypeError, "f must be a Linearizer"),
        (lambda f, x: lf.sample(f.g_x, x), TypeError, r"a flow is sampled by lf.Density\(flow\).sample\(n\)"),
        (lambda f, x: lf.generator(lf.Density(f.g_x)), TypeError, r"got Density: call its own sample\(n\)"),
        (lambda f, x: f(x), ValueError, "depends on time"),
    ],
)
def test_bad_calls(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(_model(dtype=torch.float32), torch.randn(2, 8))
