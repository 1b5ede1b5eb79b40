"""The research repository's interface: arguments of each method, overriding, and errors for missing parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.compat.linearizer import G, Linearizer, LinearModule
from tests.compat import stand_in
from tests.laws.zoo import perturb


class Log:
    """The calls in order, with their keywords."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []


def _parts(module, log: Log):
    """A G that adds ``by`` and a LinearModule that doubles, from this module's classes."""

    class AddG(module.G):
        def __init__(self, name, by):
            super().__init__(in_ch=2, image_resolution=3)
            self.name, self.by = name, by

        def forward(self, x, **kwargs):
            log.calls.append((self.name, kwargs))
            return x + self.by

        def inverse(self, z, **kwargs):
            log.calls.append((f"{self.name} inverse", kwargs))
            return z - self.by

    class Twice(module.LinearModule):
        def forward(self, x, **kwargs):
            log.calls.append(("A", kwargs))
            return 2 * x

        def inverse(self, z, **kwargs):
            log.calls.append(("A inverse", kwargs))
            return z / 2

    return AddG, Twice


def _calls(module) -> list:
    """Every call's log and value, with two g and keywords."""
    log = Log()
    AddG, Twice = _parts(module, log)
    f = module.Linearizer(AddG("x", 1.0), Twice(), AddG("y", 3.0))
    x = torch.arange(4.0)
    values = [f(x, t=0.5, mode="m"), f.inverse(x, t=0.25, mode="n")]
    values += [
        method(x, k=i) for i, method in enumerate((f.gx, f.gy, f.gx_inverse, f.gy_inverse, f.A, f.A_inverse))
    ]
    return [[value.tolist() for value in values], log.calls, f.net_gx.dim]


def test_forward_inverse_and_keywords_are_those_of_the_reference():
    (values, calls, dim), expected = _calls(lf.compat.linearizer), _calls(stand_in)
    assert [values, calls, dim] == expected
    assert values[0] == [-1.0, 1.0, 3.0, 5.0]  # 2 (x + 1) - 3
    assert calls[:3] == [(name, {"t": 0.5, "mode": "m"}) for name in ("x", "A", "y inverse")]
    assert calls[3:6] == [(name, {"t": 0.25, "mode": "n"}) for name in ("y", "A inverse", "x inverse")]
    assert dim == 18


def test_gy_is_gx_by_default():
    AddG, Twice = _parts(lf.compat.linearizer, Log())
    f = Linearizer(gx=AddG("x", 1.0), linear_network=Twice())
    assert f.net_gy is f.net_gx
    torch.testing.assert_close(f.inverse(f(torch.ones(2, 3))), torch.ones(2, 3))


def test_forward_and_inverse_go_through_overridden_methods():
    class Overriding(Linearizer):
        def gx(self, x, **kwargs):
            return x + 1

        def A(self, g_x, **kwargs):
            return g_x * kwargs["t"]

        def gy_inverse(self, g_y, **kwargs):
            return g_y + 100

        def gy(self, y, **kwargs):
            return y - 100

        def A_inverse(self, g_y, **kwargs):
            return g_y / kwargs["t"]

        def gx_inverse(self, g_x, **kwargs):
            return g_x - 1

    f = Overriding(nn.Identity(), nn.Identity())
    assert f(torch.ones(1), t=3.0).item() == 106.0
    assert f.inverse(torch.tensor([106.0]), t=3.0).item() == 1.0


def test_missing_methods_are_named():
    class OnlyForward(G):
        def forward(self, x, **kwargs):
            return x

    class NoInverse(LinearModule):
        def forward(self, x, **kwargs):
            return x

    class Empty(LinearModule):
        pass

    x = torch.ones(2, 3)
    f = Linearizer(OnlyForward(1, 2), NoInverse())
    with pytest.raises(
        NotImplementedError, match=r"G\.inverse is left to subclasses; OnlyForward does not override"
    ):
        f(x)
    with pytest.raises(NotImplementedError, match=r"LinearModule\.inverse .* NoInverse does not"):
        f.A_inverse(x)
    with pytest.raises(NotImplementedError, match=r"LinearModule\.forward .* Empty does not"):
        Empty()(x)
    with pytest.raises(NotImplementedError, match=r"G\.forward"):
        G(1, 2)(x)


def test_parts_of_other_kinds_without_an_inverse_are_named():
    f = Linearizer(nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity())
    x = torch.ones(2, 3)
    with pytest.raises(NotImplementedError, match="net_gx is a Linear, which has no inverse"):
        f.gx_inverse(x)
    with pytest.raises(NotImplementedError, match="net_gy is a Identity, which"):
        f(x)
    with pytest.raises(NotImplementedError, match="linear_network is a Linear, which"):
        f.inverse(x)


# linfast's own bijections and operators as parts.


def _flow(**options: object) -> nn.Module:
    return perturb(lf.coupling_flow(6, 2, hidden=(8,), **options)).double()


def test_native_parts_give_what_the_native_linearizer_gives():
    g, A = _flow(), lf.TimeLowRank(6, 2, alpha=1.0, hidden=8).double()
    f, native = Linearizer(g, A), lf.Linearizer(g, A)
    x, t = torch.randn(5, 6, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(f(x, t=t), native(x, t=t), rtol=0, atol=0)
    torch.testing.assert_close(f.inverse(f(x, t=t), t=t), x)
    with pytest.raises(ValueError, match="TimeLowRank depends on time"):
        f(x)
    with pytest.raises(ValueError, match="TimeLowRank depends on time"):
        f.inverse(x)


def test_native_g_keeps_its_own_time_and_is_given_other_keywords():
    timed, A = _flow(time_features=8), lf.TimeLowRank(6, 2, alpha=1.0, hidden=8).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    f = Linearizer(timed.at(t=1.0), A, timed.at(t=0.0))
    torch.testing.assert_close(f(x, t=0.5), timed.inverse(A(timed(x, t=1.0), t=0.5), t=0.0))

    labelled, label = _flow(context_features=3), torch.randn(5, 3, dtype=torch.float64)
    f = Linearizer(labelled, lf.Dense(6).double())
    torch.testing.assert_close(f.inverse(f(x, context=label), context=label), x)
    torch.testing.assert_close(f.gx(x, context=label), labelled(x, context=label))


@pytest.mark.parametrize("image_side", ["x", "y"])
def test_native_rectangular_operator_between_images_and_vectors(image_side):
    image, vector = perturb(lf.image_flow(1, 4, 2, width=4)).double(), _flow()
    pictures, vectors = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    if image_side == "x":
        gx, gy, x, y = image, vector, pictures, vectors
    else:
        gx, gy, x, y = vector, image, vectors, pictures
    A = lf.Dense(y[0].numel(), x[0].numel()).double()
    out = Linearizer(gx, A, gy)(x)
    assert out.shape == y.shape
    torch.testing.assert_close(out, lf.Linearizer(gx, A, gy)(x), rtol=0, atol=0)


def test_native_and_reference_parts_mix():
    class Modes(G):
        def forward(self, x, **kwargs):
            return x + {"gx": 1.0}[kwargs["mode"]]

        def inverse(self, z, **kwargs):
            return z - {"gx": 1.0}[kwargs["mode"]]

    class ByTime(LinearModule):
        def forward(self, x, **kwargs):
            return x * kwargs["t"]

    x = torch.randn(5, 6, dtype=torch.float64)
    A = lf.TimeLowRank(6, 2, hidden=8).double()
    torch.testing.assert_close(Linearizer(Modes(6, 1), A)(x, t=0.5, mode="gx"), A(x + 1, t=0.5) - 1)
    g = _flow()
    torch.testing.assert_close(Linearizer(g, ByTime())(x, t=0.5), g.inverse(0.5 * g(x)))


def test_native_operator_collapses_as_its_steps_do():
    f = Linearizer(_flow(), lf.TimeLowRank(6, 2, hidden=8).double())
    noise = torch.randn(3, 6, dtype=torch.float64)
    z = f.gy(noise)
    for i in range(9):
        z = z + (f.A(z, t=i / 10) - z) / (10 - i)
    B = lf.collapse(f.linear_network, steps=10, method="euler")
    torch.testing.assert_close(B(f.gy(noise)), z)


def test_singular_native_operator_says_pinv():
    f = Linearizer(_flow(), lf.Dense(6, weight=torch.zeros(6, 6, dtype=torch.float64)))
    with pytest.raises(ValueError, match="pinv"):
        f.inverse(torch.randn(2, 6, dtype=torch.float64))
